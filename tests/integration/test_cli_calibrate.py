"""`fastav calibrate` on the embedded model."""

import errno
import json
import shutil
import signal
import subprocess
import sys
import time
from importlib.resources import files
from pathlib import Path

import numpy as np
import pytest

import fastav
from fastav.calibrate import Calibration, Criterion, Store
from fastav.cli import main
from fastav.plan import Plan
from support.command import failure

CLIPS = Path(str(files("fastav"))) / "assets" / "clips"
QUESTIONS = ("describe the clip.", "how many beeps do you hear?")


@pytest.fixture
def folder(tmp_path) -> Path:
    """A folder to work in, with two clips and two questions."""
    return filled(tmp_path)


@pytest.fixture(scope="module")
def calibrated(tmp_path_factory) -> Path:
    """Such a folder with a plan, in which nothing is written any more."""
    folder = filled(tmp_path_factory.mktemp("calibrated"))
    assert main(command(folder)) == 0
    return folder


def filled(folder: Path) -> Path:
    (folder / "clips").mkdir()
    for name in ("knock", "triangle"):
        shutil.copy(CLIPS / f"{name}.mp4", folder / "clips")
    (folder / "questions.txt").write_text("\n".join(QUESTIONS))
    return folder


def command(folder: Path, *options: str) -> list[str]:
    shown = [str(folder / "clips"), "--questions", str(folder / "questions.txt")]
    return ["calibrate", "tiny", *shown, "--out", str(folder / "plan.json"), "--budget", "0.65", *options]


def test_a_plan_comes_out_that_runs(folder, capsys):
    assert main(command(folder)) == 0
    out = capsys.readouterr().out
    assert "(rule even)" in out
    assert f"try fastav run CLIP QUESTION --model tiny --plan {folder / 'plan.json'}\n" in out
    plan = Plan.load(folder / "plan.json")
    assert plan.origin is not None
    assert (plan.origin["model"], plan.origin["clips"], plan.origin["prompts"]) == ("tiny", 2, 4)
    assert plan.origin["criterion"]["budget"] == 0.65
    assert plan.origin["versions"].keys() >= {"torch", "transformers"}
    clip = str(folder / "clips" / "knock.mp4")
    assert main(["run", clip, QUESTIONS[0], "--plan", str(folder / "plan.json"), "--json"]) == 0
    answer = json.loads(capsys.readouterr().out)
    assert 0.6 < answer["flops"]["ratio"] <= 0.66
    result = Store(folder / "plan.calibration").result()
    assert [one["plan"] for one in result["answers"]] == ["none", "calibrated"]
    assert len(result["prompts"]) == 4


def test_the_same_command_looks_at_nothing_twice_and_other_rules_use_what_was_seen(folder, capsys, monkeypatch):
    assert main(command(folder, "--json")) == 0
    first = json.loads(capsys.readouterr().out)
    looked = []
    plain = Calibration._trace
    monkeypatch.setattr(Calibration, "_trace", lambda self, *what: looked.append(what) or plain(self, *what))
    assert main(command(folder, "--json")) == 0
    again = json.loads(capsys.readouterr().out)
    for report in (first, again):
        report["plan"]["origin"].pop("date")
    assert again == first
    assert [plan.name for _, plan in looked] == ["calibrated"], "only the plan is tried again"
    assert main(command(folder, "--rule", "rollout", "--start", "4", "--drop", "10", "--json")) == 0
    other = json.loads(capsys.readouterr().out)
    assert (other["rule"], other["start"]) == ("rollout", 4)
    assert len(looked) == 2


def test_a_clip_that_fails_is_named_and_skipped_only_if_asked(folder, capsys):
    (folder / "clips" / "broken.mp4").write_bytes(b"no clip")
    err = failure(capsys, *command(folder))
    assert "broken.mp4" in err
    assert "--keep-going" in err
    assert not (folder / "plan.json").exists()
    assert main(command(folder, "--keep-going")) == 0
    assert "skipped" in capsys.readouterr().err
    plan = Plan.load(folder / "plan.json")
    assert plan.origin is not None
    assert plan.origin["clips"] == 2
    assert len(Store(folder / "plan.calibration").result()["failures"]) == 2


def test_nothing_but_broken_clips_gives_no_plan(folder, capsys):
    for path in (folder / "clips").iterdir():
        path.write_bytes(b"no clip")
    assert "no prompt could be traced" in failure(capsys, *command(folder, "--keep-going"))
    assert not (folder / "plan.json").exists()


def test_a_calibrated_plan_is_refused_by_other_models(calibrated, capsys):
    plan = str(calibrated / "plan.json")
    err = failure(capsys, "flops", "videollama2", "--plan", plan)
    assert "was calibrated for tiny" in err
    assert "fastav calibrate" in err


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--budget", "0.2"], "cannot be reached"),
        (["--budget", "1.5"], "budget must be in"),
        (["--start", "last"], "--start must be"),
        (["--start", "12"], "a layer from 1 to 11"),
        (["--alpha", "0"], "alpha must be in"),
        (["--out", "plan.txt"], "must end in .json"),
        (["--drop", "120"], "--drop must be"),
        (["--rule", "frames"], "frames does not fit"),
    ],
)
def test_bad_settings_are_refused_in_one_line(folder, capsys, options, said):
    assert said in failure(capsys, *command(folder, *options))
    assert not (folder / "plan.json").exists()


def test_other_settings_of_the_rollout_need_another_folder(calibrated, capsys, tmp_path):
    assert "with alpha 0.5, not 0.8" in failure(capsys, *command(calibrated, "--alpha", "0.8"))
    elsewhere = ("--work", str(tmp_path / "other"), "--out", str(tmp_path / "plan.json"))
    assert main(command(calibrated, "--alpha", "0.8", *elsewhere)) == 0


def interrupted(folder: Path, written: Path, pattern: str) -> str:
    """What a calibration prints to stderr that gets a Ctrl-C as soon as a folder has three such files."""
    script = "import sys; from fastav.cli import main; sys.exit(main())"
    process = subprocess.Popen(
        [sys.executable, "-c", script, *command(folder)],
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    deadline = time.monotonic() + 300
    while not (written.exists() and len(list(written.glob(pattern))) > 2):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    assert "run the same command again to continue" in err
    assert "Traceback" not in err
    return err


def test_ctrl_c_loses_nothing_that_was_seen(folder):
    shutil.copy(CLIPS / "silence.mp4", folder / "clips")
    (folder / "questions.txt").write_text("\n".join(f"describe the clip. {'very ' * n}" for n in range(40)))
    prompts = folder / "plan.calibration" / "prompts"
    assert "the traces so far are in" in interrupted(folder, prompts, "*.npz")
    assert not (folder / "plan.json").exists()
    assert not list(prompts.glob("*.part"))
    for path in prompts.glob("*.npz"):
        trace = Store(folder / "plan.calibration").load(path.stem).trace
        assert np.isfinite(trace.rollout).all()


def test_every_prompt_is_answered_by_both_plans_in_turn(folder, capsys, monkeypatch):
    asked = []
    plain = Calibration._answer
    monkeypatch.setattr(
        Calibration, "_answer", lambda self, *what: asked.append((what[0].key, what[1].name)) or plain(self, *what)
    )
    assert main(command(folder, "--json")) == 0
    answers = json.loads(capsys.readouterr().out)["answers"]
    store = Store(folder / "plan.calibration")
    keys = store.result()["prompts"]
    warm_up = [(keys[0], "none"), (keys[0], "calibrated")]
    assert asked == warm_up + [(key, name) for key in keys for name in ("none", "calibrated")]
    assert (answers["n"], answers["prompts"], answers["noisy"]) == (4, 4, True)
    comparison = store.comparison()
    assert comparison is not None
    assert json.loads(json.dumps(comparison.summary())) == answers
    pipe = fastav.pipeline("tiny", Plan.load(folder / "plan.json"))
    for pair in comparison.pairs:
        clip = folder / "clips" / pair.clip
        for stored, plan in ((pair.unpruned, "none"), (pair.pruned, None)):
            said = pipe(clip, pair.question, plan=plan, max_new_tokens=64)
            assert (stored["text"], stored["token_ids"]) == (said.text, list(said.token_ids))
            assert stored["seconds"]["prefill"] > 0
    same = sum(pair.unpruned["text"] == pair.pruned["text"] for pair in comparison.pairs)
    assert answers["exact"]["mean"] == same / 4
    assert len(answers["differences"]) == 4 - same
    assert answers["flops_ratio"] == pytest.approx(0.65, abs=0.03)
    capsys.readouterr()
    assert main(command(folder, "--report", str(folder / "r.html"))) == 0
    assert len(asked) == 10, "answers are stored"
    out = capsys.readouterr().out
    assert f"answers: {same} of 4 equal the unpruned ones (95 % interval " in out
    assert "measured time: prefill " in out
    assert "noisy because few" in out
    assert f"{same} of 4" in (folder / "r.html").read_text()


def test_ctrl_c_loses_no_answer(folder, capsys, monkeypatch):
    (folder / "questions.txt").write_text("\n".join(f"describe the clip. {'very ' * n}" for n in range(8)))
    written = folder / "plan.calibration" / "answers"
    assert "the answers so far are in" in interrupted(folder, written, "*.json")
    assert not (folder / "plan.json").exists()
    assert not list(written.glob("*.part"))
    before = {path.name: path.read_bytes() for path in written.iterdir()}
    answered = []
    plain = Calibration._pair
    monkeypatch.setattr(Calibration, "_pair", lambda self, *what: answered.append(what[0]) or plain(self, *what))
    assert main(command(folder, "--json")) == 0
    assert json.loads(capsys.readouterr().out)["answers"]["n"] == 16
    assert len(answered) == 16 - len(before)
    assert {path.name: path.read_bytes() for path in written.iterdir() if path.name in before} == before


def test_fewer_prompts_are_answered_if_asked_or_none(folder, capsys):
    assert main(command(folder, "--answers", "0", "--report", str(folder / "r.html"), "--json")) == 0
    assert json.loads(capsys.readouterr().out)["answers"] is None
    assert not (folder / "plan.calibration" / "answers").exists()
    assert Store(folder / "plan.calibration").comparison() is None
    assert "has no answers of all prompts" in (folder / "r.html").read_text()
    assert main(command(folder, "--answers", "2", "--report", str(folder / "r.html"), "--json")) == 0
    answers = json.loads(capsys.readouterr().out)["answers"]
    assert (answers["n"], answers["prompts"]) == (2, 4)
    assert "2 of 4\N{NO-BREAK SPACE}prompts, evenly spread" in (folder / "r.html").read_text()
    keys = Store(folder / "plan.calibration").result()["prompts"]
    kept = {path.name[:16] for path in (folder / "plan.calibration" / "answers").iterdir()}
    assert kept == {keys[0], keys[3]}
    assert "--answers" in failure(capsys, *command(folder, "--answers", "-1"))


def test_a_prompt_that_cannot_be_answered_ends_the_run_or_is_listed(folder, capsys, monkeypatch):
    plain = Calibration._answer

    def fails(self, prompt, plan, *rest):
        if prompt.question == QUESTIONS[1] and plan.name == "calibrated":
            raise RuntimeError("out of luck")
        return plain(self, prompt, plan, *rest)

    monkeypatch.setattr(Calibration, "_answer", fails)
    err = failure(capsys, *command(folder))
    assert "out of luck" in err
    assert "--keep-going" in err
    assert not (folder / "plan.json").exists()
    assert main(command(folder, "--keep-going", "--report", str(folder / "r.html"), "--json")) == 0
    out, err = capsys.readouterr()
    assert err.count("out of luck") == 2
    report = json.loads(out)
    assert (report["answers"]["n"], report["failures"]) == (2, 2)
    assert {one["question"] for one in report["answers"]["failures"]} == {QUESTIONS[1]}
    assert Store(folder / "plan.calibration").result()["failures"] == []
    html = (folder / "r.html").read_text()
    assert "Prompts without an answer" in html
    assert "Prompts that failed" not in html


def test_answers_that_cannot_be_written_are_no_prompts_fault(folder, capsys, monkeypatch):
    def full(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Store, "save_pair", full)
    assert "No space left on device" in failure(capsys, *command(folder, "--keep-going"))
    assert not (folder / "plan.json").exists()


def test_finish_alone_answers_the_prompts(folder):
    calibration = Calibration.of("tiny", [folder / "clips"], folder=folder / "cal", device="cpu")
    assert len(list(calibration.run())) == 2
    choice = calibration.choose(Criterion(budget=0.65))
    assert len(calibration.unanswered(choice)) == 2
    first = next(calibration.answer(choice, max_new_tokens=3))
    assert [first, *calibration.unanswered(choice, max_new_tokens=3)] == calibration.prompts
    assert len(calibration.unanswered(choice, max_new_tokens=4)) == 2
    assert calibration.finish(Criterion(budget=0.65), max_new_tokens=3).plan.steps == choice.plan.steps
    comparison = calibration.store.comparison()
    assert comparison is not None
    assert [pair.clip for pair in comparison.pairs] == [prompt.clip.name for prompt in calibration.prompts]
    assert comparison.max_new_tokens == 3


def test_a_full_disk_is_no_clips_fault(folder, capsys, monkeypatch):
    def full(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("fastav.calibrate.store.np.savez", full)
    err = failure(capsys, *command(folder, "--keep-going"))
    assert "No space left on device" in err
    assert "free some disk space" in err
    assert not list((folder / "plan.calibration" / "prompts").iterdir())
    assert not (folder / "plan.json").exists()
