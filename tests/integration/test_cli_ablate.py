"""`fastav ablate`, on the embedded model and on the reference checkpoint, whose weights are random."""

import json
import shutil
from functools import cache
from pathlib import Path

import pytest
from scipy.stats import binomtest

import fastav
from fastav.cli import main
from fastav.evaluate import read
from fastav.models.tiny import TinyAdapter
from fastav.tasks import toy_world
from support.command import failure, stdout
from support.little_task import REFERENCE

MODEL = str(REFERENCE)
SMALL = ("ablate", MODEL, "little", "--device", "cpu", "--tables", "fine", "--limit", "2")
TOY = ("ablate", "tiny", "toy-world", "--device", "cpu", "--limit", "2")


pytestmark = pytest.mark.usefixtures("little")


@pytest.fixture(scope="module", autouse=True)
def _rendered_once():
    """Each command renders all clips of the toy world."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(toy_world, "clip", cache(toy_world.clip))
        yield


@pytest.fixture(scope="module")
def made(little, _rendered_once, tmp_path_factory) -> Path:
    """The rows of all tables of the toy world, two samples of each."""
    path = tmp_path_factory.mktemp("made") / "rows.jsonl"
    assert main([*TOY, "--out", str(path)]) == 0
    return path


def test_help_fits_80_columns(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    out = stdout(capsys, "ablate", "--help")
    assert max(map(len, out.splitlines())) <= 80


def test_tables_are_drawn_row_by_row_from_what_rows_hold(made, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    assert max(map(len, stdout(capsys, *TOY, "--out", str(made)).splitlines())) <= 80
    monkeypatch.setenv("COLUMNS", "110")
    out = stdout(capsys, *TOY, "--out", str(made))
    report = json.loads(stdout(capsys, *TOY, "--out", str(made), "--json"))
    lines = out.splitlines()
    assert max(map(len, lines)) <= 110
    assert [table["name"] for table in report["tables"]] == ["global", "fine", "start", "drop"]
    at = 0
    for table in report["tables"]:
        at = lines.index(table["title"], at)
        head, rows = lines[at + 2].split(), lines[at + 4 : at + 4 + len(table["rows"])]
        families = list(report["plans"]["none"]["families"])
        assert head == [table["name"], "retention", "FLOPs", *families, "mean", "n"]
        for line, row in zip(rows, table["rows"], strict=True):
            label = row["label"] + " *" * row["fastav"]
            assert line.startswith(label)
            answered = [r for r in read(made).rows if r.plan == row["plan"]]
            ratio = sum(r.flops["pruned"] / r.flops["full"] for r in answered) / 2
            mean = 50 * sum(r.score for r in answered)
            retention, _, flops, percent, *rest = line.removeprefix(label).split()
            assert (float(flops), percent) == (pytest.approx(100 * ratio, abs=0.051), "%")
            kept = sum(r.retention for r in answered) / 2
            assert float(retention) == pytest.approx(100 * kept, abs=0.051)
            points, lows, highs = (rest[at:-1:3] for at in range(3))
            assert [float(x) for x in points] == [100 * r.score for r in answered] + [mean]
            shown = float(lows[-1].strip("[,")), float(highs[-1].strip("]"))
            wilson = binomtest(round(mean / 50), 2).proportion_ci(method="wilson")
            assert shown == (pytest.approx(100 * wilson.low, abs=0.051), pytest.approx(100 * wilson.high, abs=0.051))
            assert rest[-1] == "2"


def test_the_first_row_is_unpruned_and_strategies_cost_the_same(made, capsys):
    report = json.loads(stdout(capsys, *TOY, "--out", str(made), "--json"))
    costs = {
        table["name"]: [report["plans"][row["plan"]]["all"]["flops_ratio"] for row in table["rows"]]
        for table in report["tables"]
    }
    assert {name: cost[0] for name, cost in costs.items()} == dict.fromkeys(costs, 1)
    for name in ("global", "fine"):
        assert len(set(costs[name])) == 2
    assert costs["drop"] == sorted(costs["drop"], reverse=True)
    assert [row["label"] for table in report["tables"] for row in table["rows"] if row["fastav"]] == [
        "position",
        "low-attentive",
        "layer 6",
        "P = 20 %",
    ]


def test_a_plan_in_several_tables_is_asked_once(made):
    rows = read(made).rows
    assert len(rows) == 2 * 16
    run, *_ = read(made).runs
    assert run["plans"]["fastav"]["fingerprint"] == TinyAdapter().preset("fastav").fingerprint
    assert {row.plan for row in rows} == set(run["plans"])


def test_a_stopped_ablation_goes_on_where_it_was(capsys, monkeypatch, tmp_path):
    path = tmp_path / "rows.jsonl"
    first = stdout(capsys, *SMALL, "--out", str(path))
    whole = {row.key: (row.answer, row.flops) for row in read(path).rows}
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join(lines[:6]) + lines[6][:50])
    asked = []
    generate = fastav.engines.transformers.TransformersEngine.generate
    monkeypatch.setattr(
        "fastav.engines.transformers.TransformersEngine.generate",
        lambda self, requests, plan, **options: asked.append(plan.name) or generate(self, requests, plan, **options),
    )
    again = stdout(capsys, *SMALL, "--out", str(path))
    assert len(whole) == 8
    assert len(asked) == 3
    assert {row.key: (row.answer, row.flops) for row in read(path).rows} == whole
    assert again == first


def test_a_finished_ablation_loads_no_model(made, capsys, monkeypatch):
    monkeypatch.setattr("fastav.models.tiny.TinyAdapter.load", lambda *_, **__: pytest.fail("loaded"))
    assert "low-attentive *" in stdout(capsys, *TOY, "--out", str(made))


def test_other_tables_are_refused_a_file(made, capsys, tmp_path):
    path = shutil.copy(made, tmp_path / "rows.jsonl")
    before = path.read_bytes()
    assert "has rows of other plans" in failure(capsys, *TOY, "--tables", "fine", "--out", str(path))
    assert path.read_bytes() == before


def test_failures_are_counted_and_go_on(capsys, monkeypatch):
    monkeypatch.setenv("LITTLE_BROKEN", "1")
    monkeypatch.setenv("LITTLE_SAMPLES", "1")
    small = SMALL[:-2]
    assert "sample 'broken' under plan 'none'" in failure(capsys, *small)
    out = stdout(capsys, *small, "--keep-going")
    assert "fine-random: 1 of 2 failed and are left out" in out


def test_a_plan_of_one_s_own_is_varied(capsys, tmp_path):
    path = str(tmp_path / "mine.json")
    stdout(capsys, "plan", "write", "fastav", "--model", MODEL, "--before", "20", "--drop", "25", "--out", path)
    report = json.loads(stdout(capsys, *SMALL[:-4], "--tables", "drop", "--limit", "1", "--plan", path, "--json"))
    (table,) = report["tables"]
    assert [row["label"] for row in table["rows"] if row["fastav"]] == ["P = 25 %"]
    assert report["plans"]["fastav"]["fingerprint"] == fastav.Plan.load(path).fingerprint


@pytest.mark.parametrize(
    ("arguments", "found"),
    [
        (["tiny", "toy-world", "--tables", "fine,gobal"], "no table is called 'gobal'"),
        (["tiny", "toy-world", "--tables", ","], "no table is given"),
        (["tiny", "toy-wolrd"], "no task is called 'toy-wolrd'"),
        (["./no-such-model", "toy-world"], "the folder './no-such-model' does not exist"),
        (["tiny", "toy-world", "--plan", "fastv"], "the plan 'fastv' cannot be ablated"),
        (["tiny", "toy-world", "--plan", "fastaw"], "no plan of tiny is called 'fastaw'"),
        (["tiny", "toy-world", "--families", "smell"], "no family of samples is called 'smell'"),
        (["tiny", "toy-world", "--limit", "0"], "--limit"),
        (["tiny", "avhbench"], "avhbench needs its annotations"),
        (["gemma4", "toy-world"], "neither a start layer nor a P to sweep"),
        (["gemma3n", "toy-world", "--tables", "drop"], "neither a start layer nor a P to sweep"),
        (["tiny"], "TASK"),
    ],
)
def test_bad_input_is_one_line_before_weights_load(arguments, found, capsys, monkeypatch):
    monkeypatch.setattr("fastav.models.tiny.TinyAdapter.load", lambda *_, **__: pytest.fail("loaded"))
    assert found in failure(capsys, "ablate", *arguments)
