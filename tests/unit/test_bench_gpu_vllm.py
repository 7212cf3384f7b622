"""The benchmark of vLLM on a GPU, as far as it needs neither: its options, its time, its comparisons, its models."""

import json
import time
from dataclasses import asdict
from importlib.util import find_spec
from itertools import pairwise

import pytest
import torch
from benchmarks.gpu_vllm import __main__ as command
from benchmarks.gpu_vllm import exactness, shapes
from benchmarks.gpu_vllm.answers import PROMPTS, Answer, Question, request
from benchmarks.gpu_vllm.exactness import Comparison, SpotChecks, compare
from benchmarks.load import checkpoints
from benchmarks.load.contenders import ServedModel, contenders, server_flags
from benchmarks.load.load_test import WARMUP_NUMBER, Bounds, LoadTest, divided
from benchmarks.load.questions import QuestionSet
from safetensors.torch import load_file

import fastav
from fastav.errors import FastAVError
from fastav.models.qwen2_5_omni import Qwen25OmniAdapter
from fastav.presets import plus
from fastav.registry import MODELS

PLANS = {"fastav": MODELS["qwen2-5-omni"]().preset("fastav"), "fastav-plus@0.25": command.PLUS}


def test_without_vllm_or_a_gpu_it_says_what_to_do(monkeypatch, capsys):
    monkeypatch.setattr(command, "find_spec", lambda name: None)
    assert command.main([]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("benchmarks.gpu_vllm: vLLM is not installed in this environment (pip install '.[vllm]'")
    assert "vllm==0.32.0" in line

    monkeypatch.setattr(command, "find_spec", lambda name: find_spec("json"))
    monkeypatch.setattr(command, "entry_points", lambda **_: [])
    monkeypatch.setattr(command, "version", lambda name: "0.31.0")
    with pytest.raises(FastAVError, match=r"vLLM 0\.32\.0 or 0\.33\.0, not 0\.31\.0"):
        command.require_environment("small", "cpu")
    monkeypatch.setattr(command, "version", lambda name: "0.32.0+cu130")
    with pytest.raises(FastAVError, match="would not find fastav's plugin"):
        command.require_environment("small", "cpu")
    monkeypatch.undo()

    monkeypatch.setattr(command, "find_spec", lambda name: find_spec("json"))
    monkeypatch.setattr(command, "version", lambda name: "0.32.0")
    with pytest.raises(FastAVError, match="torch sees no GPU, which qwen2-5-omni-7b needs"):
        command.require_environment("qwen2-5-omni-7b", "cpu")
    command.require_environment("small", "cpu")
    command.require_environment("qwen2-5-omni-7b", "cuda")


@pytest.mark.parametrize("given", [["--minutes", "0"], ["--minutes", "x"], ["--shape", "7b"], ["--new-tokens", "-1"]])
def test_options_that_make_no_sense_are_refused(given, capsys):
    with pytest.raises(SystemExit, match="2"):
        command.main(given)
    assert given[0] in capsys.readouterr().err


def test_the_quarter_is_the_preset_with_another_share():
    (half,), (quarter,) = plus().steps, command.PLUS.steps
    assert (half.layers, half.method) == (quarter.layers, quarter.method)
    assert {budget["share"] for budget in quarter.to_dict()["keep"].values()} == {0.25}


def test_servers_have_vllms_defaults():
    model = ServedModel.of("qwen2-5-omni-7b", "qwen2-5-omni")
    common = command._common_flags(model, "cuda")
    assert common["--dtype"] == "bfloat16"
    for one in contenders(model, ("off", "fastav"), gpu=True):
        flags = " ".join(server_flags(model, one, common, command.MAX_MODEL_LEN))
        for own in ("chunked", "prefix", "eager", "batched", "cache-memory", "cudagraph"):
            assert own not in flags
    assert "--enforce-eager" in command._common_flags(model, "cpu")
    assert command.dtypes("small", "cpu") == ("float32", "float32")


def test_time_is_divided_among_what_is_left():
    assert divided(10, 40, 3) == 10
    assert divided(40, 40, 3) == divided(50, 40, 3) == 0


def timed(seconds, levels=(1, 4), start=1.0):
    return Bounds(levels=levels, rounds=1, least=1, each=1, new=1, seconds=seconds, start=start, patience=1, timed=True)


def test_levels_of_time_have_questions_of_their_own():
    bounds = timed(1, levels=(1, 4, 16, 32))
    numbers = [bounds.numbers(place) for place in range(4)]
    assert all(len(one) > 10_000 for one in numbers)
    assert all(before.stop <= after.start for before, after in pairwise(numbers))
    assert numbers[-1].stop <= WARMUP_NUMBER
    questions = QuestionSet(MODELS["qwen2-5-omni"](), distinct=True)
    assert {questions.kind(one.start).name for one in numbers} == {questions.kinds[0].name}
    parts = [questions.body(number)["messages"][0]["content"][0] for number in (0, 8)]
    assert parts[0].pop("uuid") != parts[1].pop("uuid")
    assert parts[0] == parts[1], "the same clip"


def test_every_contender_gets_its_share_and_what_has_no_time_is_told(monkeypatch, tmp_path):
    model = ServedModel.of("small", "qwen2-5-omni")
    test = LoadTest(
        model=model,
        contenders=contenders(model, ("off", "fastav"), gpu=False),
        bounds=timed(100, start=100),
        common={},
        max_model_len=512,
        deterministic=False,
        folder=tmp_path,
        output=lambda text: None,
    )
    test.layouts = {}
    ends = []
    monkeypatch.setattr(LoadTest, "_serve", lambda self, one, number, end: ends.append(end - time.monotonic()))
    test.run(lambda results: None)
    assert [round(end) for end in ends] == [50, 100]


EVERY = ("together and alone", "vLLM and transformers", "chunks and whole prompt")


def answer(*steps, tokens=None, **given):
    own = [max(step, key=step.get) for step in steps] if tokens is None else tokens
    return Answer(**{"prompt": "sound", "plan": "none", "length": 9, "cached": 0} | given, tokens=own, logprobs=steps)


def test_answers_are_compared_as_far_as_they_are_alike():
    first, near = {1: -1.0, 2: -2.0}, {1: -1.25, 2: -2.0}
    assert compare(answer(first, first), answer(near, first), 0.5) == (2, 0.25, "")
    tie, turned = {1: -1.0, 2: -1.1}, {1: -1.1, 2: -1.0}
    steps, difference, reason = compare(answer(tie, first), answer(turned, {7: 0.0}), 0.5)
    assert (steps, reason) == (1, "")
    assert difference == pytest.approx(0.1)
    assert compare(answer(first), answer({1: -2.0, 2: -1.0}), 0.1)[2].startswith("step 0 chose token 1, and 2")
    assert compare(answer(first), answer({3: 0.0}), 0.1)[2] == "step 0 has no likely token in common"
    assert compare(answer(first), answer(first, length=8), 0.1)[2] == "the prompt has 9 tokens, and 8"


def test_agreement_tells_nothing_if_unpruned_answers_agree_as_well():
    given = {"check": "chunks", "dtype": "bfloat16", "prompt": "sound", "plan": "fastav", "steps": 8, "bound": 0.5}
    assert Comparison(**given, difference=0.1, apart=3.0).passed
    assert not Comparison(**given, difference=0.1, apart=0.05).passed
    assert not Comparison(**given, difference=0.6, apart=3.0).passed
    assert not Comparison(**given, reason="why").passed
    assert "WRONG" in str(Comparison(**given, reason="why"))
    assert json.loads(json.dumps(Comparison(**given, difference=0.1).to_dict()))["passed"]


def checks(monkeypatch, tmp_path, answers):
    """Checks whose engines give the answers that a function makes of a job's name and a question."""

    def run(name, command, environment, log, *, seconds):
        assert environment["VLLM_ENABLE_V1_MULTIPROCESSING"] == "0"
        assert 0 < seconds <= 60
        job = json.loads((tmp_path / command[-2].rpartition("/")[2]).read_text())
        asked = [Question(**question) for batch in job["batches"] for question in batch]
        kind = name.removeprefix("the engine ")
        made = [asdict(answers(kind, question, place)) for place, question in enumerate(asked)]
        (tmp_path / command[-1].rpartition("/")[2]).write_text(json.dumps(made))
        jobs[kind] = job

    jobs = {}
    monkeypatch.setattr(exactness, "run_to_end", run)
    spot = SpotChecks(
        small=tmp_path / "small",
        large=tmp_path / "large",
        dtypes=("float16", "bfloat16"),
        plans=PLANS,
        early=["fastav-plus@0.25"],
        device="cuda",
        folder=tmp_path,
        end=time.monotonic() + 60,
        output=lambda text: None,
    )
    return spot, jobs


def exact(kind, question, place):
    n = len(PROMPTS) * (2 if kind == "chunks-fastav" else 1)
    likely = -1.0 - list({"none": 0} | PLANS).index(question.plan)
    cached = 64 if kind.startswith("chunks") and place >= n else 0
    return answer({1: likely}, {2: likely}, prompt=question.prompt, plan=question.plan, cached=cached)


def test_every_plan_is_checked_by_every_way(monkeypatch, tmp_path):
    spot, jobs = checks(monkeypatch, tmp_path, exact)
    assert spot.run()
    assert list(jobs) == ["vllm", "transformers", "whole", "chunks-fastav", "chunks-fastav-plus@0.25"]
    assert {(one.check, one.plan) for one in spot.comparisons} == {
        *((check, plan) for check in EVERY for plan in ("none", *PLANS)),
        *(("prefix cache and whole prompt", plan) for plan in ("none", "fastav")),
    }
    assert jobs["transformers"]["settings"] is None
    assert jobs["chunks-fastav"]["settings"]["enforce_eager"] is False
    assert jobs["chunks-fastav"]["settings"]["enable_prefix_caching"] is True
    assert jobs["whole"]["settings"]["enable_chunked_prefill"] is False


@pytest.mark.parametrize(
    ("wrong", "after"), [("transformers", 2), ("chunks-fastav", 4), ("chunks-fastav-plus@0.25", 5)]
)
def test_the_first_difference_ends_the_checks(monkeypatch, tmp_path, wrong, after):
    def answers(kind, question, place):
        made = exact(kind, question, place)
        return made if kind != wrong else Answer(**asdict(made) | {"logprobs": [{1: -9.0}, {2: -9.0}]})

    spot, jobs = checks(monkeypatch, tmp_path, answers)
    assert not spot.run()
    assert len(jobs) == after
    assert any(one.difference > one.bound for one in spot.comparisons if not one.passed)


def test_a_cache_that_is_not_used_is_a_difference(monkeypatch, tmp_path):
    def answers(kind, question, place):
        return Answer(**asdict(exact(kind, question, place)) | {"cached": 0})

    spot, _ = checks(monkeypatch, tmp_path, answers)
    assert not spot.run()
    assert {one.reason for one in spot.comparisons if not one.passed} == {"0 tokens were in the prefix cache"}


def test_prompts_are_the_same_every_time():
    assert [one.kind.name for one in request("clip and sound").media] == ["VIDEO", "AUDIO"]


def test_a_model_is_written_once(monkeypatch, tmp_path):
    written = []
    shape = shapes.Shape(name="some", write=lambda folder, device: written.append(folder), size=1)
    folder = shapes.checkpoint(shape, tmp_path / "cache", torch.device("cpu"))
    assert folder == shapes.checkpoint(shape, tmp_path / "cache", torch.device("cpu"))
    assert len(written) == 1
    assert [one.name for one in (tmp_path / "cache").iterdir()] == ["some-v1"]
    huge = shapes.Shape(name="huge", write=shape.write, size=10**18)
    with pytest.raises(FastAVError, match="GB free, and huge takes"):
        shapes.checkpoint(huge, tmp_path / "cache", torch.device("cpu"))

    def fail(folder, device):
        (folder / "half").touch()
        raise KeyboardInterrupt

    broken = shapes.Shape(name="broken", write=fail, size=1)
    with pytest.raises(KeyboardInterrupt):
        shapes.checkpoint(broken, tmp_path / "cache", torch.device("cpu"))
    assert [one.name for one in (tmp_path / "cache").iterdir()] == ["some-v1"]


def test_the_large_model_is_written_in_files_and_can_be_loaded(monkeypatch, tmp_path):
    config = Qwen25OmniAdapter().config()
    text = {"hidden_size": 128, "num_attention_heads": 2, "num_key_value_heads": 1, "num_hidden_layers": 4}
    sizes = {
        "text_config": {**text, "intermediate_size": 64, "vocab_size": 1000, "layer_types": None},
        "vision_config": {"depth": 1, "hidden_size": 32, "num_heads": 2, "intermediate_size": 64},
        "audio_config": {"encoder_layers": 1, "d_model": 32, "encoder_attention_heads": 2, "encoder_ffn_dim": 32},
    }
    own = config.to_dict()
    for name, values in sizes.items():
        own[name] |= values
    own["text_config"]["rope_parameters"]["mrope_section"] = [8, 12, 12]
    own["vision_config"] |= {"out_hidden_size": 128, "fullatt_block_indexes": [0]}
    own["audio_config"]["output_dim"] = 128
    monkeypatch.setattr(Qwen25OmniAdapter, "config", lambda *_: type(config)(**own))
    monkeypatch.setattr(checkpoints, "FILE_BYTES", 300_000)
    checkpoints.write_omni_7b(tmp_path, torch.device("cpu"))
    files = json.loads((tmp_path / "model.safetensors.index.json").read_text())["weight_map"]
    weights = {}
    for file in set(files.values()):
        weights |= load_file(tmp_path / file)
    assert len(set(files.values())) > 2
    assert {name for name in weights if files[name]} == set(files)
    assert {weight.dtype for weight in weights.values()} == {torch.bfloat16}
    head = weights["thinker.lm_head.weight"]
    assert head.shape == (1000, 128)
    assert head[:200].abs().sum(1).min() > 0
    assert not head[300:].any()
    with fastav.pipeline(str(tmp_path), plan="fastav", dtype="float32", device="cpu") as pipe:
        assert pipe.adapter.name == "qwen2-5-omni"
        (answer,) = pipe.engine.generate([request("silent clip")], pipe.plan, max_new_tokens=4)
    assert len(answer.token_ids) == 4
    assert max(answer.token_ids) < 300
