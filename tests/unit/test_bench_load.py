"""The load benchmark's parts that need no vLLM: who is asked for, what is asked, and what is made of the answers."""

import json
from io import BytesIO
from pathlib import Path

import av
import pytest
from benchmarks.load import __main__ as command
from benchmarks.load import report
from benchmarks.load.clients import Completion, LevelResult
from benchmarks.load.contenders import ServedModel, contenders, server_flags
from benchmarks.load.load_test import WARMUP_NUMBER, Bounds
from benchmarks.load.questions import MIXED, SILENT, QuestionSet, encode, question
from benchmarks.load.server import Metrics
from benchmarks.load.table import LOAD

from fastav.bench.report import FORMAT
from fastav.engines.vllm.guards import read
from fastav.errors import FastAVError, PlanError, UnknownName, UnsupportedModel, UnsupportedPlan
from fastav.registry import MODELS

ROOT = Path(__file__).parents[2]
OMNI, SIGHT = (ServedModel.of(name, name) for name in ("qwen2-5-omni", "qwen2-5-vl"))
QUIET = Metrics(running=0, waiting=0, cache=0.0, preemptions=1)


def names(of, *named):
    return [one.name for one in contenders(of, named, gpu=True)]


def test_vllms_own_pruning_takes_part_where_there_is_one():
    assert names(OMNI) == ["off", "global", "fastav"]
    assert names(SIGHT) == ["off", "global", "fastav", "vllm-evs@0.5"]
    assert [one.name for one in contenders(SIGHT, [], gpu=False)] == ["off", "global", "fastav"]
    with pytest.raises(FastAVError, match="cannot prune videos by itself on a CPU"):
        contenders(SIGHT, ["vllm-evs@0.5"], gpu=False)
    assert names(OMNI, "fastv@0.25", "off") == ["fastv@0.25", "off"]


@pytest.mark.parametrize(
    ("of", "named", "error", "says"),
    [
        (OMNI, ["vllm-evs@0.5"], FastAVError, "no pruning of its own for qwen2-5-omni"),
        (SIGHT, ["vllm-evs"], FastAVError, "the share of a video to drop"),
        (SIGHT, ["vllm-evs@1"], FastAVError, "the share of a video to drop"),
        (OMNI, ["none"], PlanError, "prunes nothing"),
        (OMNI, ["fastaw"], UnknownName, "did you mean"),
        (OMNI, ["omnizip"], UnsupportedPlan, "reads audio-encoder, seconds, which vLLM does not provide"),
        (OMNI, ["fastav", "fastav"], PlanError, "two contenders"),
        (OMNI, ["fastav+chunks"], FastAVError, "ends in [+]chunks, which is unknown"),
        (OMNI, ["fastav+chunks=1"], FastAVError, "ends in [+]chunks=1, which is unknown"),
        (OMNI, ["off+prefixes"], FastAVError, "ends in [+]prefixes, which is unknown"),
        (ServedModel.of("gemma3n", "gemma3n"), ["fastav"], UnsupportedModel, "cannot be pruned inside vLLM yet"),
    ],
)
def test_who_cannot_serve_is_refused(of, named, error, says):
    with pytest.raises(error, match=says):
        contenders(of, named, gpu=True)


def test_a_name_says_how_to_schedule():
    common = {"--max-num-batched-tokens": "2048", "--no-enable-prefix-caching": None}
    named = ["off", "off+chunks=512", "fastav+prefix", "fastav+chunks=64+prefix"]
    off, chunks, prefix, both = (server_flags(OMNI, one, common, 2048) for one in contenders(OMNI, named, gpu=False))
    assert off == ["--max-num-batched-tokens", "2048", "--no-enable-prefix-caching"]
    assert chunks == ["--max-num-batched-tokens", "512", "--no-enable-prefix-caching"]
    for flags in (prefix, both):
        assert "--enable-prefix-caching" in flags
        assert "--no-enable-prefix-caching" not in flags
        assert "--additional-config" in flags
    assert both[both.index("--max-num-batched-tokens") + 1] == "64"
    assert names(OMNI, *named) == named


def test_a_contender_has_what_all_have_and_what_it_needs():
    common = {"--max-model-len": "2048", "--no-enable-prefix-caching": None}
    off, early, fastav, evs = (server_flags(SIGHT, one, common, 2048) for one in contenders(SIGHT, [], gpu=True))
    assert off == ["--max-model-len", "2048", "--no-enable-prefix-caching"]
    assert evs == [*off, "--video-pruning-rate", "0.5"]
    assert "--additional-config" in fastav
    assert "--no-enable-chunked-prefill" not in {*early, *fastav}
    said = read(json.loads(early[early.index("--additional-config") + 1]), SIGHT.unpruned.config)
    assert said.plan.steps == SIGHT.adapter.preset("fastav").steps[:1]


def test_flags_of_every_server_may_be_added():
    assert command.parse_flags("--dtype bfloat16 --enforce-eager --a=b") == {
        "--dtype": "bfloat16",
        "--enforce-eager": None,
        "--a": "b",
    }
    with pytest.raises(FastAVError, match="got 'three'"):
        command.parse_flags("--two words three")


@pytest.mark.parametrize("levels", ["", "0", "1,x", "-1", "5000"])
def test_levels_that_make_no_sense_are_refused(levels):
    with pytest.raises(FastAVError, match="--clients must be"):
        command.parse_levels(levels)


def test_levels_have_enough_questions():
    bounds = Bounds(levels=(1, 32), rounds=1, least=8, each=1.5, new=4, seconds=1, start=1, patience=1)
    assert [bounds.questions(level) for level in bounds.levels] == [8, 48]


def test_without_vllm_it_ends_in_a_line(monkeypatch, capsys):
    monkeypatch.setattr(command, "find_spec", lambda name: None)
    assert command.main(["--rounds", "1"]) == 2
    assert capsys.readouterr().err.startswith(
        "benchmarks.load: vLLM is not installed in this environment (in a checkout of fastav: pip install"
    )


def test_clips_are_the_same_every_time_and_as_long_as_they_say():
    clip = next(kind for kind in MIXED if kind.seconds == 3)
    assert encode(clip) == encode(clip)
    with av.open(BytesIO(encode(clip))) as container:
        assert sum(1 for _ in container.decode(video=0)) == 6
    with av.open(BytesIO(encode(clip))) as container:
        assert sum(frame.samples for frame in container.decode(audio=0)) == 48_000
    with av.open(BytesIO(encode(SILENT[5]))) as container:
        assert not container.streams.audio


def test_questions_are_of_one_length_and_no_two_alike():
    asked = [question(number) for number in (*range(100), WARMUP_NUMBER + 7)]
    assert len(set(asked)) == len(asked)
    assert len(set(map(len, asked))) == 1


def test_the_mix_has_every_kind_of_media():
    asking = QuestionSet(MODELS["qwen2-5-omni"]())
    bodies = [asking.body(number) for number in range(len(MIXED))]
    kinds = [[part["type"] for part in body["messages"][0]["content"]] for body in bodies]
    assert {tuple(kind) for kind in kinds} == {("video_url", "text"), ("input_audio", "text"), ("text",)}
    for kind, body in zip(kinds, bodies, strict=True):
        assert bool(body["extra_body"]) == ("video_url" in kind)
    assert not QuestionSet(MODELS["qwen2-5-vl"]()).body(0)["extra_body"]


def test_metrics_are_read_off_what_prometheus_is_told():
    text = """# HELP vllm:num_requests_running something
vllm:num_requests_running{engine="0",model_name="load"} 3.0
vllm:num_requests_running{engine="1",model_name="load"} 2.0
vllm:num_requests_waiting{engine="0",model_name="load"} 7.0
vllm:kv_cache_usage_perc{engine="0",model_name="load"} 0.25
vllm:num_preemptions_total{engine="0",model_name="load"} 1.0
"""
    assert Metrics.parse(text) == Metrics(running=5, waiting=7, cache=0.25, preemptions=1)
    with pytest.raises(FastAVError, match="no vllm:num_requests_running"):
        Metrics.parse("")


def level_result(seconds, *, failed=0):
    completions = [
        Completion(number=n, prompt=100, tokens=(1, 2, 3), first=0.1 * n, gaps=(0.01, 0.03))
        for n in range(1, 5 - failed)
    ]
    completions += [Completion(number=9, error="gone")] * failed
    metrics = [QUIET, Metrics(running=4, waiting=2, cache=0.5, preemptions=1)]
    after = Metrics(running=0, waiting=0, cache=0.0, preemptions=4)
    asked = [completion.number for completion in completions]
    given = {"asked": asked, "completions": completions, "metrics": metrics, "after": after}
    return LevelResult(**given, seconds=seconds, cpu=8.0)


def test_a_run_counts_what_was_answered():
    run = report.run("off", 0, 4, level_result(2.0, failed=1))
    assert (run["asked"], run["answered"], run["output_tokens"], run["prompt_tokens"]) == (4, 3, 9, 300)
    assert (run["requests_per_second"], run["output_tokens_per_second"]) == (1.5, 4.5)
    assert run["first"]["median"] == pytest.approx(0.2)
    assert run["gap"] == pytest.approx({"median": 0.02, "p95": 0.03})
    assert (run["running"], run["waiting"], run["cache"], run["preemptions"]) == (4, 2, 0.5, 3)
    assert "3 of 4 answered in 2.0 s" in report.line(run)


def test_a_run_without_answers_has_no_times():
    run = report.run("off", 0, 4, level_result(2.0, failed=4))
    assert run["first"] is run["gap"] is run["cpu_per_request"] is None
    assert run["requests_per_second"] == 0
    (row,) = report.rows([run])
    assert row["first"] is None
    assert row["requests_per_second_ratio"] is None


RUNS = [report.run(name, number, 4, level_result(seconds)) for name, number, seconds in (
    ("off", 0, 2.0), ("fastav", 0, 1.0), ("fastav", 1, 2.0), ("off", 1, 8.0), ("fastav", 2, 1.0),
)]  # fmt: skip


def test_rows_are_medians_over_rounds_and_ratios_within_them():
    off, fastav = report.rows(RUNS)
    assert (off["contender"], off["rounds"], fastav["rounds"]) == ("off", 2, 3)
    assert off["requests_per_second_ratio"]["median"] == 1
    assert fastav["requests_per_second"]["median"] == 4
    assert fastav["requests_per_second_ratio"]["median"] == 3  # of 2 and 4: the third round has no base
    assert (fastav["asked"], fastav["answered"]) == (12, 12)


def whole_report():
    return {
        "fastav_load": FORMAT,
        "model": "small-omni",
        "machine": {"cpu": "a CPU", "cores": 2},
        "decoder": {"layers": 12, "hidden": 512},
        "versions": {"vllm": "0.32.0", "torch": "2.13.0"},
        "command": "python -m benchmarks.load",
        "commit": "abc",
        "servers": {"off": {}, "fastav": {}, "vllm-evs@0.5": {}},
        "prompts": [
            {
                "kind": "clip of 4 s",
                "tokens": 646,
                "by_modality": {"text": 34, "video": 512, "audio": 100},
                "counted": {"off": 646, "fastav": 646, "vllm-evs@0.5": 390},
                "mean_layer": {"off": 646.0, "fastav": 400.0},
                "last_layer": {"off": 646, "fastav": 120},
            }
        ],
        "answers": {name: {"again": 3, "differed": 0, "questions": 8, "as_off": 1} for name in ("off", "fastav")},
        "rows": report.rows(RUNS),
        "wrong": ["fastav, 4 clients: question 3: gone"],
    }


def test_the_table_is_written_between_its_marks(tmp_path, capsys):
    file, page = tmp_path / "load.json", tmp_path / "page.md"
    file.write_text(json.dumps(whole_report()))
    other = tmp_path / "other.json"
    other.write_text("[]")
    page.write_text(f"before\n{LOAD.start}\nold\n{LOAD.end}\nafter\n")
    assert LOAD.main([str(file), str(other), "--into", str(page)]) == 0
    text = page.read_text()
    assert text.startswith(f"before\n{LOAD.start}\n**small-omni**")
    assert text.endswith(f"{LOAD.end}\nafter\n")
    assert "old" not in text
    assert (
        "| clip of 4 s | 34 text + 512 video + 100 audio = 646 | 400 a layer, 120 in the last | 390 in every layer |"
        in text
    )
    assert "| 4 | `fastav` | 12 of 12 | 4.00 | 3.00 [2.50-3.50] |" in text
    assert "- wrong: fastav, 4 clients: question 3: gone" in text
    columns = {line.count("|") for line in text.splitlines() if line.startswith(("| 4 |", "| clients"))}
    assert len(columns) == 1
    assert "wrong: fastav" in report.table(whole_report())


def test_the_table_of_our_page_is_that_of_the_committed_results():
    text = (ROOT / "docs" / "vllm.md").read_text(encoding="utf-8")
    assert LOAD.replaced(text, LOAD.markdown([ROOT / "results" / "load-small-omni-cpu.json"])) == text


def test_files_that_hold_something_else_are_told(tmp_path, capsys):
    other = tmp_path / "other.json"
    other.write_text("{}")
    assert LOAD.main([str(other)]) == 2
    assert "no file holds a report of python -m benchmarks.load" in capsys.readouterr().err
