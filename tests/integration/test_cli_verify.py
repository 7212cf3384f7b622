"""`fastav verify` on the embedded model."""

import json
import shutil
from importlib.resources import files
from pathlib import Path
from typing import Any

import pytest

import fastav
from fastav.cli import main
from fastav.cli import verify as command
from fastav.errors import FastAVError, UnsupportedPlan
from fastav.presets import NONE
from fastav.verify import Verification, read, verification
from support.command import failure, stdout

CLIPS = Path(str(files("fastav") / "assets" / "clips"))
QUESTIONS = [
    {"id": "colour", "clip": str(CLIPS / "triangle.mp4"), "question": "which color moves?"},
    {"id": 7, "clip": str(CLIPS / "knock.mp4"), "question": "describe the clip.", "use": "video"},
    {"clip": str(CLIPS / "triangle.mp4"), "question": "what sound do you hear?"},
]
BROKEN = {"id": "broken", "clip": "no.mp4", "question": "which color moves?"}
PLANS = "fastav,fastv@0.3"


@pytest.fixture(scope="module", autouse=True)
def loaded_once():
    """The embedded model, which every command here would load anew."""
    pipe = fastav.pipeline(device="cpu")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fastav.evaluate.answers.Setup, "load", lambda _: pipe)
        yield pipe


def written(path: Path, *entries: Any) -> str:
    path.write_text("".join(json.dumps(entry) + "\n" for entry in entries), encoding="utf-8")
    return str(path)


@pytest.fixture
def asked(tmp_path) -> str:
    return written(tmp_path / "questions.jsonl", *QUESTIONS)


def verify(asked: str, *options: str) -> tuple[str, ...]:
    return ("verify", "tiny", asked, "--device", "cpu", "--plan", PLANS, *options)


@pytest.fixture(scope="module")
def made(loaded_once, tmp_path_factory) -> Path:
    """The folder of a verification that nothing disturbed."""
    folder = tmp_path_factory.mktemp("made")
    asked = written(folder / "questions.jsonl", *QUESTIONS)
    assert main([*verify(asked), "--out", str(folder / "rows.jsonl")]) == 0
    return folder


@pytest.fixture
def rows(made, tmp_path) -> Path:
    return shutil.copy(made / "rows.jsonl", tmp_path / "rows.jsonl")


def measures(path: Path) -> dict[Any, Any]:
    """What the rows say, without seconds and memory."""
    return {
        row.id: (
            row.unpruned.text,
            {name: (one.answer.text, one.exact, one.first_token, one.kl["mean"]) for name, one in row.plans.items()},
        )
        for row in read(path).rows
    }


def assert_same(path: Path, other: Path) -> None:
    found, expected = measures(path), measures(other)
    assert found.keys() == expected.keys()
    for id_, (text, plans) in expected.items():
        assert found[id_][0] == text
        for name, (*answer, kl) in plans.items():
            *same, divergence = found[id_][1][name]
            assert same == answer
            assert divergence == pytest.approx(kl, abs=1e-4)


def test_rows_hold_what_the_pipeline_answers(made, loaded_once):
    rows = {row.id: row for row in read(made / "rows.jsonl").rows}
    assert list(rows) == ["colour", 7, 3]
    request = fastav.Request(clip=QUESTIONS[1]["clip"], question=QUESTIONS[1]["question"], use="video")
    row = rows[7]
    unpruned, pruned = (loaded_once(request, plan=plan) for plan in ("none", "fastav"))
    assert row.unpruned.text == unpruned.text
    assert row.unpruned.kept == {"video": 1, "media": 1}
    found = row.plans["fastav"]
    assert found.answer.text == pruned.text
    assert found.exact == (pruned.text == unpruned.text)
    assert found.answer.flops == {"full": pruned.flops.full, "pruned": pruned.flops.pruned}
    assert found.answer.kv_bytes == {"full": pruned.kv_bytes.full, "pruned": pruned.kv_bytes.pruned}
    layers = [layer["video"] for layer in pruned.tokens_per_layer]
    assert found.answer.kept["video"] == pytest.approx(sum(layers) / len(layers) / pruned.prompt_tokens["video"])
    assert found.answer.seconds.keys() == pruned.seconds.keys()
    assert 0 < found.kl["mean"] <= found.kl["max"]


def test_the_plan_none_against_itself_diverges_by_nothing(asked, capsys):
    """Both runs do the same, so logits differ by 1e-5 at most where memory is aligned otherwise, and KL by 5e-11."""
    report = json.loads(stdout(capsys, *verify(asked, "--plan", "none", "--json")))
    none = report["plans"]["none"]
    assert none["kl"]["max"] < 1e-9
    assert none["exact"]["mean"] == none["rouge_l"]["mean"] == none["flops_ratio"] == none["kept"]["media"] == 1


def test_rows_are_the_same_in_any_batch(made, asked, tmp_path):
    out = tmp_path / "together.jsonl"
    assert main([*verify(asked), "--batch", "3", "--out", str(out)]) == 0
    assert_same(out, made / "rows.jsonl")


def test_the_json_has_a_schema_and_every_measure(asked, rows, capsys):
    report = json.loads(stdout(capsys, *verify(asked, "--out", str(rows), "--json", "--max-kl", "99")))
    assert report["schema_version"] == 1
    assert (report["questions"], report["answered"], report["failures"], report["choice"]) == (3, 3, [], None)
    assert report["thresholds"] == {"max_kl": 99, "min_agreement": None}
    plan = report["plans"]["fastav"]
    assert plan["unmet"] == []
    assert plan.keys() >= {"n", "exact", "first_token", "rouge_l", "kl", "kept", "flops_ratio", "kv_ratio", "seconds"}
    assert all(one["pruned"] != one["unpruned"] for one in report["differences"])


def test_the_screen_fits_80_columns(asked, rows, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    out = stdout(capsys, *verify(asked, "--out", str(rows)))
    assert max(map(len, out.splitlines())) <= 80
    for word in (
        "tiny on 3 questions, cpu, float32",
        "same answer",
        "ROUGE-L",
        "KL",
        "retention",
        "unpruned",
        "commit",
    ):
        assert word in out


# --- thresholds


def test_a_threshold_that_is_not_met_is_named_and_is_the_exit_code(asked, rows, capsys):
    options = ("--out", str(rows), "--json", "--max-kl", "1e-9", "--min-agreement", "0")
    assert main(verify(asked, *options)) == command.EXIT_NOT_MET == 1
    out, err = capsys.readouterr()
    assert json.loads(out)["plans"]["fastav"]["unmet"]
    assert "fastav does not meet the thresholds: the KL divergence is" in err
    assert "above 1e-09" in err
    assert main(verify(asked, "--out", str(rows), "--max-kl", "99", "--min-agreement", "0")) == 0


def test_the_cheapest_plan_that_meets_the_thresholds_is_chosen(asked, rows, capsys):
    assert main(verify(asked, "--out", str(rows), "--json", "--choose", "--max-kl", "99")) == 0
    out, err = capsys.readouterr()
    choice = json.loads(out)["choice"]
    assert choice["plan"] == "fastv@0.3"
    assert choice["met"] == ["fastav", "fastv@0.3"]
    assert "chosen: fastv@0.3, the lowest prefill FLOPs" in err
    assert "fastav meets them too" in err
    assert main(verify(asked, "--out", str(rows), "--choose", "--max-kl", "1e-12")) == 1
    assert "no plan meets the thresholds on 3 questions" in capsys.readouterr().err


def test_without_plans_a_choice_is_among_presets_and_recipes(asked, monkeypatch, capsys):
    plans, skipped = command._plans("tiny", None, choose=True)
    assert set(plans) >= {"fastav", "fastav-plus", "fastav-trim", "fastv", "vtw", "omnizip"}
    assert skipped == {"trim": "it is the same plan as fastav-trim"}
    few = {name: plans[name] for name in ("fastav", "vtw")}
    monkeypatch.setattr(command, "_plans", lambda *_, choose: (few, skipped) if choose else pytest.fail("no choice"))
    assert main(["verify", "tiny", asked, "--device", "cpu", "--choose", "--min-agreement", "0", "--json"]) == 0
    out, err = capsys.readouterr()
    report = json.loads(out)
    assert report["skipped"] == skipped
    assert "skipped trim: it is the same plan as fastav-trim" in err
    assert report["choice"]["plan"] == "vtw"


def test_plans_that_the_model_cannot_run_are_skipped_with_the_reason(monkeypatch):
    check = fastav.registry.ENGINES["transformers"].check

    def refuse(config, plan, **options):
        if plan.name == "omnizip":
            raise UnsupportedPlan("its encoder's attention is not told", "a hint")
        return check(config, plan, **options)

    monkeypatch.setattr(fastav.registry.ENGINES["transformers"], "check", refuse)
    plans, skipped = command._plans("tiny", None, choose=True)
    assert "omnizip" not in plans
    assert skipped["omnizip"] == "its encoder's attention is not told"


# --- going on


def test_a_stopped_verification_goes_on_where_it_was(asked, rows, made, capsys, monkeypatch):
    lines = rows.read_bytes().splitlines(keepends=True)
    rows.write_bytes(b"".join(lines[:2]) + lines[2][:50])
    measured, plain = [], verification.measure
    monkeypatch.setattr(verification, "measure", lambda *given: measured.extend(given[2]) or plain(*given))
    assert main(verify(asked, "--out", str(rows))) == 0
    assert f"{rows} has 1 question; 2 missing" in capsys.readouterr().err
    assert len(measured) == 2
    assert_same(rows, made / "rows.jsonl")


def test_a_finished_verification_loads_no_model(asked, rows, capsys, monkeypatch):
    monkeypatch.setattr(fastav.evaluate.answers.Setup, "load", lambda _: pytest.fail("loaded"))
    assert "fastv@0.3" in stdout(capsys, *verify(asked, "--out", str(rows)))


def test_ctrl_c_leaves_a_file_that_goes_on(asked, tmp_path, capsys, monkeypatch, made):
    out, plain = tmp_path / "rows.jsonl", verification.measure
    left = iter([True, False])

    def interrupted(*given: Any) -> Any:
        if next(left):
            return plain(*given)
        raise KeyboardInterrupt

    monkeypatch.setattr(verification, "measure", interrupted)
    assert main(verify(asked, "--out", str(out))) == 130
    printed, err = capsys.readouterr()
    assert printed == ""
    assert err.endswith(f"1 question is in {out}; run the same command again to continue\n\ninterrupted\n")
    monkeypatch.undo()
    monkeypatch.setattr(fastav.evaluate.answers.Setup, "load", lambda _: fastav.pipeline(device="cpu"))
    assert main(verify(asked, "--out", str(out))) == 0
    assert_same(out, made / "rows.jsonl")


@pytest.mark.parametrize(
    ("changes", "found"),
    [
        (("--plan", "fastav"), "has rows of other plans"),
        (("--max-new-tokens", "9"), "has rows of the max_new_tokens 128, not 9"),
        (("--dtype", "bfloat16"), "has rows of the dtype 'float32'"),
        (("--use", "audio"), "has rows of the questions"),
    ],
)
def test_another_verification_s_file_is_refused(asked, rows, capsys, changes, found):
    before = rows.read_bytes()
    options = ("--device", "cpu", "--plan", PLANS) if changes[0] != "--plan" else ("--device", "cpu")
    assert found in failure(capsys, "verify", "tiny", asked, *options, *changes, "--out", str(rows))
    assert rows.read_bytes() == before


# --- failures


def test_a_question_that_fails_ends_it_by_name(tmp_path, capsys):
    asked = written(tmp_path / "questions.jsonl", BROKEN)
    err = failure(capsys, *verify(asked))
    assert "error: question 'broken' under plan 'unpruned': " in err
    assert "no.mp4" in err
    assert "hint: --keep-going" in err


def test_keep_going_counts_failures_is_exit_code_1_and_tries_them_again(tmp_path, capsys):
    asked, out = written(tmp_path / "questions.jsonl", QUESTIONS[0], BROKEN, QUESTIONS[2]), tmp_path / "rows.jsonl"
    for _ in range(2):
        assert main(verify(asked, "--out", str(out), "--keep-going", "--batch", "2", "--json")) == 1
        printed, err = capsys.readouterr()
        report = json.loads(printed)
        assert (report["questions"], report["answered"], report["plans"]["fastav"]["n"]) == (3, 2, 2)
        assert [(one["id"], one["plan"]) for one in report["failures"]] == [("broken", "unpruned")]
        assert "1 answer failed; the first is of question broken under unpruned: " in err
    assert out.read_text().count('"broken"') == 2


def test_a_plan_that_fails_on_a_question_leaves_the_others(asked, loaded_once, monkeypatch, tmp_path, capsys):
    generate = type(loaded_once.engine).generate

    def failing(self, requests, plan, **options):
        if plan.name.startswith("fastv") and any("sound" in request.question for request in requests):
            raise FastAVError("no scores", "a hint")
        return generate(self, requests, plan, **options)

    monkeypatch.setattr(type(loaded_once.engine), "generate", failing)
    out = tmp_path / "rows.jsonl"
    assert main(verify(asked, "--keep-going", "--batch", "3", "--out", str(out), "--json")) == 1
    report = json.loads(capsys.readouterr().out)
    assert [report["plans"][name]["n"] for name in ("fastav", "fastv@0.3")] == [3, 2]
    assert report["failures"][0]["error"] == "no scores (a hint)"
    assert main(verify(asked, "--out", str(out), "--keep-going", "--choose", "--max-kl", "99")) == 0
    assert "chosen: fastav" in capsys.readouterr().err
    rows = {row.id: row for row in read(out).rows}
    assert rows[3].plans["fastv@0.3"].error == "no scores (a hint)"
    assert rows["colour"].plans["fastv@0.3"].error is None


# --- bad input


@pytest.mark.parametrize(
    ("changes", "found"),
    [
        (("--plan", "fastaw"), "did you mean"),
        (("--choose",), "--choose needs a threshold"),
        (("--max-kl", "-1"), "max_kl must be 0 or more, got -1.0"),
        (("--min-agreement", "90"), "min_agreement must be in [0, 1], got 90.0"),
        (("--html", "no/such/page.html"), "the folder no/such does not exist"),
        (("--html", "."), "is a folder"),
        (("--device", "abacus"), "abacus"),
        (("--out", __file__), "is not a file of rows"),
    ],
)
def test_bad_options_are_refused_before_weights_load(asked, changes, found, capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(fastav.evaluate.answers.Setup, "load", lambda _: pytest.fail("loaded"))
    assert found in failure(capsys, "verify", "tiny", asked, *changes)


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("nonsense", "line 1 of"),
        ('{"clip": "a.mp4", "question": ""}', "the question is empty"),
        ("", "has no questions"),
    ],
)
def test_bad_lines_are_refused_as_by_batch(tmp_path, capsys, text, found):
    path = tmp_path / "questions.jsonl"
    path.write_text(text)
    told = failure(capsys, "verify", "tiny", str(path), "--device", "cpu")
    assert found in told
    assert told == failure(capsys, "batch", str(path), "--out", str(tmp_path / "answers.jsonl"))


def test_the_library_refuses_too(asked):
    options: dict[str, Any] = {"device": "cpu"}
    with pytest.raises(FastAVError, match="max_new_tokens must be at least 1"):
        Verification.of("tiny", Path(asked), {"none": NONE}, max_new_tokens=0, **options)
    with pytest.raises(FastAVError, match="batch must be at least 1"):
        next(Verification.of("tiny", Path(asked), {"none": NONE}, **options).rows(batch=0))


# --- the page


def test_the_page_is_written_whole(asked, rows, tmp_path, capsys):
    page = tmp_path / "report.html"
    stdout(capsys, *verify(asked, "--out", str(rows), "--html", str(page)))
    html = page.read_text(encoding="utf-8")
    assert "With fastav, " in html
    assert html.rstrip().endswith("</html>")
    assert "http" not in html.replace("http-equiv", "")
