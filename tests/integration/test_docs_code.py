"""Every code block of README.md and docs runs, or says why not in a comment before it: `<!-- not run: REASON -->`.

Blocks of Python of a page share their names, and find those of `given`: a model, its inputs, clips. They run in a
folder that holds `clip.mp4` and the other files of `folder`. `<!-- run on: tiny -->` puts the embedded model in the
place of those that a block names, `<!-- run on: tiny Qwen2.5-Omni -->` a tiny random checkpoint in the place of the
release's; there, PyAV reads the clips for transformers. Commands `fastav ...` run in this process; what a block of
`console` shows below its command is what it prints. Of blocks that are not run imports must exist, and commands and
options be known.
"""

import ast
import importlib.util
import json
import re
import shlex
import shutil
import tomllib
import warnings

import pytest
import typer

import fastav
from fastav.cli import UsageError, app, main
from fastav.registry import MODELS
from support import pages, stock

ROOT = pages.ROOT
QUESTION = "what shape do you see?"
OMNI = "run on: tiny Qwen2.5-Omni"
TEXTS = {"", "text", "bibtex"}  # languages that show something and run nothing


@pytest.fixture(scope="module")
def given():
    """Names that pages use without saying where they come from."""
    clip = str(ROOT / "src" / "fastav" / "assets" / "clips" / "triangle.mp4")
    pipe = fastav.pipeline("tiny", device="cpu")
    request = fastav.Request(clip=clip, question=QUESTION)
    engine = pipe.engine
    inputs = pipe.adapter.prepare(engine.processor, [request]).inputs
    return {
        "fastav": fastav,
        "pipe": pipe,
        "model": engine.model,
        "processor": engine.processor,
        "inputs": inputs,
        "paths": [clip, clip],
    }


@pytest.fixture(scope="module")
def omni(tmp_path_factory):
    """The folder of a tiny random Qwen2.5-Omni."""
    return stock.save_omni(tmp_path_factory.mktemp("omni"))


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """The folder that a page's code runs in, which holds what the page speaks of."""
    clip = ROOT / "src" / "fastav" / "assets" / "clips" / "triangle.mp4"
    (tmp_path / "clips").mkdir()
    for name in ("clip.mp4", "monday.mp4", "friday.mp4"):
        shutil.copy(clip, tmp_path / name)
    shutil.copy(clip, tmp_path / "clips" / "triangle.mp4")
    (tmp_path / "src").symlink_to(ROOT / "src")
    (tmp_path / "questions.txt").write_text(f"{QUESTION}\n")
    (tmp_path / "questions.jsonl").write_text(json.dumps({"clip": "clip.mp4", "question": QUESTION}) + "\n")
    monkeypatch.chdir(tmp_path)
    return tmp_path


PAGES = [page for page in [*pages.pages(), "AGENTS.md", "CONTRIBUTING.md"] if pages.blocks(page)]


def test_a_block_that_cannot_run_is_noticed(capsys):
    wrong = {
        ("bash", "make test"): "say why",
        ("bash", "fastav run clip.mp4 --no-such-option"): "No such option",
        ("console", "$ fastav --version\nfastav 0.0"): "0.0",
        ("json", '{"fastav_plan": 1}'): "steps",
    }
    for (language, code), reason in wrong.items():
        with pytest.raises((AssertionError, fastav.FastAVError), match=reason):
            CHECKS[language](pages.Block("page", 1, "", language, f"{code}\n"), {}, capsys)
    for command in ("fastav run clip.mp4 question --no-such-option", "fastav plan wirte fastav", "make no-such-target"):
        block = pages.Block("page", 1, "not run: a reason", "bash", command)
        with pytest.raises((AssertionError, UsageError)):
            check_commands(block, {}, capsys)


@pytest.mark.parametrize("page", PAGES)
def test_the_code_of_a_page_runs(page, given, folder, capsys, request, monkeypatch):
    names = {"__name__": "page", **given}
    for block in pages.blocks(page):
        if block.mark == OMNI:
            stock.decode_with_pyav(monkeypatch)
            block = block._replace(code=block.code.replace(stock.NAME, str(request.getfixturevalue("omni"))))
        check = CHECKS.get(block.language)
        if check is None:
            assert block.language in TEXTS, f"{block.place}: nothing is known of {block.language!r}"
            continue
        try:
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", "tiny.* does not know")  # pages ask about the real world
                check(block, names, capsys)
        except Exception as error:
            raise AssertionError(f"{block.place}: {error!r}") from error


def check_python(block, names, capsys):
    code = on_tiny(block) if block.is_run else imports(block.code)
    exec(compile(code, block.place, "exec"), names)


def imports(code):
    """The program's imports of fastav alone, once the whole has been read."""
    tree = ast.parse(code)
    found = [n for n in tree.body if isinstance(n, ast.Import | ast.ImportFrom) and "fastav" in ast.unparse(n)]
    return ast.unparse(ast.Module(found, []))


def check_commands(block, names, capsys):
    for words in commands(on_tiny(block)):
        if words[0] != "fastav":
            assert not block.is_run, f"`{' '.join(words)}` is not run: say why"
            check_other(words)
        elif block.is_run:
            assert main(words[1:]) == 0, capsys.readouterr().err
        else:
            check_known(words[1:])
    capsys.readouterr()


def check_console(block, names, capsys):
    command, _, shown = re.fullmatch(r"\$ (.*?[^\\])(\n)(.*)", block.code, re.DOTALL).groups()
    (words,) = commands(command)
    if block.is_run:
        assert main(words[1:]) == 0
        assert capsys.readouterr().out == shown
    else:
        check_known(words[1:])


def check_json(block, names, capsys):
    if "fastav_plan" in json.loads(block.code):
        fastav.Plan.from_json(block.code)


CHECKS = {
    "python": check_python,
    "bash": check_commands,
    "console": check_console,
    "json": check_json,
    "toml": lambda block, names, capsys: tomllib.loads(block.code),
}


def on_tiny(block):
    """The code, with the embedded model in place of others if the page says so."""
    if block.mark != "run on: tiny":
        return block.code
    known = "|".join(re.escape(name) for name in MODELS if not name.startswith("tiny"))
    return re.sub(rf"(?<=[\s\"])({known})(?=[\s\"])", "tiny", block.code)


def commands(code):
    """The words of each command of a shell's, without its environment and where its output goes."""
    for line in re.split(r"\n| && ", code.replace("\\\n", " ")):
        words = shlex.split(line, comments=True)
        words = words[: words.index(">")] if ">" in words else words
        while words and re.fullmatch(r"[A-Z_\d]+=.*", words[0]):
            del words[0]
        if words:
            yield words


def check_known(words):
    """The command line takes these words; nothing is carried out."""
    command = typer.main.get_command(app)
    context = command.make_context("fastav", [], resilient_parsing=True)
    while hasattr(command, "resolve_command"):
        name, command, words = command.resolve_command(context, words)
        assert command is not None, f"there is no command {name!r}"
        parent, rest = context, [] if hasattr(command, "resolve_command") else words
        context = command.make_context(name, rest, parent=parent, resilient_parsing=bool(not rest))


def check_other(words):
    """What a command that is not fastav's names of this repository is there."""
    match words:
        case ["make", *words]:
            targets = [word for word in words if "=" not in word]
            makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
            assert all(re.search(rf"^{target}:", makefile, re.MULTILINE) for target in targets), targets
        case ["python", "-m", module, *_]:
            assert not module.startswith("fastav") or importlib.util.find_spec(module), module
        case ["pip", "install", *packages]:
            project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
            extras = set(re.findall(r"(?<=\.\[)[\w,]+(?=\])", " ".join(packages)))
            assert extras <= project["optional-dependencies"].keys()
