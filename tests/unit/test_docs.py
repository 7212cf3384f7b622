"""What the documents say is what the code computes, and their links lead somewhere."""

import ast
import json
import re
import runpy
import subprocess
import tomllib

import pytest

from support import pages

ROOT = pages.ROOT
OTHERS = ["AGENTS.md", "CHANGELOG.md", "CONTRIBUTING.md", "results/README.md", "results/toy-world.md"]


@pytest.fixture(scope="module")
def models():
    return runpy.run_path(str(ROOT / "docs" / "models.py"))


@pytest.mark.parametrize("name", ["README.md", "docs/models.md", "docs/choose-a-plan.md"])
def test_the_tables_of_models_are_current(models, name):
    text = (ROOT / name).read_text(encoding="utf-8")
    assert models["written"](text, name) == text, "run `make tables`"


def test_every_model_of_the_table_has_its_page(models):
    for line in models["table"]().splitlines()[2:]:
        page = line.partition("](")[2].partition(")")[0]
        assert (ROOT / page).exists(), page


def test_what_the_page_about_clips_shows_runs(monkeypatch):
    monkeypatch.chdir(ROOT)
    names: dict = {}
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "media.md").read_text(encoding="utf-8"), re.S)
    for block in blocks:
        exec(block, names)
    assert len(blocks) == 4
    assert names["frames"].shape == (3, 64, 64, 3)
    assert names["sound"].ndim == 1
    assert names["seconds"].tolist() == [0, 2, 3.875]


@pytest.mark.parametrize("page", [*pages.pages(), *OTHERS])
def test_every_link_leads_somewhere(page):
    for path, anchor in pages.links(page):
        in_release = path.suffix == ".jsonl" and not (ROOT / ".git").exists()  # which has no rows of results
        assert in_release or path.exists(), f"{page} links to {path}"
        assert not anchor or anchor in pages.anchors(path), f"{page} links to #{anchor} of {path.name}"


def test_every_message_of_troubleshooting_is_one_of_the_source():
    messages = {text for path in (ROOT / "src").rglob("*.py") for text in _texts(path.read_text(encoding="utf-8"))}
    headings = re.findall(r"^### `(.*)`$", pages.text_of("docs/troubleshooting.md"), re.MULTILINE)
    assert len(headings) > 30
    for heading in headings:
        pattern = re.compile(".*".join(map(re.escape, heading.split("…"))), re.DOTALL)
        assert any(map(pattern.fullmatch, messages)), f"no message reads {heading!r}: has it changed?"


def _texts(source):
    """Every string of a program, with … for what an f-string fills in."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.value
        elif isinstance(node, ast.JoinedStr):
            yield "".join(part.value if isinstance(part, ast.Constant) else "…" for part in node.values)


def test_where_the_project_lives_stands_in_one_place():
    found = subprocess.run(["git", "grep", "-lF", _repository()], cwd=ROOT, capture_output=True, text=True, check=False)
    if found.returncode > 1:
        pytest.skip("not a git checkout")
    # a notebook on Colab is a file alone, so it has a copy
    assert found.stdout.split() == ["notebooks/quickstart.ipynb", "pyproject.toml"]


def test_the_notebook_installs_and_opens_from_where_the_project_lives():
    address = _repository()
    cells = json.loads(pages.text_of("notebooks/quickstart.ipynb"))["cells"]
    first, install = ("".join(cell["source"]) for cell in cells[:2])
    colab = address.replace("https://github.com/", "https://colab.research.google.com/github/")
    assert f"[Open in Colab]({colab}/blob/main/notebooks/quickstart.ipynb)" in first
    assert f'REPOSITORY = "{address}"\n' in install


def _repository():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    return project["tool"]["hatch"]["metadata"]["hooks"]["custom"]["repository"]


def test_versions_agree():
    from fastav import __version__

    newest = re.search(r"^## \[(\d[\d.]*)\] - (\S+)$", pages.text_of("CHANGELOG.md"), re.MULTILINE)
    assert newest
    citation = pages.text_of("CITATION.cff")
    assert newest[1] == __version__
    assert f"version: {__version__}\ndate-released: {newest[2]}\n" in citation


def test_readme_names_the_first_commands_and_every_page_names_targets_that_exist():
    targets = set(re.findall(r"^([a-z][a-z0-9-]*):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    used = {}
    for page in [*pages.pages(), *OTHERS]:
        text = pages.text_of(page)
        lists = re.findall(r"(?:^|`)make((?: [a-z][a-z0-9-]*)+)", text, re.MULTILINE)
        lists = [words.split("  ")[0] for words in lists]  # a comment follows after two spaces
        used[page] = {word for words in lists for word in words.split()}
        assert used[page] <= targets, f"{page}: the Makefile has no {used[page] - targets}"
    assert {"demo", "test"} <= used["README.md"]
