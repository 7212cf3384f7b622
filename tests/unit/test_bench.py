"""The benchmark measures what it says, on a shape of milliseconds."""

import json

import pytest
import torch

from fastav.bench import measure, probes, report, rollout, workload
from fastav.bench.__main__ import main
from fastav.bench.measure import Spread
from fastav.rollout import Captured, rollout_row

TINY = workload.SHAPES["tiny"]
CPU = torch.device("cpu")
NONE, HOOKS, GLOBAL, FASTAV, TRIM = TINY.plans()


@pytest.fixture(scope="module")
def load():
    return workload.build(TINY, workload.build_model(TINY, CPU, torch.float32), batch=2)


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    out = tmp_path_factory.mktemp("results")
    assert main(["--shape", "tiny", "--repeats", "2", "--new-tokens", "2", "--out", str(out)]) == 0
    assert [file.name for file in out.iterdir()] == ["bench-tiny-cpu.json"]
    return json.loads((out / "bench-tiny-cpu.json").read_text())


@torch.inference_mode()
def logits(load, plan):
    with load.pruned(plan):
        return load.model(inputs_embeds=load.embeds, logits_to_keep=1).logits


def test_hooks_without_a_cut_change_nothing(load):
    assert torch.equal(logits(load, HOOKS), logits(load, NONE))


@pytest.mark.parametrize("plan", [GLOBAL, FASTAV, TRIM], ids=lambda plan: plan.name)
def test_a_plan_that_cuts_is_carried_out(load, plan):
    assert not torch.equal(logits(load, plan), logits(load, NONE))


@pytest.mark.parametrize("plan", TINY.plans(), ids=lambda plan: plan.name)
def test_the_cache_holds_the_bytes_that_the_plan_foretells(load, plan):
    row = measure.measure(load, [NONE, plan], 1, 1, 0)[1]
    assert row.kv_bytes == row.kv_bytes_expected
    assert row.tokens_per_layer == plan.tokens(load.layout, 4)


@torch.inference_mode()
def test_media_and_their_embeddings_are_the_same_prompt(load):
    from_media = load.model(**load.raw, logits_to_keep=1).logits
    assert torch.allclose(from_media, logits(load, NONE), atol=1e-6)


def test_every_round_runs_every_plan_and_the_first_round_is_dropped():
    order = []
    results = measure.interleaved(TINY.plans(), 5, lambda plan: order.append(plan.name) or len(order))
    assert [len(values) for values in results.values()] == [5] * 5
    assert {len(set(order[i : i + 5])) for i in range(0, 30, 5)} == {5}
    assert len({order[i] for i in range(5, 30, 5)}) == 5
    assert min(min(values) for values in results.values()) == 6


def test_ratios_are_taken_within_a_round():
    assert Spread.of_ratios([1.0, 20.0, 3.0], over=[2.0, 40.0, 6.0]) == Spread(median=0.5, low=0.5, high=0.5)


def test_the_json_names_command_commit_machine_versions_and_date(written):
    assert written["command"].startswith("python -m fastav.bench --shape tiny")
    assert {"commit", "date", "context", "skipped"} <= written.keys()
    assert written["machine"]["cpu"]
    assert written["machine"]["threads"] == 1
    assert written["versions"].keys() == {"python", "torch", "transformers", "numpy"}
    assert written["shape"]["decoder"]["layers"] == 4
    assert written["shape"]["prompt"] == {"text": 20, "audio": 96, "video": 32}


def test_the_json_holds_every_plan_of_every_batch_size(written):
    rows = written["plans"]
    assert [(row["batch"], row["plan"]) for row in rows] == [(b, p.name) for b in (1, 2) for p in TINY.plans()]
    for row in rows:
        for name in ("prefill", "prefill_ratio", "decode", "decode_ratio", "end_to_end", "end_to_end_ratio"):
            assert 0 < row[name]["low"] <= row[name]["median"] <= row[name]["high"]
        assert row["kv_bytes"] == row["kv_bytes_expected"]
        assert 0 < row["flops_ratio"] <= 1
    assert {row["prefill_ratio"]["median"] for row in rows if row["plan"] == "none"} == {1.0}


def test_the_json_holds_the_cost_of_a_cut_and_of_the_encoders(written):
    assert len(written["cuts"]) == len(written["encode"]) == 2
    for cut in written["cuts"]:
        assert cut["tokens"] == 148
        assert cut["share"] > 0
    assert all(encode["seconds"]["median"] > 0 for encode in written["encode"])


def test_without_a_device_nothing_can_wait_for_one(written):
    assert {stall["passed"] for stall in written["stalls"]} == {None}
    assert {stall["prompt"] for stall in written["stalls"]} == {"embeddings", "media"}
    assert len(written["stalls"]) == 2 * 2 * 5


@pytest.mark.parametrize("plan", [NONE, FASTAV], ids=lambda plan: plan.name)
@torch.inference_mode()
def test_a_wait_is_reported_in_torchs_words(load, plan, monkeypatch):
    modes = []
    monkeypatch.setattr(torch.cuda, "synchronize", lambda *_: None)
    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", modes.append)
    assert probes._wait(load, plan, load.raw) is None

    def waits(*_):
        if modes[-1] == "error":
            raise RuntimeError("called a synchronizing CUDA operation")

    with load.model.lm_head.register_forward_pre_hook(waits):
        assert probes._wait(load, plan, load.raw) == "called a synchronizing CUDA operation"
    assert modes == ["error", "default"] * 2


def test_a_table_fits_a_hundred_columns(capsys):
    assert main(["--shape", "tiny", "--repeats", "1", "--new-tokens", "1"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 100
    assert sum(line.startswith("fastav ") for line in lines) == 4


def test_json_goes_to_standard_output_on_request(capsys):
    assert main(["--shape", "tiny", "--repeats", "1", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["plans"][0]["decode"] is None


def test_threads_are_as_before():
    before = torch.get_num_threads()
    assert main(["--shape", "tiny", "--repeats", "1", "--threads", str(before + 1), "--json"]) == 0
    assert torch.get_num_threads() == before


def test_the_small_shape_is_the_one_that_is_claimed():
    shape = workload.SHAPES["small"]
    config = workload.build_model(shape, torch.device("meta"), torch.float32).config
    layout, decoder = shape.layout(config), workload.ADAPTER.shape(config)
    assert (decoder.layers, decoder.hidden, decoder.heads, decoder.kv_heads, decoder.intermediate) == (
        16,
        512,
        8,
        4,
        1536,
    )
    assert layout.by_modality() == {"text": 128, "audio": 1323, "video": 2645}


def test_the_released_shape_is_the_one_that_is_claimed():
    shape = workload.SHAPES["videollama2"]
    model = workload.build_model(shape, torch.device("meta"), torch.bfloat16)
    assert shape.layout(model.config).by_modality() == {"text": 44, "audio": 1496, "video": 676}
    assert workload.ADAPTER.shape(model.config).layers == 28


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--shape", "tiny", "--tokens", "512"], "--tokens"),
        (["--repeats", "0"], "--repeats"),
        (["--new-tokens", "-1"], "--new-tokens"),
    ],
)
def test_senseless_options_are_refused(arguments, says, capsys):
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    assert caught.value.code == 2
    assert says in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_a_missing_device_is_one_line(capsys):
    assert main(["--device", "cuda"]) == 2
    assert len(capsys.readouterr().err.splitlines()) == 1


def test_a_missing_package_is_named_in_one_line(monkeypatch, capsys):
    def missing(*_):
        raise ModuleNotFoundError("No module named 'av'", name="av")

    monkeypatch.setattr("fastav.bench.probes.context", missing)
    assert main(["--shape", "tiny"]) == 2
    assert capsys.readouterr().err == "fastav.bench needs the package 'av', which is not installed\n"


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


def test_the_machines_own_speed_is_told():
    assert all(value > 0 for value in probes.context(CPU, torch.float32).values())


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
    assert report["command"].startswith("python -m fastav.bench.rollout --tokens")
    assert {"commit", "machine", "versions", "date"} <= report.keys()
    assert "seconds a layer" in capsys.readouterr().out


def test_what_is_timed_as_dense_is_the_same_rollout():
    make = torch.Generator().manual_seed(0)
    query = torch.randn(1, rollout.HEADS, 12, rollout.FEATURES, generator=make)
    key = torch.randn(1, rollout.KV_HEADS, 12, rollout.FEATURES, generator=make)
    before = torch.rand(12, 12, generator=make)
    layer = Captured(query, key, None, 0.1, *[torch.arange(12)[None]] * 2, None)
    last = torch.nn.functional.one_hot(torch.tensor([11]), 13).float()
    row = rollout_row([layer], last)[0, :12] @ before
    assert (row - rollout.dense(query, key, 0.1, before)[11]).abs().max() < 1e-5
