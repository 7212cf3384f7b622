"""`fastav batch`: a file of questions in, a file of answers out, and on from where it stopped."""

import json
from importlib.resources import files
from pathlib import Path
from typing import Any

import pytest

import fastav
from fastav.cli import batch, main
from support.command import failure

CLIPS = Path(str(files("fastav") / "assets" / "clips"))
TRIANGLE, KNOCK = str(CLIPS / "triangle.mp4"), str(CLIPS / "knock.mp4")
QUESTIONS = [
    {"id": "colour", "clip": TRIANGLE, "question": "which color moves?"},
    {"id": 7, "clip": KNOCK, "question": "describe the clip.", "use": "video", "answer": "is ignored"},
    {"clip": TRIANGLE, "question": "what sound do you hear?"},
]
IDS = ["colour", 7, 3]


@pytest.fixture(scope="module", autouse=True)
def loaded_once():
    """The embedded model, which every command here would load anew."""
    pipe = fastav.pipeline(device="cpu")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(batch, "load_pipeline", lambda model, plans, *_: _with_plan(pipe, plans[0]))
        yield


def _with_plan(pipe: Any, plan: str) -> Any:
    return fastav.Pipeline(pipe.engine, fastav.pipelines.plan_named(plan, pipe.adapter), pipe.adapter)


@pytest.fixture
def asked(tmp_path) -> Path:
    return written(tmp_path / "questions.jsonl", *QUESTIONS)


def written(path: Path, *entries: Any) -> Path:
    path.write_text("".join(json.dumps(entry) + "\n" for entry in entries), encoding="utf-8")
    return path


def answers(path: Path) -> dict[Any, dict[str, Any]]:
    lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    found = {line["id"]: line for line in lines}
    assert len(found) == len(lines)
    return found


def run(asked: Path, out: Path, *options: str) -> int:
    return main(["batch", str(asked), "--out", str(out), "--batch", "2", *options])


def test_every_question_has_its_line(asked, tmp_path, capsys):
    assert run(asked, tmp_path / "a.jsonl") == 0
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("3 answers in ")
    found = answers(tmp_path / "a.jsonl")
    assert set(found) == set(IDS)
    line = found["colour"]
    assert line["text"] == "green"
    assert line["finish"] == "stop"
    assert set(line["prompt_tokens"]) == {"video", "audio", "text"}
    assert line["new_tokens"] == 1
    assert line["flops"]["ratio"] < 1
    assert (line["model"], line["plan"]) == ("tiny", "fastav")
    assert set(found[7]["prompt_tokens"]) == {"video", "text"}


def test_options_reach_the_model(asked, tmp_path):
    options = ("--plan", "none", "--use", "audio", "--max-new-tokens", "1", "--temperature", "2", "--seed", "3")
    assert run(asked, tmp_path / "a.jsonl", *options) == 0
    found = answers(tmp_path / "a.jsonl")
    assert found["colour"]["flops"]["ratio"] == 1
    assert [set(found[name]["prompt_tokens"]) - {"text"} for name in IDS] == [{"audio"}, {"video"}, {"audio"}]
    assert all(line["new_tokens"] <= 1 for line in found.values())


def test_a_text_stops_answers(asked, tmp_path):
    assert run(asked, tmp_path / "a.jsonl") == 0
    word = answers(tmp_path / "a.jsonl")[7]["text"].split()[2]
    assert run(asked, tmp_path / "b.jsonl", "--stop", word, "--stop", "never") == 0
    assert (
        answers(tmp_path / "b.jsonl")[7]["text"] == answers(tmp_path / "a.jsonl")[7]["text"].partition(word)[0].strip()
    )


# --- going on


def test_what_is_answered_is_not_asked_again(asked, tmp_path, capsys):
    out = tmp_path / "a.jsonl"
    assert run(asked, out) == 0
    before = out.read_bytes()
    capsys.readouterr()
    assert run(asked, out) == 0
    assert out.read_bytes() == before
    assert capsys.readouterr().err == f"{out} has 3 answers; 0 missing\n"


@pytest.mark.parametrize("cut", [1, 40])
def test_a_last_line_that_was_cut_off_is_asked_again(asked, tmp_path, cut):
    out = tmp_path / "a.jsonl"
    assert run(asked, out) == 0
    before = out.read_bytes()
    out.write_bytes(before[:-cut])
    assert run(asked, out) == 0
    assert out.read_bytes() == before


def test_ctrl_c_leaves_a_file_that_goes_on(asked, tmp_path, capsys, monkeypatch):
    out, plain = tmp_path / "a.jsonl", fastav.Pipeline.map

    def interrupted(*arguments: Any, **options: Any) -> Any:
        outcomes = plain(*arguments, **options)
        yield next(outcomes)
        outcomes.close()
        raise KeyboardInterrupt

    monkeypatch.setattr(fastav.Pipeline, "map", interrupted)
    assert run(asked, out) == 130
    assert f"answers so far are in {out}" in capsys.readouterr().err.replace("\n", " ")
    assert len(answers(out)) == 1
    monkeypatch.undo()
    monkeypatch.setattr(batch, "load_pipeline", lambda *_: _with_plan(fastav.pipeline(device="cpu"), "fastav"))
    assert run(asked, out) == 0
    assert set(answers(out)) == set(IDS)


def test_what_failed_is_tried_again(tmp_path, capsys):
    clip = tmp_path / "late.mp4"
    asked = written(tmp_path / "questions.jsonl", {"clip": "late.mp4", "question": "which color moves?"}, QUESTIONS[0])
    assert run(asked, tmp_path / "a.jsonl") == batch.EXIT_SOME_FAILED == 1
    assert "1 failed; the first is 1: " in capsys.readouterr().err
    failed = answers(tmp_path / "a.jsonl")
    assert "late.mp4" in failed[1]["error"]
    assert set(failed[1]) == {"id", "error", "model", "plan", "fingerprint"}
    assert failed["colour"]["text"] == "green"
    clip.write_bytes(Path(TRIANGLE).read_bytes())
    assert run(asked, tmp_path / "a.jsonl") == 0
    assert {line["text"] for line in answers(tmp_path / "a.jsonl").values()} == {"green"}


def test_answers_of_another_model_or_plan_are_not_mixed(asked, tmp_path, capsys):
    out = tmp_path / "a.jsonl"
    assert run(asked, out) == 0
    capsys.readouterr()
    arguments = ("batch", str(asked), "--out", str(out))
    assert "of the plan fastav (" in failure(capsys, *arguments, "--plan", "none")
    assert "answers of tiny, not tiny-long" in failure(capsys, *arguments, "--model", "tiny-long")


# --- bad input


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "has no questions"),
        ("\n\n", "has no questions"),
        ('{"clip": "a", "question": "b"}\n{"clip": "a", ', "line 2 of"),
        ('{"clip": "a", "question": "b"}\n[]', "line 2 of"),
        ('{"clip": "a"}', "question must be a string"),
        ('{"clip": "a", "question": ""}', "the question is empty"),
        ('{"clip": "a", "question": " "}', "the question is empty"),
        ('{"clip": 3, "question": "b"}', "clip must be a string, got 3"),
        ('{"clip": "a", "question": "b", "use": "smell"}', "use must be"),
        ('{"clip": "a", "question": "b", "id": true}', "id must be"),
        (
            '{"clip": "a", "question": "b", "id": 2}\n{"clip": "a", "question": "b"}',
            "the id 2 is already used on line 1",
        ),
    ],
)
def test_questions_that_cannot_be_read(content, message, tmp_path, capsys):
    path = tmp_path / "q.jsonl"
    path.write_text(content)
    assert message in failure(capsys, "batch", str(path), "--out", str(tmp_path / "a.jsonl"))
    assert not (tmp_path / "a.jsonl").exists()


def test_a_file_that_is_no_text_or_not_there(tmp_path, capsys):
    path = tmp_path / "q.jsonl"
    assert "cannot read" in failure(capsys, "batch", str(path), "--out", "a.jsonl")
    path.write_bytes(b"\xff\xfe")
    assert "not UTF-8" in failure(capsys, "batch", str(path), "--out", "a.jsonl")


def test_answers_that_have_no_place(asked, tmp_path, capsys):
    assert "is a folder" in failure(capsys, "batch", str(asked), "--out", str(tmp_path))
    assert "does not exist" in failure(capsys, "batch", str(asked), "--out", str(tmp_path / "no" / "a.jsonl"))


def test_questions_are_not_written_over(asked, capsys):
    before = asked.read_bytes()
    assert "not an answer of fastav batch" in failure(capsys, "batch", str(asked), "--out", str(asked))
    assert asked.read_bytes() == before


@pytest.mark.parametrize("command", ["run", "batch"])
@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--temperature", "-1"), "temperature must be"),
        (("--temperature", "1", "--top-p", "3"), "top_p must be"),
        (("--seed", "1"), "set a temperature"),
        (("--repetition-penalty", "0"), "repetition_penalty must be"),
        (("--stop", ""), "stop_strings must be"),
    ],
)
def test_bad_sampling(command, options, message, asked, tmp_path, capsys):
    arguments = ("run", TRIANGLE, "what?") if command == "run" else ("batch", str(asked), "--out", str(tmp_path / "a"))
    assert message in failure(capsys, *arguments, *options)


def test_sampling_of_one_answer(capsys):
    ask = ("run", KNOCK, "describe the clip.", "--json", "--device", "cpu", "--temperature", "3", "--seed")
    texts = []
    for seed in ("1", "1", "2"):
        assert main([*ask, seed]) == 0
        texts.append(json.loads(capsys.readouterr().out)["text"])
    assert texts[0] == texts[1] != texts[2]


def test_help_fits_80_columns(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    assert main(["batch", "--help"]) == 0
    assert max(map(len, capsys.readouterr().out.splitlines())) <= 80
