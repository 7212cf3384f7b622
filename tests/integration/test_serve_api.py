"""The server as clients of OpenAI's API see it: the openai package, and the curl lines of docs/serve.md."""

import asyncio
import base64
import json
import os
import shutil
import subprocess
import urllib.request
from pathlib import Path
from typing import Any

import openai
import pytest
import torch

import fastav
from fastav.decoding.settings import greedy_settings
from fastav.request import Request
from support import pages
from support.serving import serving

CLIPS = Path(fastav.__file__).parent / "assets" / "clips"
CLIP = CLIPS / "half-minute.mp4"
QUESTION = "describe the clip."


@pytest.fixture(scope="module")
def server():
    with serving() as server:
        yield server


@pytest.fixture(scope="module")
def client(server):
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
        yield client


def video(path: Path = CLIP) -> dict[str, Any]:
    data = base64.b64encode(path.read_bytes()).decode()
    return {"type": "video_url", "video_url": {"url": f"data:video/mp4;base64,{data}"}}


def messages(question: str = QUESTION, *parts: dict[str, Any]) -> list[Any]:
    return [{"role": "user", "content": [*(parts or (video(),)), {"type": "text", "text": question}]}]


def ask(client: Any, question: str = QUESTION, *parts: dict[str, Any], **fields: Any) -> Any:
    return client.chat.completions.create(model="tiny-long", messages=messages(question, *parts), **fields)


def text_of(stream: Any, choice: int = 0) -> str:
    return "".join(one.delta.content or "" for chunk in stream for one in chunk.choices if one.index == choice)


@pytest.mark.parametrize("plan", ["none", "fastav", "fastav-plus", "fastv@0.5"])
def test_an_answer_is_that_of_the_pipeline(server, client, plan):
    response = ask(client, extra_body={"fastav": plan})
    answer = server.pipe(CLIP, QUESTION, plan=plan)
    assert response.choices[0].message.content == answer.text
    assert response.choices[0].finish_reason == answer.finish
    assert (response.model, response.object) == ("tiny-long", "chat.completion")
    usage = response.usage
    assert usage.prompt_tokens == sum(answer.prompt_tokens.values())
    assert usage.completion_tokens == len(answer.token_ids)
    assert usage.total_tokens == usage.prompt_tokens + usage.completion_tokens
    assert usage.prompt_tokens_details.audio_tokens == answer.prompt_tokens["audio"]
    told = usage.model_extra["fastav"]
    expected = answer.to_dict()
    assert {name: told[name] for name in ("plan", "tokens_per_layer", "flops", "kv_bytes")} == {
        name: expected[name] for name in ("plan", "tokens_per_layer", "flops", "kv_bytes")
    }
    assert set(told["seconds"]) == {"queue", "media", "encode", "prefill", "decode"}


def test_a_stream_has_the_same_text_and_its_usage_at_the_end(server, client):
    chunks = list(ask(client, stream=True, stream_options={"include_usage": True}))
    assert text_of(chunks) == server.pipe(CLIP, QUESTION).text
    assert sum(bool(chunk.choices and chunk.choices[0].delta.content) for chunk in chunks) > 5
    assert chunks[0].choices[0].delta.role == "assistant"
    assert [chunk.choices[0].finish_reason for chunk in chunks if chunk.choices][-1] == "stop"
    assert (chunks[-1].choices, chunks[-1].usage.model_extra["fastav"]["plan"]) == ([], "fastav")
    assert all(chunk.usage is None for chunk in chunks[:-1])


def test_clients_of_asyncio_stream_at_the_same_time(server):
    questions = [QUESTION, "which color moves?", "how many beeps are there?"]

    async def main() -> list[str]:
        async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:

            async def one(question: str) -> str:
                stream = await ask(client, question, stream=True)
                return "".join([chunk.choices[0].delta.content or "" async for chunk in stream])

            return await asyncio.gather(*map(one, questions))

    assert asyncio.run(main()) == [server.pipe(CLIP, question).text for question in questions]


def test_several_choices_have_seeds_of_their_own(server, client):
    fields: dict[str, Any] = {"temperature": 1.9, "seed": 5, "n": 3}
    response = ask(client, **fields)
    texts = [choice.message.content for choice in response.choices]
    expected = [
        server.pipe(CLIP, QUESTION, do_sample=True, temperature=1.9, top_p=1.0, top_k=0, num_beams=1, seed=5 + n).text
        for n in range(3)
    ]
    assert texts == expected
    assert [choice.index for choice in response.choices] == [0, 1, 2]
    chunks = list(ask(client, stream=True, **fields))
    assert [text_of(chunks, n) for n in range(3)] == texts


def test_lengths_and_stop_texts(server, client):
    whole = server.pipe(CLIP, QUESTION).text
    short = ask(client, max_tokens=3)
    assert (short.choices[0].message.content, short.choices[0].finish_reason) == (" ".join(whole.split()[:3]), "length")
    assert ask(client, max_completion_tokens=3).choices[0].message.content == short.choices[0].message.content
    word = whole.split()[3]
    stopped = ask(client, stop=[word])
    assert stopped.choices[0].message.content == whole.partition(word)[0].strip()
    assert stopped.choices[0].finish_reason == "stop"
    assert text_of(ask(client, stop=word, stream=True)) == stopped.choices[0].message.content


def test_log_probabilities_are_those_of_the_models_logits(server, client):
    response = ask(client, logprobs=True, top_logprobs=3, temperature=0)
    engine, tokenizer = server.pipe.engine, server.pipe.engine.processor.tokenizer
    request = Request(clip=CLIP, question=QUESTION)
    ids = server.pipe(request).token_ids
    (logits,) = engine.forced_logits([request], server.pipe.plan, [ids])
    expected = logits.float().log_softmax(-1)
    steps = response.choices[0].logprobs.content
    assert [step.token.strip() for step in steps] == [tokenizer.decode([token]).strip() for token in ids]
    for step, row, token in zip(steps, expected, ids, strict=False):
        assert step.logprob == pytest.approx(float(row[token]), abs=1e-3)
        top = torch.topk(row, 3).values.tolist()
        assert [one.logprob for one in step.top_logprobs] == pytest.approx(top, abs=1e-3)
    chunks = list(ask(client, logprobs=True, top_logprobs=3, temperature=0, stream=True))
    streamed = [
        one
        for chunk in chunks
        for choice in chunk.choices
        for one in (choice.logprobs and choice.logprobs.content) or ()
    ]
    assert [(one.token, one.logprob) for one in streamed] == [(one.token, one.logprob) for one in steps]


def test_media_come_as_uploads_examples_base64_and_urls(server, client):
    expected = server.pipe(CLIP, QUESTION).text
    with CLIP.open("rb") as file:
        uploaded = client.files.create(file=file, purpose="user_data")
    assert (uploaded.filename, uploaded.bytes) == (CLIP.name, CLIP.stat().st_size)
    assert uploaded.id in [one.id for one in client.files.list()]
    assert client.files.content(uploaded.id).content == CLIP.read_bytes()
    for identifier in (uploaded.id, "example-half-minute"):
        part = {"type": "file", "file": {"file_id": identifier}}
        assert ask(client, QUESTION, part).choices[0].message.content == expected
    assert client.files.delete(uploaded.id).deleted
    with pytest.raises(openai.NotFoundError, match="there is no file"):
        ask(client, QUESTION, {"type": "file", "file": {"file_id": uploaded.id}})
    sound = {
        "type": "input_audio",
        "input_audio": {"data": base64.b64encode(CLIP.read_bytes()).decode(), "format": "mp3"},
    }
    heard = ask(client, "what sound do you hear?", sound)
    assert heard.usage.prompt_tokens_details.model_extra["video_tokens"] == 0
    assert heard.choices[0].message.content == server.pipe(CLIP, "what sound do you hear?", use="audio").text


def test_history_and_system_messages_reach_the_model(server, client):
    conversation = [*messages("which color moves?"), {"role": "assistant", "content": "purple"}]
    conversation.append({"role": "user", "content": "which shape moves?"})
    response = client.chat.completions.create(model="tiny-long", messages=conversation)
    known = [
        {
            "role": "user",
            "content": [{"type": "video", "path": str(CLIP)}, {"type": "text", "text": "which color moves?"}],
        },
        {"role": "assistant", "content": "purple"},
        {"role": "user", "content": "which shape moves?"},
    ]
    answer = server.pipe(known)
    assert response.choices[0].message.content == answer.text
    assert response.usage.prompt_tokens == sum(answer.prompt_tokens.values())


def test_the_tracks_of_a_video_can_be_chosen_as_in_vllm(server, client):
    for options, use in (({"use": "video"}, "video"), ({"use_audio_in_video": True}, "both")):
        response = ask(client, extra_body={"mm_processor_kwargs": options})
        assert response.usage.prompt_tokens == sum(server.pipe(CLIP, QUESTION, use=use).prompt_tokens.values())


def test_a_plan_of_its_own_as_json_or_as_with_vllm(server, client):
    plan = server.pipe.adapter.preset("fastav-plus")
    for extra in ({"fastav": json.loads(plan.to_json())}, {"vllm_xargs": {"fastav": "fastav-plus"}}):
        response = ask(client, extra_body=extra)
        assert response.usage.model_extra["fastav"]["flops"] == server.pipe(CLIP, QUESTION, plan=plan).flops.to_dict()


def test_models_health_and_metrics(server, client):
    (model,) = client.models.list().data
    assert model.id == "tiny-long"
    assert model.model_extra["fastav"]["plans"] == ["none", "fastav", "fastav-plus", "fastav-trim"]
    assert "fastv" in model.model_extra["fastav"]["budgets"]
    assert "vtw" not in model.model_extra["fastav"]["budgets"]
    assert not model.model_extra["fastav"]["supports_images"]
    assert client.models.retrieve("tiny-long").id == "tiny-long"
    ask(client)
    assert json.load(urllib.request.urlopen(f"{server.url}/health")) == {"status": "ok"}
    text = urllib.request.urlopen(f"{server.url}/metrics").read().decode()
    values = dict(line.rsplit(" ", 1) for line in text.splitlines() if not line.startswith("#"))
    assert float(values["fastav_completion_tokens_total"]) > 0
    assert float(values['fastav_requests_total{path="/v1/chat/completions",status="200"}']) >= 1
    assert float(values['fastav_kv_bytes_total{pruning="pruned"}']) < float(
        values['fastav_kv_bytes_total{pruning="full"}']
    )
    assert float(values["fastav_answers_admitted"]) == 0


def test_an_inspection_is_that_of_the_answers_prefill(server):
    body = {"model": "tiny-long", "messages": messages(), "fastav": "fastav-plus"}
    request = urllib.request.Request(
        f"{server.url}/v1/inspect", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    told = json.load(urllib.request.urlopen(request))
    answer = server.pipe(CLIP, QUESTION, plan="fastav-plus")
    names = told["modalities"]
    for layer, counts in enumerate(answer.tokens_per_layer):
        kinds = [
            kind
            for kind, last in zip(told["tokens"]["modality"], told["tokens"]["layers"], strict=True)
            if last > layer
        ]
        assert {name: kinds.count(index) for index, name in enumerate(names) if name in counts} == dict(counts)
    assert told["flops"] == answer.flops.to_dict()
    (item,) = told["items"]
    assert item["kind"] == "video"
    assert len(item["frames"]) == 32
    assert all(frame["uri"].startswith("data:image/jpeg") for frame in item["frames"])
    assert item["waveform"]["seconds"] == pytest.approx(32, abs=0.1)


def test_an_inspection_names_media_as_the_client_did(server):
    part = {"type": "file", "file": {"file_id": "example-knock"}}
    body = {"model": "tiny-long", "messages": messages("which color moves?", part)}
    request = urllib.request.Request(
        f"{server.url}/v1/inspect", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    assert [item["name"] for item in json.load(urllib.request.urlopen(request))["items"]] == ["knock.mp4"]


WRONG: list[tuple[dict[str, Any], int, str]] = [
    ({"model": "gpt"}, 404, "the model 'gpt' is not served here"),
    ({"messages": []}, 400, "there are no messages"),
    ({"messages": [{"role": "assistant", "content": "x"}]}, 400, "does not answer"),
    ({"temperature": 3}, 400, "temperature: "),
    ({"top_p": 0}, 400, "top_p: "),
    ({"n": 99}, 400, "n: "),
    ({"max_tokens": 0}, 400, "max_tokens: "),
    ({"max_tokens": 5000}, 400, "4,096 tokens"),
    ({"max_tokens": 1, "max_completion_tokens": 2}, 400, "differ"),
    ({"max_tokens": 4000}, 400, "exceed the model's"),
    ({"top_logprobs": 3}, 400, "top_logprobs needs logprobs"),
    ({"stream_options": {"include_usage": True}}, 400, "stream_options needs stream"),
    ({"logit_bias": {"1": 2}}, 400, "logit_bias is not supported"),
    ({"response_format": {"type": "json_object"}}, 400, "response_format is not supported"),
    ({"extra_body": {"foo": 1}}, 400, "foo is not a field"),
    ({"extra_body": {"fastav": "fastavv"}}, 400, "did you mean 'fastav'"),
    ({"extra_body": {"fastav": "plan.json"}}, 400, "cannot name a file"),
    ({"extra_body": {"fastav": "none", "vllm_xargs": {"fastav": "fastav"}}}, 400, "two plans"),
    ({"extra_body": {"fastav": "fastv@1e308"}}, 400, ""),
    ({"stop": [""]}, 400, "stop_strings"),
]


@pytest.mark.parametrize(("fields", "status", "says"), WRONG)
@pytest.mark.parametrize("stream", [False, True])
def test_a_wrong_request_is_one_clear_error(client, fields, status, says, stream):
    if stream and "stream_options" in fields:
        return
    known: dict[str, Any] = {"model": "tiny-long", "messages": messages(), "stream": stream} | fields
    with pytest.raises(openai.APIStatusError) as error:
        client.chat.completions.create(**known)
    body: Any = error.value.body
    assert error.value.status_code == status
    assert says in body["message"]
    assert body["type"] == "invalid_request_error"
    assert body["param"] in (None, *fields, *fields.get("extra_body", {}), "top_logprobs")
    assert "Traceback" not in body["message"]
    assert str(CLIPS.parent) not in body["message"]


def test_what_does_not_stop_an_answer_is_told(client):
    known = ask(client, QUESTION).usage.model_extra["fastav"]["warnings"]
    unknown = ask(client, "does the wombat move?").usage.model_extra["fastav"]["warnings"]
    assert known == []
    assert len(unknown) == 1
    assert "'wombat'" in unknown[0]


def test_fields_about_the_client_change_nothing(server, client):
    harmless: dict[str, Any] = {
        "user": "me",
        "metadata": {"a": "b"},
        "store": False,
        "response_format": {"type": "text"},
    }
    assert ask(client, **harmless).choices[0].message.content == server.pipe(CLIP, QUESTION, **greedy_settings()).text


# --- what docs/serve.md shows


@pytest.fixture
def blocks(server, tmp_path, monkeypatch):
    shutil.copy(CLIP, tmp_path / "clip.mp4")
    monkeypatch.chdir(tmp_path)
    found = {block.language: block.code for block in pages.blocks("docs/serve.md") if "against a server" in block.mark}
    (body,) = [block.code for block in pages.blocks("docs/serve.md") if "sends it to a server" in block.mark]
    (tmp_path / "request.json").write_text(body)
    return {language: code.replace("http://127.0.0.1:8000", server.url) for language, code in found.items()}


def test_the_code_of_the_page_runs(server, blocks, capsys):
    exec(blocks["python"], {})
    printed = capsys.readouterr().out
    assert printed.partition("\n")[0] == server.pipe(CLIP, QUESTION, plan="fastav-plus").text
    assert "CompletionUsage" in printed


@pytest.mark.skipif(shutil.which("curl") is None, reason="curl is not installed")
def test_the_curl_lines_of_the_page_run(server, blocks):
    done = subprocess.run(
        ["bash", "-e", "-c", blocks["bash"].replace("curl ", "curl -sS --fail-with-body -w '\\n' ")],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "no_proxy": "127.0.0.1"},
    )
    upload, response = map(json.loads, done.stdout.splitlines())
    assert upload["filename"] == "clip.mp4"
    assert (
        response["choices"][0]["message"]["content"] == server.pipe(CLIP, "which color moves?", plan="fastav-plus").text
    )
