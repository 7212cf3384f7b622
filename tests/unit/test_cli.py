"""The command line without any model."""

import errno
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress

import pytest
import typer

from fastav import presets
from fastav.budgets import Before, Share, Tokens
from fastav.cli import COMMANDS as HEADINGS
from fastav.cli import _chart, _help, _plans, _render, _text, main
from fastav.cli._output import write_file
from fastav.cli._progress import progress
from fastav.cli.run import out_of_memory_as_error
from fastav.errors import FastAVError, PlanError
from fastav.formatting import plural
from fastav.layout import Layout, Modality
from fastav.plan import Keep, Plan
from fastav.registry import MODELS

FASTAV = presets.fastav(Keep(audio=Tokens(10)))
COMMANDS = [[], ["run"], ["flops"], ["plan"], ["plan", "show"], ["plan", "write"], ["models"], ["methods"], ["recipes"]]
COMMANDS += [["batch"], ["bench"], ["eval"], ["leaderboard"], ["serve-config"]]


def fastav(*arguments: str, code: str = "sys.exit(main())", **options) -> subprocess.CompletedProcess:
    script = f"import sys; from fastav.cli import main; {code}"
    return subprocess.run([sys.executable, "-c", script, *arguments], text=True, timeout=60, **options)


def failure(capsys: pytest.CaptureFixture, arguments: Sequence[str]) -> list[str]:
    """Lines on stderr of a command that must exit with 2 and leave stdout empty."""
    assert main(arguments) == 2
    out, err = capsys.readouterr()
    assert out == ""
    return err.splitlines()


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_help_fits_80_columns(command, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    assert main([*command, "--help"]) == 0
    out = capsys.readouterr().out
    assert out.startswith("Usage: fastav")
    assert max(map(len, out.splitlines())) <= 80


@pytest.mark.parametrize("columns", ["80", "110"])
def test_the_list_of_commands_tells_whole_sentences(columns, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", columns)
    assert main(["--help"]) == 0
    out = capsys.readouterr().out
    assert "..." not in out.partition("\n")[2]
    told = " ".join(out.split())
    for commands in HEADINGS.values():
        for name, command in commands.items():
            text = command.info.help if isinstance(command, typer.Typer) else command.__doc__
            assert f"{name} {text.partition(chr(10))[0]}" in told


def test_help_imports_nothing_heavy_and_is_quick():
    loaded = "main(); print(*({'torch', 'transformers', 'numpy'} & set(sys.modules)), file=sys.stderr)"
    start = time.perf_counter()
    done = fastav("--help", code=loaded, capture_output=True)
    assert done.stderr == "\n"
    assert time.perf_counter() - start < 5  # 0.2 s on an idle machine; an import of torch shows in the line above


def test_no_command_shows_the_help(capsys):
    assert main([]) == 0
    assert "Answer questions:\n  run " in capsys.readouterr().out


def test_version(capsys):
    assert main(["--version"]) == 0
    assert capsys.readouterr().out.startswith("fastav ")


@pytest.mark.parametrize(
    ("arguments", "found"),
    [
        (["nonsense"], "nonsense"),
        (["run", "clip.mp4"], "QUESTION"),
        (["run", "clip.mp4", "q", "--max-new-tokens", "0"], "--max-new-tokens"),
        (["run", "clip.mp4", "q", "--dtype", "int3"], "--dtype"),
        (["run", "clip.mp4", "q", "--use", "smell"], "--use"),
        (["run", "clip.mp4", "q", "--repeat", "2"], "--repeat"),
        (["flops", "--text-tokens", "0"], "--text-tokens"),
        (["flops", "--keep-audio", "-1"], "--keep-audio"),
        (["plan", "write", "fastav"], "--out"),
    ],
)
def test_bad_usage_is_one_error_and_one_hint(arguments, found, capsys):
    error, hint = failure(capsys, arguments)
    assert error.startswith("error: ")
    assert found in error
    assert hint.startswith("hint: ")


def test_an_error_is_one_line_whatever_its_message(capsys):
    assert _text.print_error("first\n  second\x1b[2J", "mend it") == 2
    assert capsys.readouterr().err == "error: first second�[2J\nhint: mend it\n"


def test_ctrl_c_leaves_with_130(capsys, monkeypatch):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("fastav.registry.Registry.items", interrupted)
    assert main(["methods"]) == 130
    assert capsys.readouterr().err == "\ninterrupted\n"


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
def test_a_full_disk_is_an_error():
    with open("/dev/full", "w") as full:
        done = fastav("--help", stdout=full, stderr=subprocess.PIPE)
    assert done.returncode == 2
    assert done.stderr.startswith("error: No space left on device\n")
    assert len(done.stderr.splitlines()) == 2


def test_a_reader_that_leaves_is_no_error():
    reading, writing = os.pipe()
    os.close(reading)
    done = fastav("--help", stdout=writing, stderr=subprocess.PIPE)
    os.close(writing)
    assert done.stderr == ""


def test_methods_lists_names_options_and_needs(capsys):
    assert main(["methods", "--json"]) == 0
    methods = {method["name"]: method for method in json.loads(capsys.readouterr().out)["methods"]}
    assert methods["random"]["options"] == {"seed": 0}
    assert methods["last-query"]["needs"] == ["last-query"]
    assert all(isinstance(method["wants"], list) for method in methods.values())
    assert all(method["summary"].endswith(".") for method in methods.values())
    assert main(["methods"]) == 0
    assert "last-query" in capsys.readouterr().out


def test_recipes_lists_arguments_and_sources(capsys):
    assert main(["recipes", "--json"]) == 0
    recipes = {recipe["name"]: recipe for recipe in json.loads(capsys.readouterr().out)["recipes"]}
    assert recipes["fastv"]["arguments"] == {"keep": 0.5, "layer": 2}
    assert recipes["fastv"]["source"].startswith("arXiv:2403.06764")
    assert all(recipe["source"] and recipe["summary"] for recipe in recipes.values())
    assert main(["recipes"]) == 0
    assert "fastv" in capsys.readouterr().out


def test_a_recipe_is_shown_on_a_model(capsys):
    assert main(["plan", "show", "fastv@0.25", "--json"]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert shown["plan"]["name"] == "fastv@0.25"
    assert shown["tokens_per_layer"][2] == {"text": 44, "media": 543}


# FastAV's settings


@pytest.mark.parametrize(
    ("text", "value"), [("20", 0.2), ("20%", 0.2), ("0.2", 0.2), ("0", 0.0), ("0.5%", 0.005), ("1", 0.01), ("7", 0.07)]
)
def test_a_share_is_written_in_percent_or_not(text, value):
    assert _plans.share(text) == value


@pytest.mark.parametrize("text", ["100", "100%", "-1", "-0.2", "nan", "inf", "much", ""])
def test_no_share(text):
    with pytest.raises(PlanError, match="--drop"):
        _plans.share(text)


def test_nothing_changed_is_the_same_plan():
    assert _plans.tune(FASTAV) is FASTAV


def test_each_setting_changes_what_it_says():
    assert _plans.tune(FASTAV, drop="30") == presets.fastav(Keep(audio=Tokens(10)), drop=0.3)
    assert _plans.tune(FASTAV, drop="0") == presets.fastav(Keep(audio=Tokens(10)), drop=0)
    assert _plans.tune(FASTAV, start="5") == presets.fastav(Keep(audio=Tokens(10)), start=5)
    assert _plans.tune(FASTAV, keep_audio=0) == presets.fastav(Keep(audio=Tokens(0)))
    assert _plans.tune(FASTAV, before=750) == presets.fastav(Keep(media=Before(750)))
    assert _plans.tune(FASTAV, exempt_text=False) == presets.fastav(Keep(audio=Tokens(10)), exempt_text=False)


def test_settings_add_up():
    whole = presets.fastav(Keep(audio=Tokens(3)), start=5, drop=0.1, exempt_text=False)
    by_turns = _plans.tune(FASTAV, exempt_text=False)
    for setting in ({"start": "5"}, {"drop": "10%"}, {"keep_audio": 3}):
        by_turns = _plans.tune(by_turns, **setting)
    assert by_turns == whole
    assert _plans.tune(whole, start="middle").steps[0].layers == "middle"


def test_other_steps_stay():
    trimmed = Plan((*presets.trim().steps, *FASTAV.steps), "fastav-trim")
    varied = _plans.tune(trimmed, drop="30")
    assert varied.steps == (*presets.trim().steps, *presets.fastav(Keep(audio=Tokens(10)), drop=0.3).steps)
    assert varied.name == "fastav-trim"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"keep_audio": 1, "before": 2}, "both set the global cut"),
        ({"start": "center"}, "--start"),
        ({"start": "-1"}, "--start"),
    ],
)
def test_contradictory_or_unreadable_settings(settings, message):
    with pytest.raises(PlanError, match=message):
        _plans.tune(FASTAV, **settings)


def test_a_plan_without_a_global_cut_has_no_settings():
    with pytest.raises(PlanError, match="no global cut"):
        _plans.tune(presets.trim(), drop="10")


def test_tokens_by_layer_add_up_to_the_plan_s_own_count():
    parts = ((Modality.TEXT, 3), (Modality.VIDEO, 40), (Modality.AUDIO, 50), (Modality.TEXT, 7))
    layout = Layout.join(Layout.of(modality, tokens) for modality, tokens in parts)
    layers = FASTAV.by_layer(layout, 6)
    assert tuple(sum(layer.values()) for layer in layers) == FASTAV.tokens(layout, 6)
    assert layers[0] == {"text": 10, "video": 40, "audio": 50}
    assert layers[3] == {"text": 10, "video": 40, "audio": 10}
    assert layers[4] == {"text": 10, "media": 40}


def test_a_lack_of_memory_is_an_error():
    with pytest.raises(FastAVError, match="out of memory"), out_of_memory_as_error():
        raise MemoryError
    with pytest.raises(FastAVError, match="out of memory"), out_of_memory_as_error():
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 1 bytes")
    with pytest.raises(RuntimeError, match="a bug"), out_of_memory_as_error():
        raise RuntimeError("a bug")


# writing


def test_a_plan_is_written_whole_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / "plan.json"
    path.write_text("old")

    def full(_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(FastAVError, match="No space left"):
        write_file(path, "new")
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]
    monkeypatch.undo()
    write_file(path, "new")
    assert path.read_text() == "new"
    assert list(tmp_path.iterdir()) == [path]


# what is drawn


def test_letters_fill_the_bar_and_nothing_vanishes():
    assert _chart.letters({"video": 676, "audio": 1496, "text": 44}, 2216, 60) == {"video": 18, "audio": 41, "text": 1}
    assert _chart.letters({"video": 1, "audio": 100_000, "text": 1}, 100_002, 20) == {
        "video": 1,
        "audio": 18,
        "text": 1,
    }
    assert _chart.letters({"audio": 0, "text": 5}, 10, 20) == {"text": 10}


@pytest.mark.parametrize("width", ["40", "80", "200"])
def test_the_chart_reads_without_colour_at_any_width(width, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", width)
    layers = [{"video": 676, "audio": 1496, "text": 44}] * 2 + [{"media": 300, "text": 44}]
    _text.stdout().print(_chart.chart({"fastav": layers}))
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= int(width)
    assert "\x1b" not in "".join(lines)
    if int(width) >= 80:
        assert lines[1].startswith("0-1 ")
        assert "VA" in lines[1]
        assert lines[2].split()[0] == "2"
        assert "MT" in lines[2]


def test_every_layer_by_itself(capsys):
    _text.stdout().print(_chart.chart({"": [{"text": 4}] * 3}, every_layer=True))
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == ["layer", "0", "1", "2"]


@pytest.mark.parametrize(
    ("shown", "text"),
    [
        (_text.scaled(29_876_543_210_000), "29.9 T"),
        (_text.scaled(999), "999"),
        (_text.scaled(999_700), "1.00 M"),
        (_text.size(71_512_883), "68.2 MiB"),
        (_text.size(None), "unknown"),
        (_text.size(80 * 2**30), "80 GiB"),
        (_text.duration(0.0284), "28 ms"),
        (_text.duration(1.8481), "1.85 s"),
        (_text.duration(123.4), "123 s"),
        (_text.percent(0.5591), "55.9 %"),
        (_text.prompt({"text": 44, "audio": 1496, "video": 676}), "676 video + 1,496 audio + 44 text = 2,216 tokens"),
    ],
)
def test_numbers_have_three_digits_and_a_unit(shown, text):
    assert shown == text


def test_every_budget_has_words():
    keep = Keep(audio=Tokens(10), video=Share(0.5)).to_dict()
    assert _render._budget_lines(keep) == "audio: 10 tokens\nvideo: 50 % of the remaining tokens"


# --- help in groups, completion, plurals


def test_every_command_stands_under_a_heading_of_its_own(capsys):
    assert main(["--help"]) == 0
    out = capsys.readouterr().out
    assert re.findall(r"^(\S.*):$", out, re.M) == [*HEADINGS, "Options"]
    assert "Commands:" not in out


def test_options_of_one_kind_stand_together(capsys):
    assert main(["run", "--help"]) == 0
    out = capsys.readouterr().out
    assert re.findall(r"^(\S.*):$", out, re.M) == ["Arguments", "Options", "Sampling", "Hardware"]
    assert out.index("Sampling:") < out.index("--top-p") < out.index("Hardware:") < out.index("--device")


@pytest.mark.parametrize(
    ("words", "found"),
    [
        ("fastav fl", {"flops"}),
        ("fastav flops qwen2", {"qwen2-5-omni", "qwen2-5-vl"}),
        ("fastav flops --plan fastav-", {"fastav-plus", "fastav-trim"}),
        ("fastav eval tiny toy", {"toy-world", "toy-world-long"}),
        ("fastav run --model ti", {"tiny", "tiny-long"}),
        ("fastav run --use vi", {"video"}),
        ("fastav plan show pyr", {"pyramiddrop"}),
        ("fastav calibrate ti", {"tiny", "tiny-long"}),
        ("fastav bench sm", {"small"}),
        ("fastav bench video-l", {"video-llama3"}),
    ],
)
def test_a_shell_completes_names_without_loading_anything_heavy(words, found):
    environment = {
        **os.environ,
        "_FASTAV_COMPLETE": "complete_bash",
        "COMP_WORDS": words,
        "COMP_CWORD": str(words.count(" ")),
    }
    heavy = "print({'torch', 'transformers'} & set(sys.modules), file=sys.stderr)"
    code = f"import atexit; atexit.register(lambda: {heavy}); main()"
    done = fastav(code=code, capture_output=True, env=environment)
    assert set(done.stdout.split()) == found
    assert done.stderr == "set()\n"


def test_completion_can_be_installed(capsys):
    assert main(["--help"]) == 0
    assert "--install-completion" in capsys.readouterr().out


def test_presets_that_complete_are_those_of_every_model():
    assert all({"none", *MODELS[name].presets} == set(_help.PRESETS) for name in MODELS)


def test_several_plans_complete_one_after_another():
    assert _help.plans("none,fastav-p") == ["none,fastav-plus"]


def test_one_is_no_plural():
    assert [plural(n, "token") for n in (0, 1, 2216)] == ["0 tokens", "1 token", "2,216 tokens"]
    assert _text.prompt({"text": 1}) == "1 text = 1 token"


@pytest.fixture
def interruptible():
    """Python's own handler of SIGINT, which a process in the background does not have."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("interruptible")
def test_a_lost_ctrl_c_ends_the_command_after_the_step():
    with progress("counting", 2) as step:
        with suppress(KeyboardInterrupt):  # as PyAV does while it builds an exception of its own
            signal.raise_signal(signal.SIGINT)
        with pytest.raises(KeyboardInterrupt):
            step()
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    with progress("counting", 1) as step:
        step()


@pytest.mark.usefixtures("interruptible")
def test_a_lost_ctrl_c_counts_though_the_step_fails():
    def fail():
        with progress("counting", 1), suppress(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
        with progress("counting", 1):
            with suppress(KeyboardInterrupt):
                signal.raise_signal(signal.SIGINT)
            raise FastAVError("the clip is damaged")

    with pytest.raises(KeyboardInterrupt):
        fail()
