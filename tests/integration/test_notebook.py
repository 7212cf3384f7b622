"""The notebook runs from its first cell to its last, shows what it says, and is stored without outputs."""

import json
import tempfile

import matplotlib as mpl
import pytest

from fastav import Modality
from support import pages

NOTEBOOK = json.loads(pages.text_of("notebooks/quickstart.ipynb"))
CODE = {cell["id"]: "".join(cell["source"]) for cell in NOTEBOOK["cells"] if cell["cell_type"] == "code"}


@pytest.fixture
def figures(monkeypatch, tmp_path):
    """The figures that code shows, drawn; its temporary files go to the test's folder."""
    mpl.use("Agg")
    import matplotlib.pyplot as plt

    shown = []

    def show():
        shown.append(plt.gcf())
        shown[-1].canvas.draw()
        plt.close(shown[-1])

    monkeypatch.setattr(plt, "show", show)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return shown


def test_the_notebook_runs_and_what_it_says_is_so(figures, capsys):
    names = {"__name__": "notebook"}
    for cell, code in CODE.items():
        exec(compile(code, f"notebooks/quickstart.ipynb, {cell}", "exec"), names)
    printed = capsys.readouterr().out
    assert len(figures) == 2
    texts = {plan: answer.text for plan, answer in names["answers"].items()}
    assert texts["none"] == texts["fastav-plus"] == "three" != texts["fastav"]
    assert (names["first"].text, names["later"].text) == ("square", "purple")
    assert "a purple square moves down with three mid buzz beeps" in printed
    assert names["exit_code"] == 0
    assert "vtw, KL" in printed.partition("tiny on 4 questions")[2]

    layout, layers, depth = names["layout"], names["layers_per_token"], names["depth"]
    is_sound = layout.modality == Modality.AUDIO
    loud = abs(names["sound"]).reshape(-1, 800).max(1) > 0.1  # tenths of a second
    assert (loud.nonzero()[0][[0, -1]] == [162, 177]).all()
    beeps = is_sound & (layout.second > 16.5) & (layout.second < 17.8)
    assert layers("fastav")[is_sound & (layout.second < 15.9)].max() == depth
    assert layers("fastav")[beeps].max() < depth
    assert layers("fastav-plus")[beeps].min() == depth


def test_the_notebook_is_stored_without_outputs():
    assert (NOTEBOOK["nbformat"], NOTEBOOK["nbformat_minor"]) == (4, 5)
    ids = [cell["id"] for cell in NOTEBOOK["cells"]]
    assert len(ids) == len(set(ids))
    for cell in NOTEBOOK["cells"]:
        if cell["cell_type"] == "code":
            assert cell["outputs"] == []
            assert cell["execution_count"] is None
