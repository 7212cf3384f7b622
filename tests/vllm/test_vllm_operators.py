"""What operators see of a server: it starts with its plugin or not at all, counts what plans keep, limits clients."""

import base64
import json
import os
import re
import subprocess
import sys
import time
import urllib.request
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import openai
import pytest
from prometheus_client.mmap_dict import MmapedDict
from prometheus_client.parser import text_string_to_metric_families
from test_vllm_serving import free_port, wait_for

import fastav
from fastav.engines.vllm import guards

TOY = Path(fastav.__file__).parent / "assets" / "clips"
SMALL = ["--dtype", "float32", "--enforce-eager", "--kv-cache-memory-bytes", str(64 << 20), "--skip-mm-profiling"]
QUESTION = "which color moves?"


def serve_config(*options, model="tiny"):
    """The command that `fastav serve-config` prints, and its environment."""
    arguments = ["serve-config", model, "--device", "cpu", "--max-model-len", "256", *options, "--json"]
    done = subprocess.run(
        [sys.executable, "-m", "fastav", *arguments], capture_output=True, text=True, check=True, timeout=120
    )
    printed = json.loads(done.stdout)
    assert printed["command"][0] == "python"
    return [sys.executable, *printed["command"][1:]], printed["environment"]


def start(command, environment, log, *more):
    port = free_port()
    words = [*command, "--served-model-name", "tiny", "--host", "127.0.0.1", "--port", str(port), *SMALL, *more]
    kept = {name: value for name, value in os.environ.items() if name != "VLLM_ENABLE_V1_MULTIPROCESSING"}
    with log.open("w") as out:
        return subprocess.Popen(words, stdout=out, stderr=out, env=kept | environment), f"http://127.0.0.1:{port}"


@contextmanager
def serving(command, environment, log, *more):
    process, url = start(command, environment, log, *more)
    with process:
        try:
            wait_for(url, process, log)
            yield url
        finally:
            process.terminate()


def clip(name="triangle.mp4"):
    data = base64.b64encode((TOY / name).read_bytes()).decode()
    return {"type": "video_url", "video_url": {"url": f"data:video/mp4;base64,{data}"}}


def turn(*parts):
    return [{"role": "user", "content": [*parts, {"type": "text", "text": QUESTION}]}]


@pytest.fixture(scope="module")
def log(tmp_path_factory):
    return tmp_path_factory.mktemp("server") / "log"


@pytest.fixture(scope="module")
def url(log):
    command, environment = serve_config("--requests", "fastav,fastav-plus,none")
    often = {"VLLM_LOG_STATS_INTERVAL": "1"}
    with serving(command, environment | often, log, "--enable-mfu-metrics") as url:
        yield url


@pytest.fixture(scope="module")
def ask(url):
    client = openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)

    def ask(*parts, plan=None, **options):
        named = {} if plan is None else {"extra_body": {"vllm_xargs": {"fastav": plan}}}
        options = {"temperature": 0, "max_tokens": 8} | named | options
        return client.chat.completions.create(model="tiny", messages=turn(*parts), **options)

    return ask


@pytest.fixture(scope="module")
def expected():
    """What the transformers engine says of a clip under a plan."""
    pipe = fastav.pipeline("tiny")
    return lambda name, plan: pipe(TOY / name, QUESTION, plan=plan, max_new_tokens=8)


def metrics(url):
    """fastav's counters: by name and labels, without the model's name."""
    with urllib.request.urlopen(f"{url}/metrics", timeout=30) as response:
        families = text_string_to_metric_families(response.read().decode())
    return Counter(
        {
            (
                sample.name,
                *(value for label, value in sorted(sample.labels.items()) if label != "model_name"),
            ): sample.value
            for family in families
            for sample in family.samples
            if sample.name.startswith("fastav_") and sample.name.endswith("_total")
        }
    )


def require_usage(usage, answer):
    """The usage of a response is that of an answer of the transformers engine."""
    assert usage["plan"] == answer.plan
    assert usage["prompt_tokens"] == dict(answer.prompt_tokens)
    assert usage["tokens_per_layer"] == [dict(layer) for layer in answer.tokens_per_layer] or "media" in str(usage)
    totals = [sum(layer.values()) for layer in answer.tokens_per_layer]
    assert [sum(layer.values()) for layer in usage["tokens_per_layer"]] == totals
    assert usage["flops"] == answer.flops.to_dict()
    assert usage["kv_bytes"] == answer.kv_bytes.to_dict()
    assert usage["kv_blocks"]["pruned"] <= usage["kv_blocks"]["full"]


@pytest.mark.parametrize("plan", [None, "fastav-plus", "none"])
def test_the_usage_of_a_response_says_what_the_plan_kept(ask, expected, plan):
    answer = expected("triangle.mp4", plan or "fastav")
    for _ in range(2):  # the second time vLLM has the clip's features in its cache
        response = ask(clip(), plan=plan)
        assert response.choices[0].message.content.strip() == answer.text
        require_usage(response.usage.fastav, answer)
    assert (response.usage.fastav["flops"]["ratio"] == 1) is (plan == "none")


def test_so_does_the_last_chunk_of_a_stream_that_asks_for_it(ask, expected):
    chunks = list(ask(clip("knock.mp4"), stream=True, stream_options={"include_usage": True}))
    assert [chunk.usage is None for chunk in chunks] == [True] * (len(chunks) - 1) + [False]
    require_usage(chunks[-1].usage.fastav, expected("knock.mp4", "fastav"))
    answer = expected("knock.mp4", "fastav")
    assert "".join(c.choices[0].delta.content or "" for c in chunks[:-1]).strip() == answer.text
    chunks = list(ask(clip("knock.mp4"), stream=True))
    assert all(chunk.usage is None for chunk in chunks)


def test_concurrent_responses_have_usages_of_their_own(ask, expected):
    asked = [("triangle.mp4", "fastav"), ("knock.mp4", "none"), ("mismatch.mp4", "fastav-plus")] * 3
    with ThreadPoolExecutor(len(asked)) as pool:
        responses = list(pool.map(lambda pair: ask(clip(pair[0]), plan=pair[1]), asked))
    for pair, response in zip(asked, responses, strict=True):
        require_usage(response.usage.fastav, expected(*pair))


def test_counters_count_what_was_kept(url, ask):
    before = metrics(url)
    usages = [ask(clip(), plan=plan).usage.fastav for plan in (None, None, "none")]
    three = ask(clip(), n=3, temperature=1).usage.fastav  # each answer has a prefill of its own
    counted = metrics(url) - before
    assert counted["fastav_requests_total", "fastav"] == 3
    assert counted["fastav_requests_total", "none"] == 1
    pruned = [usages[0], usages[1], three, three, three]
    for kind, tokens in three["prompt_tokens"].items():
        assert counted["fastav_prompt_tokens_total", kind, "fastav"] == 5 * tokens
    for kind, tokens in three["tokens_per_layer"][-1].items():
        assert counted["fastav_kept_tokens_total", kind, "fastav"] == 5 * tokens
    for name, key in (("prefill_flops", "flops"), ("kv_bytes", "kv_bytes"), ("kv_blocks", "kv_blocks")):
        for part in ("full", "pruned"):
            assert counted[f"fastav_{name}_total", "fastav", part] == sum(usage[key][part] for usage in pruned)
            assert counted[f"fastav_{name}_total", "none", part] == usages[2][key]["full"]
    layers = sum(sum(layer.values()) for layer in three["tokens_per_layer"])
    assert counted["fastav_layer_tokens_total", "fastav", "pruned"] == 5 * layers


def test_refused_requests_are_counted_by_reason(url, ask):
    before = metrics(url)
    for plan, words in (
        ("nonsense", "does not let requests choose 'nonsense'"),
        ("fastv@0.25", "it takes fastav, fastav-plus, none"),
        (json.dumps({"fastav_plan": 1, "name": "x", "steps": []}), "does not let requests choose a plan's JSON"),
    ):
        with pytest.raises(openai.BadRequestError, match=words):
            ask(clip(), plan=plan)
    with pytest.raises(openai.BadRequestError, match="prompt_logprobs needs logits"):
        ask(clip(), extra_body={"prompt_logprobs": 1})
    counted = metrics(url) - before
    assert counted == {("fastav_refused_requests_total", "plan"): 3, ("fastav_refused_requests_total", "setting"): 1}


def test_a_line_in_the_log_says_what_was_kept(ask, log):
    lines = len(re.findall("fastav: .* prompts in", log.read_text()))
    usage = ask(clip()).usage.fastav
    for _ in range(20):
        time.sleep(0.5)
        if len(found := re.findall(r"fastav: .* prompts? in .*", log.read_text())) > lines:
            break
    share = f"FLOPs of prefills: {usage['flops']['ratio']:.0%} of unpruned"
    assert "1 prompts in" in found[-1] or "1 prompt in" in found[-1]
    assert share in found[-1]
    time.sleep(2.5)
    assert len(re.findall(r"fastav: .* prompts? in .*", log.read_text())) == len(found), "nothing came since"


UNREACHABLE = "http://127.0.0.1:9/clip.mp4"


@pytest.mark.parametrize(
    ("part", "words"),
    [
        ({"type": "input_audio", "input_audio": {}}, "input_audio must be an object with data and format"),
        ({"type": "input_audio", "input_audio": "x"}, "input_audio must be an object with data and format"),
        ({"type": "input_audio"}, "input_audio must be an object with data and format"),
        ({"type": "audio_url", "audio_url": "x"}, "audio_url must be an object with url"),
        ({"type": "video_url", "video_url": {"url": UNREACHABLE}}, "must be from one of the allowed domains"),
        ({"type": "video_url", "video_url": {"url": "file:///etc/hostname"}}, "reads no files of its own"),
        ({"type": "audio_url", "audio_url": {"url": "file:///etc/hostname"}}, "reads no files of its own"),
    ],
)
def test_media_that_only_the_client_can_mend_are_its_errors(ask, part, words):
    with pytest.raises(openai.BadRequestError, match=words):
        ask(part)


@pytest.mark.parametrize("kind", ["json_object", "json_schema"])
def test_json_of_a_model_that_cannot_write_it_is_refused(ask, kind):
    schema = {"json_schema": {"name": "x", "schema": {"type": "object"}}} if kind == "json_schema" else {}
    with pytest.raises(openai.BadRequestError, match="this model cannot write JSON: its vocabulary has no"):
        ask(clip(), response_format={"type": kind, **schema})
    assert ask(clip(), response_format={"type": "text"}).choices[0].message.content


def test_hosts_and_files_that_cannot_be_read_are_the_clients_errors(tmp_path):
    (tmp_path / "folder").mkdir()
    command, environment = serve_config("--allow-domains", "127.0.0.1", "--media-root", str(tmp_path))
    with serving(command, environment, tmp_path / "log") as url:
        client = openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)
        for address, words in (
            (UNREACHABLE, r"http://127\.0\.0\.1:9/clip\.mp4 cannot be read"),
            (f"file://{tmp_path}/missing.mp4", "cannot be read.*No such file"),
            (f"file://{tmp_path}/folder", "cannot be read.*directory"),
            ("file:///etc/hostname", "must be a subpath"),
            ("http://localhost/x.mp4", "must be from one of the allowed domains"),
        ):
            part = {"type": "video_url", "video_url": {"url": address}}
            with pytest.raises(openai.BadRequestError, match=words):
                client.chat.completions.create(model="tiny", messages=turn(part), max_tokens=2)

        def ask(spec):
            named = {"vllm_xargs": {"fastav": spec}}
            return client.chat.completions.create(model="tiny", messages=turn(), max_tokens=2, extra_body=named)

        assert ask("fastv@0.25").usage.fastav["plan"] == "fastv@0.25"
        with pytest.raises(openai.BadRequestError, match="takes plans of requests by name, not as JSON"):
            ask(json.dumps({"steps": []}))


def requests_in(file):
    """The numbers of requests by plan that one process has counted."""
    entries = MmapedDict.read_all_values_from_file(str(file))
    return [value for key, value, *_ in entries if json.loads(key)[1] == "fastav_requests_total" and value]


def test_counters_of_several_processes_are_added(tmp_path):
    command, environment = serve_config()
    command = [sys.executable, str(Path(__file__).with_name("several_servers.py")), *command[3:]]
    (tmp_path / "numbers").mkdir()
    environment |= {"PROMETHEUS_MULTIPROC_DIR": str(tmp_path / "numbers")}
    with serving(command, environment, tmp_path / "log", "--api-server-count", "2") as url:
        before = metrics(url)

        def ask(plan):
            named = {"model": "tiny", "messages": turn(clip()), "vllm_xargs": {"fastav": plan}, "max_tokens": 2}
            request = urllib.request.Request(
                f"{url}/v1/chat/completions", json.dumps(named).encode(), {"Content-Type": "application/json"}
            )
            with urllib.request.urlopen(request, timeout=120) as response:  # a connection of its own
                return json.loads(response.read())["usage"]["fastav"]

        plans = ["fastav", "none", "fastav-plus"] * 8
        with ThreadPoolExecutor(4) as pool:
            usages = list(pool.map(ask, plans))
        counted = metrics(url) - before
    per_process = [requests_in(file) for file in (tmp_path / "numbers").glob("counter_*.db")]
    assert len([values for values in per_process if values]) == 2, "both processes took some"
    assert sum(map(sum, per_process)) == len(plans)
    for plan in set(plans):
        own = [usage for usage in usages if usage["plan"] == plan]
        assert counted["fastav_requests_total", plan] == 8
        assert counted["fastav_kv_blocks_total", plan, "pruned"] == sum(usage["kv_blocks"]["pruned"] for usage in own)
        assert counted["fastav_prefill_flops_total", plan, "pruned"] == sum(usage["flops"]["pruned"] for usage in own)


NAMED = {"--worker-cls": guards.WORKER, "--scheduler-cls": guards.SCHEDULER, "--middleware": guards.MIDDLEWARE}


@pytest.mark.parametrize("flag", [None, *(pytest.param(flag, marks=pytest.mark.slow) for flag in NAMED)])
def test_without_the_plugin_the_command_does_not_start(sight, tmp_path, flag):
    """The whole command, and each of the flags that name a class of ours alone."""
    command, environment = serve_config(model=str(sight.folder))
    if flag is not None:
        command = [*command[: command.index("--additional-config") + 2], flag, NAMED[flag]]
    log = tmp_path / "log"
    process, url = start(command, environment | {"VLLM_PLUGINS": "other"}, log)
    with process:
        try:
            assert process.wait(timeout=240) != 0
        finally:
            process.kill()
    with pytest.raises(OSError, match="refused"):
        urllib.request.urlopen(f"{url}/health", timeout=5)
    assert "vLLM has not loaded the plugin fastav, so it would not prune" in log.read_text()
