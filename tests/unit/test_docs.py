"""What the documents say is what the code computes."""

import re
import runpy
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def models():
    return runpy.run_path(str(ROOT / "docs" / "models.py"))


@pytest.mark.parametrize("name", ["README.md", "docs/models.md"])
def test_the_table_of_models_is_current(models, name):
    path = ROOT / name
    text = path.read_text(encoding="utf-8")
    assert models["written"](text, models["table"](), inside=path) == text, "run `make tables`"


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
