"""What happens around a pruned request: preemption, abortion, several answers, refusals, servers and their clients."""

import base64
import json
import os
import re
import socket
import struct
import subprocess
import sys
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from importlib.metadata import requires

import pytest
from harness import RATE, RUNNER, TOLERANCE, Question, agree, ask, difference, generated, plan_of, sampling, sound
from packaging.requirements import Requirement
from test_vllm_exact import GLOBAL, QUESTIONS
from vllm.config import VllmConfig
from vllm.exceptions import VLLMValidationError
from vllm.model_executor.models.config import MODELS_CONFIG_MAP
from vllm.multimodal.media import MediaConnector
from vllm.v1.engine.input_processor import InputProcessor
from vllm.v1.metrics.loggers import LoggingStatLogger

from fastav.budgets import Share
from fastav.engines.vllm import guards, register
from fastav.engines.vllm.plugin.errors import explain_fetching
from fastav.engines.vllm.plugin.requests import plan_cache
from fastav.engines.vllm.plugin.worker import PruningWorker
from fastav.errors import FastAVError, PlanError, PlanNotApplied
from fastav.plan import Keep, Plan, Step
from vllm import LLM


def preempted(llm):
    return sum(metric.value for metric in llm.get_metrics() if metric.name == "vllm:num_preemptions")


@pytest.mark.parametrize(("plan", "room"), [("fastav", 12), (GLOBAL["strided"], 9)])
def test_a_preempted_request_goes_on_exactly(omni, engines, plan, room, steps):
    questions = [Question(text=q.text, video=q.video, audio=q.audio, new=40) for q in QUESTIONS[:4]]
    blocks = room * 32 * 8 * 512  # of 32 tokens, in 8 layers, of 512 bytes: too few for all
    options = {"block_size": 32, "kv_cache_memory_bytes": blocks, "disable_log_stats": False}
    llm = engines(omni.folder, plan, enable_chunked_prefill=False, **options)
    answers = ask(llm, questions)
    assert preempted(llm) > 0
    for answer, question in zip(answers, questions, strict=True):
        assert difference(answer, omni(question, plan_of(plan, omni))) < TOLERANCE
    begun = [tokens for step in steps for computed, tokens, cut in step if cut and not computed]
    assert set(begun) - {answer.prompt_len for answer in answers}, "a prompt ran again with what was answered"


def test_aborted_requests_leave_the_others_exact(omni, engines):
    engine, answers = engines(omni.folder, "fastav").llm_engine, {}
    for at, question in enumerate(QUESTIONS):
        engine.add_request(str(at), question.for_vllm(), sampling(question.new))
    for step in range(100):
        answers |= {output.request_id: output for output in engine.step() if output.finished}
        if step == 2:
            engine.abort_request(["0", "3"])
        if not engine.has_unfinished_requests():
            break
    engine.add_request("3", QUESTIONS[0].for_vllm(), sampling(QUESTIONS[0].new))  # the same name again
    while engine.has_unfinished_requests():
        answers |= {output.request_id: output for output in engine.step() if output.finished}
    chosen = plan_of("fastav", omni)
    for at in (1, 2, 4, 5, 6):
        assert difference(generated(answers[str(at)]), omni(QUESTIONS[at], chosen)) < TOLERANCE
    assert difference(generated(answers["3"]), omni(QUESTIONS[0], chosen)) < TOLERANCE


def test_a_video_that_comes_again_is_exact(omni, engines):
    for _ in range(2):  # by a plan that looks at frames, which only the video's grid tells
        agree(engines(omni.folder, "fastav"), omni, "fastav-plus", [QUESTIONS[3]])


@pytest.mark.parametrize(
    "version",
    ["0.31.0", "0.32.1", "0.32.0rc1", "0.32.1+cpu", "0.32.0.post1", "0.33.1", "0.33.0rc2", "0.34.0+cu130"],
)
def test_another_version_of_vllm_is_refused(omni, monkeypatch, version):
    register()
    monkeypatch.setattr("vllm.__version__", version)
    monkeypatch.delitem(MODELS_CONFIG_MAP, "Qwen2_5OmniModel")  # of another version nothing but configurations is known
    words = rf"prunes inside vLLM 0\.32\.0 or 0\.33\.0, this is {re.escape(version)}.*pip install vllm==0\.32\.0"
    with pytest.raises((FastAVError, ValueError), match=words):
        LLM(str(omni.folder), additional_config={"fastav": {"plan": "fastav"}})


def test_a_plan_that_no_hook_has_read_is_an_error(omni, monkeypatch):
    register()
    monkeypatch.delitem(MODELS_CONFIG_MAP, "Qwen2_5OmniModel")  # as that of a model which came after the plugin
    with pytest.raises(PlanNotApplied, match=r"vLLM did not read .* for Qwen2_5OmniModel"):
        LLM(str(omni.folder), additional_config={"fastav": {"plan": "fastav"}})


def test_names_that_mean_fastav_are_not_passed_over(omni, engines):
    with pytest.raises(PlanError, match='additional_config has the key "FastAV"'):
        LLM(str(omni.folder), additional_config={"FastAV": {"plan": "fastav"}})
    for plan in (None, "fastav"):
        llm = engines(omni.folder, plan)
        with pytest.raises(VLLMValidationError, match='names its plan as "fastav", not as "fast-av"'):
            llm.generate([QUESTIONS[1].for_vllm()], sampling(2, extra_args={"fast-av": "none"}), use_tqdm=False)


@pytest.mark.parametrize("version", ["0.32.0", "0.32.0+cpu", "0.32.0+cu130", "0.33.0", "0.33.0+cpu"])
def test_what_was_checked_is_taken_whatever_it_was_built_for(monkeypatch, version):
    from fastav.engines.vllm import compat

    monkeypatch.setattr("vllm.__version__", version)
    compat.require_version()


def test_the_extra_names_the_version_that_is_taken():
    from fastav.engines.vllm import compat

    wanted = [line for line in requires("fastav") if "extra == 'vllm'" in line.replace('"', "'")]
    assert [line.partition(";")[0].strip() for line in wanted] == [f"vllm=={compat.INSTALLED}"]


def test_the_extra_takes_no_release_that_was_not_checked():
    (wanted,) = [Requirement(line) for line in requires("fastav") if "extra == 'vllm'" in line.replace('"', "'")]
    assert "0.32.0+cu130" in wanted.specifier
    for version in ("0.31.9", "0.32.0rc1", "0.32.0.post1", "0.32.1", "0.32.2", "0.33.0"):
        assert not wanted.specifier.contains(version, prereleases=True)


@pytest.mark.parametrize("flag", ["worker_cls", "scheduler_cls"])
def test_our_classes_without_a_plan_are_refused(omni, flag):
    named = {"worker_cls": guards.WORKER, "scheduler_cls": guards.SCHEDULER}[flag]
    words = f"--{flag.replace('_', '-')} is fastav's, but no plan is configured.*--additional-config"
    with pytest.raises((FastAVError, ValueError), match=words):
        LLM(str(omni.folder), **{flag: named})


def test_without_the_plugin_our_classes_do_not_run(monkeypatch):
    monkeypatch.delattr(VllmConfig, "_fastav")
    for start in (PruningWorker, lambda: plan_cache(None)):  # the scheduler begins with the latter
        with pytest.raises(FastAVError, match=r"has not loaded the plugin fastav.*VLLM_PLUGINS must be unset"):
            start()


def test_installing_again_changes_nothing():
    def hooked():
        processor = InputProcessor.__init__, InputProcessor.process_inputs, InputProcessor.resolve_watermarking
        fetching = MediaConnector.load_from_url, MediaConnector.load_from_url_async
        return dict(MODELS_CONFIG_MAP), processor, fetching, LoggingStatLogger.log

    register()
    explain_fetching()
    before = hooked()
    register()
    explain_fetching()
    assert hooked() == before


def test_several_answers_are_alike_and_prompt_logprobs_refused(omni, engines):
    llm = engines(omni.folder, "fastav")
    likeliest = sampling(5, n=3, temperature=1.0, top_k=1)  # of one token to draw from each time
    (output,) = llm.generate([QUESTIONS[0].for_vllm()], likeliest, use_tqdm=False)
    _, tokens, _ = omni(QUESTIONS[0], plan_of("fastav", omni))
    assert [list(answer.token_ids) for answer in output.outputs] == [tokens[:5]] * 3
    with pytest.raises(VLLMValidationError, match="prompt_logprobs needs logits of tokens that fastav drops"):
        llm.generate([QUESTIONS[0].for_vllm()], sampling(5, prompt_logprobs=1), use_tqdm=False)
    agree(llm, omni, "fastav", [QUESTIONS[1]])


def test_a_compiled_decoder_is_exact(omni, engines, monkeypatch):
    from fastav.engines.vllm.plugin.decoder import DecoderPruner

    run, beside = DecoderPruner._run_uncut, []
    monkeypatch.setattr(DecoderPruner, "_run_uncut", lambda *args: beside.append(1) or run(*args))
    with engines.own(omni.folder, "fastav", enforce_eager=False) as llm:
        agree(llm, omni, "fastav", QUESTIONS)
        assert beside, "answers that go on beside prompts"
        beside.clear()
        agree(llm, omni, "none", QUESTIONS)
        assert not beside


CACHE = Plan((Step(layers="5", method="position", keep=Keep(media=Share(0.5)), cache_only=True),))


@pytest.mark.parametrize(
    ("plan", "options", "words"),
    [
        ("fastav", {"video_pruning_rate": 0.5}, "vLLM's own video pruning"),
        ("fastav", {"enable_lora": True, "enable_tower_connector_lora": True}, "LoRA of encoders"),
        ("fastav", {"enable_lora": True, "tensor_parallel_size": 2}, "LoRA with tensor parallelism"),
        ("fastav", {"pipeline_parallel_size": 2}, "pipeline parallelism of 2"),
        ("fastav", {"speculative_config": {"method": "ngram", "num_speculative_tokens": 2}}, "speculative decoding"),
        ("fastaw", {}, "did you mean"),
        (CACHE, {}, "leave cache_only out"),
    ],
)
def test_what_cannot_be_exact_is_refused_at_start(omni, engines, plan, options, words):
    with pytest.raises((FastAVError, ValueError), match=words), engines.own(omni.folder, plan, **options):
        pass


def test_a_server_prunes_for_concurrent_clients(omni, tmp_path):
    questions = [
        ("one", sound(2, 1)),
        ("two, longer than one", sound(3, 2)),
        ("three", sound(1, 3)),
        ("only text", None),
    ]
    with server(omni.folder, "fastav", tmp_path / "log") as url:
        answers = at_once(url, [*questions, questions[0]])
        streamed = post(url, body(*questions[1]) | {"stream": True})
        unpruned = json.loads(post(url, body(*questions[1]) | {"vllm_xargs": {"fastav": "none"}}))
        with pytest.raises(urllib.error.HTTPError) as refused:
            post(url, body(*questions[1]) | {"vllm_xargs": {"fastav": "fastaw"}})
        assert refused.value.code == 400
        assert "did you mean 'fastav'" in refused.value.read().decode()
        assert at_once(url, [questions[0]]) == answers[:1]
    words = [json.loads(line[6:]) for line in streamed.splitlines() if line.startswith("data: {")]
    chosen = plan_of("fastav", omni)
    for (text, wave), answer in zip(questions, answers, strict=False):
        marks = [] if wave is None else [{"type": "audio"}]
        turns = [{"role": "user", "content": [*marks, {"type": "text", "text": text}]}]
        shown = omni.processor.apply_chat_template(turns, add_generation_prompt=True, tokenize=False)
        _, tokens, _ = omni(question := Question(text=shown, audio=wave, new=8), chosen)
        assert answer == tokens
        if text == questions[1][0]:
            assert unpruned["choices"][0]["token_ids"] == omni(question, Plan())[1]
    assert answers[4] == answers[0]
    assert [t for word in words for choice in word["choices"] for t in choice.get("token_ids") or []] == answers[1]


@contextmanager
def server(folder, plan, log, *more):
    """The URL of vLLM's own server, in processes of its own.  more: of its command line."""
    port = free_port()
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(folder)]
    command += ["--served-model-name", "omni", "--host", "127.0.0.1", "--port", str(port), "--dtype", "float32"]
    command += ["--enforce-eager", "--max-model-len", "256", "--kv-cache-memory-bytes", str(64 << 20)]
    command += ["--skip-mm-profiling", "--additional-config", json.dumps({"fastav": {"plan": plan}}), *more]
    env = {name: value for name, value in os.environ.items() if name != "VLLM_ENABLE_V1_MULTIPROCESSING"}
    with log.open("w") as out, subprocess.Popen(command, stdout=out, stderr=out, env=env) as process:
        try:
            wait_for(url := f"http://127.0.0.1:{port}", process, log)
            assert ("Using V2 Model Runner" in log.read_text()) == (RUNNER == "V2")
            yield url
        finally:
            process.terminate()


def free_port():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def wait_for(url, process, log):
    for _ in range(300):
        try:
            urllib.request.urlopen(f"{url}/health", timeout=2)
            return
        except OSError:
            assert process.poll() is None, log.read_text()[-3000:]
            time.sleep(1)
    raise AssertionError(log.read_text()[-3000:])


def body(text, wave):
    parts = [{"type": "text", "text": text}]
    if wave is not None:
        parts.insert(
            0, {"type": "input_audio", "input_audio": {"data": base64.b64encode(wav(wave)).decode(), "format": "wav"}}
        )
    greedy = {"max_tokens": 8, "temperature": 0, "ignore_eos": True, "return_token_ids": True}
    return {"model": "omni", "messages": [{"role": "user", "content": parts}], **greedy}


def wav(wave_form):
    """As a file of 32-bit floats, which loses nothing."""
    data = wave_form.astype("<f4").tobytes()
    head = struct.pack(
        "<4sI4s4sIHHIIHH4sI",
        b"RIFF",
        36 + len(data),
        b"WAVE",
        b"fmt ",
        16,
        3,
        1,
        RATE,
        RATE * 4,
        4,
        32,
        b"data",
        len(data),
    )
    return head + data


def post(url, body):
    request = urllib.request.Request(
        f"{url}/v1/chat/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=120) as answer:
        return answer.read().decode()


def at_once(url, questions):
    with ThreadPoolExecutor(len(questions)) as pool:
        answers = pool.map(lambda question: json.loads(post(url, body(*question))), questions)
        return [answer["choices"][0]["token_ids"] for answer in answers]


TOO_MUCH = [
    ({"fastav": "x" * 20_000}, "may have 16,384 characters"),
    ({"fastav": Plan((Step(layers="2", method="window", keep=Keep(media=Share(0.5))),) * 40).to_json()}, "32 steps"),
    (
        {
            "fastav": Plan(
                (Step(layers="2", method="window", keep=Keep(media=Share(0.5)), options={"pool": 2**31 + 1}),)
            ).to_json()
        },
        "options up to 1,024",
    ),
]


@pytest.mark.parametrize(("extra_args", "words"), TOO_MUCH)
def test_plans_that_others_would_wait_for_are_refused(omni, extra_args, words):
    from fastav.engines.vllm.guards import PruningConfig
    from fastav.engines.vllm.plugin.request_state import PlanCache

    pruning = PruningConfig(plan=Plan(), adapter=omni.adapter, config=omni.model.config)
    plans = PlanCache(pruning)
    with pytest.raises(PlanError, match=words):
        plans.get(extra_args["fastav"])


def test_what_others_would_suffer_from_is_refused_or_mended(omni, engines):
    from vllm.sampling_params import BeamSearchParams

    question = QUESTIONS[0]
    tight = {"enable_chunked_prefill": False, "long_prefill_token_threshold": 32, "max_num_scheduled_tokens": 64}
    llm = engines(omni.folder, "fastav", **tight)
    agree(llm, omni, "fastav", QUESTIONS[:3])
    with pytest.raises(VLLMValidationError, match="beam search sends a new prompt"):
        llm.beam_search([question.for_vllm()], BeamSearchParams(beam_width=2, max_tokens=3))
    grown = llm.llm_engine.input_processor
    with pytest.raises(VLLMValidationError, match="streamed input"):
        grown.process_inputs("x", question.for_vllm(), sampling(2), ("generate",), resumable=True)
    llm = engines(omni.folder, None)
    assert len(llm.beam_search([{"prompt": "hi"}], BeamSearchParams(beam_width=2, max_tokens=3))) == 1
