"""The benchmark measures what it says, on shapes of milliseconds."""

import importlib
import json
import pkgutil
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from benchmarks import rollout

import support.families
from fastav.adapter import adapter_for
from fastav.bench import contenders, limits, measure, plot, probes, report, session, targets, workload
from fastav.bench.contenders import BASELINE, Contender
from fastav.bench.measure import Quartiles
from fastav.bench.session import Session
from fastav.bench.specs import ModelSpec, model_spec, prompt_specs
from fastav.bench.table import SPEED
from fastav.budgets import Share
from fastav.engines.transformers import timing
from fastav.engines.transformers.compiled_layers import compiled, is_compiled
from fastav.errors import FastAVError, PlanError, UnknownName, UnsupportedPlan
from fastav.flops import DecoderShape, kv_bytes, prefill_flops
from fastav.plan import Keep, Plan, Step
from fastav.presets import NONE
from fastav.pruning.rollout import LayerAttention, rollout_row
from fastav.registry import MODELS

CPU = torch.device("cpu")
ROOT = Path(__file__).parents[2]
TINY = model_spec("tiny")
NAMES = [BASELINE, "unpruned", "fastav", "fastv", "pyramiddrop"]
FAMILIES = [module.name for module in pkgutil.iter_modules(support.families.__path__) if module.name[0] != "_"]
WINDOWED = ("gemma3n", "gemma4", "gemma4_bidirectional")


@pytest.fixture(autouse=True)
def _rates(monkeypatch):
    """How fast the machine is takes a while to find out, and is found out once for `measured`."""
    monkeypatch.setattr(limits, "rates", lambda *_: limits.Rates(flops=1e11, bytes=1e10))


def contender(name, *, ours=True, of=TINY):
    plan = NONE if name in (BASELINE, "unpruned", "none") else contenders.plan_named(name, of.adapter)
    return Contender(name=name, plan=plan, attention="sdpa", ours=ours)


@pytest.fixture(scope="module")
def load():
    model = workload.build_model(TINY, CPU, torch.float32)
    return workload.build(model, TINY.adapter, prompt_specs(TINY)[0], batch=2)


@pytest.fixture(scope="module")
def out(tmp_path_factory):
    return tmp_path_factory.mktemp("results")


@pytest.fixture(scope="module")
def measured(out):
    """A report as it was written."""
    asked = Session.of("tiny", batches=[1, 2], rounds=2, new_tokens=3, device="cpu", arguments=["tiny"])
    asked.run(out)
    assert [file.name for file in out.iterdir()] == ["speed-tiny-cpu.json"]
    return json.loads((out / "speed-tiny-cpu.json").read_text())


@torch.inference_mode()
def logits(load, name):
    with load.running(contender(name)):
        return load.model(**load.inputs, logits_to_keep=1).logits


# what runs


def test_a_plan_is_carried_out(load):
    assert not torch.equal(logits(load, "fastav"), logits(load, "none"))


@torch.inference_mode()
def test_media_and_their_embeddings_are_the_same_prompt(load):
    embeds = load.model.model.embed(**load.raw)
    with load.running(contender("none")):
        from_media = load.model(**load.raw, logits_to_keep=1).logits
        assert torch.allclose(from_media, load.model(inputs_embeds=embeds, logits_to_keep=1).logits, atol=1e-5)


@torch.inference_mode()
def test_our_decoding_says_what_transformers_says(load):
    say = load.model.generate
    theirs = say(**load.inputs, max_new_tokens=6, do_sample=False)
    assert torch.equal(theirs, say(**load.inputs, max_new_tokens=6, do_sample=False, custom_generate=load.decoding))
    assert theirs.shape[1] == 6  # nothing ends an answer early


def test_weights_are_made_in_the_dtype_that_is_asked_for():
    model = workload.build_model(TINY, CPU, torch.bfloat16)
    assert {weight.dtype for weight in model.parameters()} == {torch.bfloat16}
    assert sum(weight.nbytes for weight in model.parameters()) == workload.weight_bytes(TINY, torch.bfloat16)
    assert torch.get_default_dtype() is torch.float32


def test_every_round_runs_every_contender_and_the_first_round_is_not_kept():
    order = []
    five = [contender(name) for name in NAMES]
    rounds = measure.interleaved(five, 5, lambda one: order.append(one.name) or len(order))
    assert [len(rounds.results[name]) for name in NAMES] == [5] * 5
    assert {len(set(order[i : i + 5])) for i in range(0, 30, 5)} == {5}
    assert len({order[i] for i in range(5, 30, 5)}) == 5
    assert sorted(rounds.warmup.values()) == [1, 2, 3, 4, 5]
    assert not rounds.failed


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA out of memory. Tried"), MemoryError()])
def test_who_lacks_memory_is_out_and_the_others_go_on(error):
    def work(one):
        if one.name == "fastv":
            raise error
        return 1

    rounds = measure.interleaved([contender(name) for name in NAMES], 2, work)
    assert rounds.failed == {"fastv": "out of memory"}
    assert set(rounds.results) == set(NAMES) - {"fastv"}


def test_any_other_error_is_ours_to_see():
    with pytest.raises(RuntimeError, match="shapes differ"):
        measure.interleaved([contender("none")], 1, lambda _: (_ for _ in ()).throw(RuntimeError("shapes differ")))


def test_ratios_are_taken_within_a_round():
    assert Quartiles.of_ratios([1.0, 20.0, 3.0], over=[2.0, 40.0, 6.0]) == Quartiles(median=0.5, low=0.5, high=0.5)


def test_decoding_leaves_the_prefill_out(load, monkeypatch):
    """Of a clock that ticks once for every mark, 4 tokens are 3 steps, however long the prefill takes."""
    ticks = iter([0.0, 100.0, 101.0, 102.0, 103.0, 200.0])
    monkeypatch.setattr(timing.Stopwatch, "now", lambda self: next(ticks))
    run = measure.run_answer(load, contender("unpruned"), 4)
    assert (run.seconds, run.decode) == (200, 1)


# what it is compared with


def test_the_limit_of_a_token_counts_weights_once_and_keys_of_every_row():
    shape = DecoderShape(layers=2, hidden=8, intermediate=8, heads=2, kv_heads=1, head_dim=4, vocab=8)
    assert limits.token_cost(shape, 1000, [10, 5], 4, 2, batch=3) == 1000 + 3 * kv_bytes(shape, [12, 7], 2)


def test_only_layers_and_head_are_read_for_a_token(load):
    decoder = TINY.adapter.decoder(load.model)
    parts = (decoder.layers, load.model.lm_head)
    assert limits.weights_read(load.model, TINY.adapter) == sum(
        weight.nbytes for part in parts for weight in part.parameters()
    )


def family(name):
    model, _ = importlib.import_module(f"support.families.{name}").build("sdpa")
    named = {type(model).__name__, *(model.config.architectures or ())}
    return ModelSpec(name=name, adapter=adapter_for(named, model.config.to_dict()), config=model.config)


def test_of_experts_the_active_ones_are_read(monkeypatch):
    of = family("qwen3_vl_moe")
    model = workload.build_model(of, CPU, torch.float32)
    layers = of.adapter.decoder(model).layers
    experts = sum(weight.nbytes for name, weight in layers.named_parameters() if ".experts." in name)
    whole = sum(weight.nbytes for part in (layers, model.lm_head) for weight in part.parameters())
    text = of.config.get_text_config()
    idle = experts * (1 - text.num_experts_per_tok / text.num_experts)
    assert limits.weights_read(model, of.adapter) == pytest.approx(whole - idle)
    monkeypatch.setattr(limits, "EXPERT_COUNTS", ())
    assert limits.weights_read(model, of.adapter) is None


@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_is_measured(name, monkeypatch):
    of = family(name)
    monkeypatch.setattr(session, "model_spec", lambda _: of)
    plan = "fastav" if name in WINDOWED else "fastv"
    found = Session.of(name, tokens=[128], plans=[plan], batches=[2], rounds=1, new_tokens=2, device="cpu").run()
    (part,) = found["parts"]
    assert part["tokens"] == 128
    assert not part["failed"]
    shape = of.adapter.shape(of.config)
    for row in part["rows"]:
        tokens = row["tokens_per_layer"]
        if row["logits"] == "last":
            assert row["flops"] == 2 * prefill_flops(shape, tokens)
        if name not in WINDOWED:  # whose window is a view of all that there was
            assert row["kv_bytes"] == row["kv_bytes_expected"]
        assert row["decode"]["median"] > 0
    assert [row["contender"] for row in part["rows"]] == [BASELINE, "unpruned", plan]


@pytest.mark.parametrize("name", [name for name in MODELS if MODELS[name].__module__.startswith("fastav.")])
def test_prompts_are_as_long_as_asked(name):
    of = model_spec(name)
    made = prompt_specs(of, tokens=[1000, 20_000])
    assert [len(prompt.layout) for prompt in made] == [1000, 20_000]
    assert made[0].layout.by_modality().keys() == prompt_specs(of)[0].layout.by_modality().keys()


def test_prompts_can_be_clips_of_some_seconds():
    made = prompt_specs(model_spec("video-salmonn2"), seconds=[10, 60.0])
    assert [(prompt.name, len(prompt.layout)) for prompt in made] == [("10s", 1924), ("60s", 11_084)]


def test_the_small_shape_is_the_one_that_is_claimed():
    of = model_spec("small")
    shape = of.adapter.shape(of.config)
    assert (shape.layers, shape.hidden, shape.heads, shape.kv_heads, shape.intermediate) == (16, 512, 8, 4, 1536)
    assert len(prompt_specs(of)[0].layout) == 4096


def test_the_released_shape_is_the_one_that_is_claimed():
    of = model_spec("videollama2")
    assert prompt_specs(of)[0].layout.by_modality() == {"text": 44, "audio": 1496, "video": 676}
    assert of.adapter.shape(of.config).layers == 28


# what is written down


def test_the_json_names_command_commit_machine_versions_and_date(measured):
    assert measured["command"] == "python -m fastav.bench tiny"
    assert {"commit", "date", "rates", "skipped", "decoder", "parameters", "plans"} <= measured.keys()
    assert measured["machine"]["threads"] == 1
    assert measured["versions"].keys() == {"python", "torch", "transformers", "numpy"}
    assert measured["skipped"] == dict.fromkeys(["flash_attention_2", "flash_attention_3"], "needs CUDA")
    assert all(rate > 0 for rate in measured["rates"].values())
    assert measured["plans"].keys() == set(NAMES)


def test_the_json_holds_every_contender_of_every_part(measured):
    found = [(part["batch"], row["contender"]) for part in measured["parts"] for row in part["rows"]]
    assert found == [(batch, name) for batch in (1, 2) for name in NAMES]
    shape = TINY.adapter.shape(TINY.config)
    for part in measured["parts"]:
        assert part["encode"]["median"] > 0
        for row in part["rows"]:
            for name in ("prefill", "prefill_ratio", "decode", "decode_ratio", "end_to_end", "end_to_end_ratio"):
                assert 0 < row[name]["low"] <= row[name]["median"] <= row[name]["high"]
            assert row["kv_bytes"] == row["kv_bytes_expected"]
            assert row["flops"] == part["batch"] * prefill_flops(shape, row["tokens_per_layer"])
            whole = prefill_flops(shape, [part["tokens"]] * shape.layers)
            assert row["flops_ratio"] == prefill_flops(shape, row["tokens_per_layer"]) / whole
            limit = row["flops"] / (1e12 * measured["rates"]["tflops"])
            assert row["prefill_over_limit"] == pytest.approx(row["prefill"]["median"] / limit)
            assert (row["capture"], row["waits"], row["peak_bytes"]) == (None, None, None)  # of a GPU
            assert (row["cut"] is None) == (row["plan"] == "none")


def test_the_cost_of_cuts_is_measured_inside_a_prefill(load):
    cost = probes.cut_cost(load, contender("fastav"), rounds=2)
    assert min(cost.score.median, cost.select.median, cost.gather.median) > 0
    assert cost.share(1.0) == cost.score.median + cost.select.median + cost.gather.median


def test_calls_inside_of_others_count_once():
    ticks = iter([0.0, 1.0, 3.0, 10.0])
    watch = measure.stopwatch(CPU)
    watch.now = lambda: next(ticks)
    calls = probes._Calls(watch)
    inner = calls.timed("select", lambda: None)
    calls.timed("score", inner)()
    assert calls.seconds() == {"score": 8.0, "select": 2.0, "gather": 0.0}


@torch.inference_mode()
def test_a_wait_is_reported_in_torchs_words(load, monkeypatch):
    modes = []
    monkeypatch.setattr(workload.Workload, "device", torch.device("cuda"))
    monkeypatch.setattr(torch.cuda, "synchronize", lambda *_: None)
    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", modes.append)
    assert probes.first_wait(load, contender("fastav")) == ""

    def waits(*_):
        if modes[-1] == "error":
            raise RuntimeError("called a synchronizing CUDA operation\nmore")

    with load.model.lm_head.register_forward_pre_hook(waits):
        assert probes.first_wait(load, contender("fastav")) == "called a synchronizing CUDA operation"
    assert modes == ["error", "default"] * 2


def test_a_part_that_lacks_memory_says_so_and_the_others_are_measured(monkeypatch):
    plain = workload.build

    def built(model, adapter, prompt, batch, **options):
        if batch == 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return plain(model, adapter, prompt, batch, **options)

    monkeypatch.setattr("fastav.bench.session.build", built)
    said = []
    asked = Session.of("tiny", batches=[2, 1], plans=["fastav"], rounds=1, device="cpu")
    first, second = asked.run(output=said.append)["parts"]
    assert (first["rows"], first["failed"]) == ([], {"everything": "out of memory"})
    assert len(second["rows"]) == 3
    assert "everything: out of memory" in said[1]


def test_if_nothing_could_be_measured_that_is_an_error(monkeypatch):
    monkeypatch.setattr("fastav.bench.session.build", lambda *_, **__: (_ for _ in ()).throw(MemoryError()))
    with pytest.raises(FastAVError, match="nothing could be measured: out of memory"):
        Session.of("tiny", rounds=1, device="cpu").run()


def test_weights_that_do_not_fit_are_refused_before_they_are_made(monkeypatch):
    monkeypatch.setattr(workload, "_free_bytes", lambda _: 1000)
    with pytest.raises(FastAVError, match=r"the weights of tiny take 0\.0 GB, and cpu has 0\.0 GB left"):
        workload.build_model(TINY, CPU, torch.float32)


def test_a_table_fits_a_hundred_columns(measured):
    lines = [line for part in measured["parts"] for line in report.table(part).splitlines()]
    assert max(map(len, lines)) <= 100
    assert sum(line.startswith("pyramiddrop") for line in lines) == 4


def test_what_is_being_done_is_told_from_the_start():
    lines = []
    asked = Session.of("tiny", rounds=1, tokens=[96], new_tokens=0, device="cpu", plans=["fastav"])
    asked.run(progress=lines.append)
    assert lines[:2] == ["measuring how fast this machine multiplies and copies", "building tiny"]
    assert lines.count("96 tokens, batch 1: prefill of fastav") == 2  # the warm-up, and the round


@pytest.mark.parametrize("fails", [False, True])
def test_threads_are_as_asked_while_it_runs_and_then_as_before(fails, monkeypatch):
    before, seen = torch.get_num_threads(), []

    def run(*_):
        seen.append(torch.get_num_threads())
        if fails:
            raise MemoryError
        return {}

    monkeypatch.setattr(Session, "_run", run)
    asked = Session.of("tiny", device="cpu", plans=["fastv"], threads=before + 1)
    with pytest.raises(MemoryError) if fails else nullcontext():
        asked.run()
    assert seen == [before + 1]
    assert torch.get_num_threads() == before


# what is aimed at


def synthetic(contender="fastav", *, tokens=2216, prompt="example", model="videollama2", **row):
    part = {"model": model, "prompt": prompt, "tokens": tokens, "batch": 1}
    spread = {
        name: {"median": value} for name, value in row.items() if name.endswith("_ratio") and name != "peak_ratio"
    }
    whole = {"contender": contender, "ours": contender != BASELINE, "flops_ratio": 0.56, "new_tokens": 32}
    return part, whole | row | spread | {"flops_ratio": row.get("flops_ratio", 0.56)}


H200 = {"machine": {"gpu": "NVIDIA H200", "threads": 1}, "device": "cuda", "dtype": "bfloat16"}
ONE_THREAD = {"machine": {"threads": 1}, "device": "cpu", "dtype": "float32"}


def verdicts(machine, part, row):
    return {one["name"]: str(one["verdict"]) for one in targets.verdicts(machine, part, row)}


def test_targets_are_met_or_missed_where_they_were_measured():
    values = {"prefill_ratio": 0.6, "decode_over_limit": 1.35, "end_to_end_ratio": 0.36, "peak_ratio": 0.4}
    part, row = synthetic(**values, cut={"share": 0.021})
    assert verdicts(H200, part, row) == {
        "prefill over unpruned, VideoLLaMA2's prompt": "met",
        "a new token over what its bytes allow": "met",
        "end to end over transformers unpruned, 32 tokens": "missed",
        "peak memory above the weights over transformers": "met",
        "cuts, of the prefill": "missed",
        "prefill ratio over the FLOPs ratio": "not measured",
    }


def test_what_was_not_measured_is_never_met():
    part, row = synthetic(prefill_ratio=0.1, decode_over_limit=None, peak_ratio=None, cut=None)
    assert set(verdicts(ONE_THREAD, part, row).values()) == {"met", "not measured"}
    found = verdicts(ONE_THREAD, part, row)
    assert [name for name, verdict in found.items() if verdict == "met"] == ["prefill ratio over the FLOPs ratio"]
    for other in ({"machine": {"gpu": "NVIDIA A100"}}, {"dtype": "float32"}):
        assert set(verdicts(H200 | other, part, row).values()) == {"not measured"}
    threads = ONE_THREAD | {"machine": {"threads": 2}}
    assert set(verdicts(threads, part, row).values()) == {"not measured"}


def test_an_answer_of_another_length_is_not_what_the_target_speaks_of():
    part, row = synthetic(end_to_end_ratio=0.1, new_tokens=8)
    assert verdicts(H200, part, row)["end to end over transformers unpruned, 32 tokens"] == "not measured"


def test_long_prompts_have_a_target_of_their_own():
    part, row = synthetic(tokens=20_000, prompt="20000", model="qwen2-5-omni", prefill_ratio=0.59)
    found = verdicts(H200, part, row)
    assert found["prefill over unpruned, 20,000 tokens or more"] == "missed"
    assert "prefill over unpruned, VideoLLaMA2's prompt" not in found


def test_other_plans_and_transformers_itself_are_not_aimed_at():
    assert verdicts(H200, *synthetic(BASELINE)) == {}
    rival = verdicts(H200, *synthetic("fastv", prefill_ratio=0.9, cut={"share": 0.01}))
    assert "prefill over unpruned, VideoLLaMA2's prompt" not in rival
    assert rival["cuts, of the prefill"] == "met"


# what is drawn, and what a README holds


@pytest.fixture(scope="module")
def scaling():
    asked = Session.of("tiny", plans=["fastav"], tokens=[96, 160], batches=[1, 2], rounds=1, device="cpu")
    return asked.run()


def test_curves_are_by_batch_contender_and_length(scaling):
    found = plot.curves([scaling])
    assert {batch: [curve.name for curve in curves] for batch, curves in found.items()} == {
        batch: [BASELINE, "fastav"] for batch in (1, 2)
    }
    assert {curve.tokens for curves in found.values() for curve in curves} == {(96, 160)}
    row = scaling["parts"][0]["rows"][0]
    assert found[1][0].median[0] == 1000 * row["prefill"]["median"]
    assert found[1][0].limit[0] == 1000 * row["prefill_limit"]


def test_the_picture_is_a_picture(scaling, tmp_path):
    report.write(scaling, tmp_path / "one.json")
    report.write({"another": "file"}, tmp_path / "two.json")
    picture = tmp_path / "new" / "plot.png"
    files = [str(tmp_path / "one.json"), str(tmp_path / "two.json")]
    assert plot.main([*files, "--out", str(picture)]) == 0
    assert picture.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    assert picture.stat().st_size > 20_000


def test_with_nothing_to_draw_or_nothing_to_draw_with_that_is_said(tmp_path, monkeypatch, capsys):
    report.write({"another": "file"}, tmp_path / "two.json")
    assert plot.main([str(tmp_path / "two.json"), "--out", str(tmp_path / "p.png")]) == 2
    assert "nothing to draw" in capsys.readouterr().err
    monkeypatch.setattr("fastav.installation.find_spec", lambda _: None)
    with pytest.raises(FastAVError, match=r"\[report\]"):
        plot.require_matplotlib()


def test_labels_of_an_axis_do_not_touch():
    assert plot._apart([1000, 2000, 2216, 4000]) == [4000, 2216, 1000]


def test_the_table_of_a_readme_is_written_between_its_marks(measured, out, tmp_path, capsys):
    readme = tmp_path / "README.md"
    readme.write_text(f"before\n{SPEED.start}\nold\n{SPEED.end}\nafter\n")
    file = str(out / "speed-tiny-cpu.json")
    assert SPEED.main([file, "--into", str(readme)]) == 0
    text = readme.read_text()
    assert text.startswith(f"before\n{SPEED.start}\n**tiny**")
    assert text.endswith(f"{SPEED.end}\nafter\n")
    assert "old" not in text
    assert text.count("| `fastav` |") == 2
    assert "- not measured: end to end over transformers unpruned, 32 tokens" in text
    assert SPEED.main([file]) == 0
    assert capsys.readouterr().out.strip() in text


def test_the_table_of_our_page_is_that_of_the_committed_results():
    text = (ROOT / "docs" / "results.md").read_text(encoding="utf-8")
    assert SPEED.replaced(text, SPEED.markdown([ROOT / "results" / "speed-small-cpu.json"])) == text


def test_a_file_without_marks_stays_as_it_is(out, tmp_path, capsys, measured):
    readme = tmp_path / "README.md"
    readme.write_text("nothing here\n")
    assert SPEED.main([str(out / "speed-tiny-cpu.json"), "--into", str(readme)]) == 2
    assert SPEED.start in capsys.readouterr().err
    assert readme.read_text() == "nothing here\n"


# what is refused


@pytest.mark.parametrize(
    ("asked", "error", "says"),
    [
        ({"model": "tests"}, FastAVError, "no model at"),
        ({"plans": ["fastest"]}, UnknownName, "fastest"),
        ({"plans": ["omnizip"]}, UnsupportedPlan, "attention of encoders"),
        ({"plans": ["fastav-trim"], "tokens": [500]}, PlanError, "drops nothing"),
        ({"plans": ["fastv", "fastv"]}, PlanError, "two plans"),
        ({"tokens": [20]}, FastAVError, "no room for a clip"),
        ({"tokens": [500], "seconds": [5.0]}, FastAVError, "two ways"),
        ({"attentions": ["flash"]}, FastAVError, "no attention"),
        ({"attentions": ["flash_attention_2"]}, FastAVError, "needs CUDA"),
        ({"device": "abacus"}, FastAVError, "abacus"),
    ],
)
def test_what_makes_no_sense_is_refused_before_anything_is_made(asked, error, says):
    with pytest.raises(error, match=says):
        Session.of(**{"model": "tiny", "device": "cpu", **asked})


def test_a_plan_for_what_the_model_has_not_is_refused():
    deaf = model_spec("qwen2-5-vl")
    audio = Plan((Step(layers="2", method="position", keep=Keep(audio=Share(0.5))),), "quiet")
    with pytest.raises(PlanError, match="'quiet' drops nothing of a prompt of 44 text, "):
        contenders._require_effect(deaf, audio, prompt_specs(deaf), "sdpa")


def test_a_usual_plan_that_a_model_cannot_have_is_left_out():
    found, skipped = contenders.supported_plans(model_spec("gemma3n"), [], prompt_specs(model_spec("gemma3n")), "sdpa")
    assert [plan.name for plan in found] == ["fastav"]
    assert "attends within a window" in skipped["fastv"]
    assert "attends within a window" in skipped["pyramiddrop"]


WITHOUT_PYAV = """
import importlib.machinery as machinery, sys
plain = machinery.PathFinder.find_spec
machinery.PathFinder.find_spec = staticmethod(lambda name, *a: None if name.split(".")[0] == "av" else plain(name, *a))
"""


@pytest.mark.parametrize(
    "arguments", [["--help"], ["tiny", "--rounds", "1", "--tokens", "96", "--device", "cpu", "--plan", "fastav"]]
)
def test_the_benchmark_runs_without_pyav(arguments):
    code = f"{WITHOUT_PYAV}from fastav.bench.__main__ import main; sys.exit(main({[*arguments]}))"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=300)
    assert run.returncode == 0, run.stderr[-2000:]


def test_every_model_and_the_rollout_benchmark_import_without_pyav():
    code = f"""{WITHOUT_PYAV}
import benchmarks.rollout
from fastav.errors import InstallationError
from fastav.registry import MODELS
assert all(MODELS[name] for name in MODELS)
from fastav.media import Clip
try:
    Clip.open("src/fastav/assets/clips/triangle.mp4")
except InstallationError as error:
    assert "No module named 'av'" in error.message
else:
    raise AssertionError
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=300)
    assert run.returncode == 0, run.stderr[-2000:]


def test_without_pyav_a_set_of_questions_ends_before_its_first_answer(tmp_path):
    questions, out = tmp_path / "q.jsonl", tmp_path / "a.jsonl"
    questions.write_text('{"clip": "clip.mp4", "question": "Why?"}\n', encoding="utf-8")
    arguments = ["batch", str(questions), "--out", str(out)]
    code = f"{WITHOUT_PYAV}from fastav.cli import main; sys.exit(main({arguments}))"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=300)
    assert run.returncode == 2
    assert run.stderr.startswith("error: clips need PyAV, which cannot be imported: No module named 'av'")
    assert not out.exists()


# files


def test_a_report_that_cannot_be_written_leaves_the_old_one(tmp_path):
    path = tmp_path / "bench.json"
    report.write({"number": 1}, path)
    with pytest.raises(TypeError):
        report.write({"number": object()}, path)
    assert json.loads(path.read_text()) == {"number": 1}
    assert list(tmp_path.iterdir()) == [path]


def test_outside_of_git_the_commit_is_what_the_caller_says(monkeypatch):
    monkeypatch.setattr("fastav.provenance._git", lambda *_: None)
    assert report.circumstances([], CPU, None)["commit"] is None
    assert report.circumstances([], CPU, "abc1234")["commit"] == "abc1234"


def test_a_dirty_checkout_is_told(monkeypatch):
    answers = {"rev-parse": "abc1234", "status": " M file"}
    monkeypatch.setattr("fastav.provenance._git", lambda command, *_: answers[command])
    assert report.circumstances([], CPU, None)["commit"] == "abc1234-dirty"
    answers["status"] = ""
    assert report.circumstances([], CPU, None)["commit"] == "abc1234"


# what rollout costs


def test_rollout_is_timed_against_whole_maps(tmp_path, capsys):
    assert (
        rollout.main(
            ["--tokens", "24,40", "--dense-up-to", "24", "--layer-up-to", "0", "--rounds", "2", "--out", str(tmp_path)]
        )
        == 0
    )
    report = json.loads((tmp_path / "rollout-cpu.json").read_text())
    assert [(cost["tokens"], cost["what"]) for cost in report["costs"]] == [
        (24, "rows, one"), (24, "rows, 84"), (24, "dense"), (40, "rows, one"), (40, "rows, 84"),
    ]  # fmt: skip
    assert report["command"].startswith("python -m benchmarks.rollout --tokens")
    assert {"commit", "machine", "versions", "date"} <= report.keys()
    assert "seconds a layer" in capsys.readouterr().out


def test_what_is_timed_as_dense_is_the_same_rollout():
    make = torch.Generator().manual_seed(0)
    query = torch.randn(1, rollout.HEADS, 12, rollout.FEATURES, generator=make)
    key = torch.randn(1, rollout.KV_HEADS, 12, rollout.FEATURES, generator=make)
    before = torch.rand(12, 12, generator=make)
    layer = LayerAttention(query, key, None, 0.1, *[torch.arange(12)[None]] * 2, None)
    last = torch.nn.functional.one_hot(torch.tensor([11]), 13).float()
    row = rollout_row([layer], last)[0, :12] @ before
    assert (row - rollout.dense(query, key, 0.1, before)[11]).abs().max() < 1e-5


# torch.compile


def test_compiled_contenders_come_last():
    names = [one.name for one in contenders.contenders([TINY.adapter.preset("fastav")], ["sdpa"], compiled=True)]
    assert names == [BASELINE, "unpruned", "fastav", "unpruned compiled", "fastav compiled"]


def test_modules_are_compiled_while_a_contender_runs(load, monkeypatch):
    asked = []
    monkeypatch.setattr(torch.nn.Module, "compile", lambda module, **options: asked.append((type(module), options)))
    one = Contender(name="unpruned compiled", plan=NONE, attention="sdpa", ours=True, compiled=True)
    with load.running(one):
        pass
    depth = len(load.model.model.layers)
    assert [kind.__name__ for kind, _ in asked] == ["Qwen2MLP", "Qwen2RMSNorm", "Qwen2RMSNorm"] * depth
    assert all(options == {"dynamic": True} for _, options in asked)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch's own, while it compiles
def test_compiled_modules_say_the_same(load):
    decoder = load.adapter.decoder(load.model)
    expected = logits(load, "fastav")
    with compiled(decoder):
        assert is_compiled(decoder)
        assert (logits(load, "fastav") - expected).abs().max() < 1e-4
    assert not is_compiled(decoder)
    assert torch.equal(logits(load, "fastav"), expected)
