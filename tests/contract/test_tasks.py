"""What every task must do; a new one is tested without a line here."""

from itertools import islice
from pathlib import Path

import pytest

from fastav.errors import TaskError
from fastav.media import Clip
from fastav.registry import TASKS
from fastav.task import Grade, Sample, Task


@pytest.fixture(params=sorted(TASKS))
def kind(request):
    return TASKS[request.param]


def test_it_is_found_by_name_and_says_where_it_is_from(kind):
    assert issubclass(kind, Task)
    assert TASKS[kind.name] is kind
    assert kind.source
    assert kind.__doc__
    assert kind.__doc__ != Task.__doc__


def test_without_its_folder_it_says_so(kind, tmp_path):
    if not kind.needs_folder:
        pytest.skip("needs no folder")
    with pytest.raises(TaskError, match="none was given"):
        kind(None)
    with pytest.raises(TaskError, match="is not a folder"):
        kind(tmp_path / "nowhere")
    with pytest.raises(TaskError, match="no annotations in") as caught:
        kind(tmp_path).samples()
    assert "docs/tasks.md" in caught.value.hint


def test_the_page_of_tasks_says_where_its_folder_is_from(kind):
    page = (Path(__file__).parents[2] / "docs" / "tasks.md").read_text(encoding="utf-8")
    assert f"`{kind.name}`" in page or not kind.needs_folder


def test_samples_are_alike_each_time_and_the_right_answer_scores(kind):
    if kind.needs_folder:
        pytest.skip("needs its folder; tests/unit/test_tasks_published.py writes small ones")
    task = kind()
    samples = list(islice(task.samples(), 5))
    assert samples
    assert [(s.id, s.question, s.answer) for s in samples] == [
        (s.id, s.question, s.answer) for s in islice(kind().samples(), 5)
    ]
    assert len({sample.id for sample in samples}) == len(samples)
    for sample in samples:
        assert isinstance(sample, Sample)
        assert isinstance(sample.request().clip, Clip)
        assert task.grade(sample, sample.answer) == Grade(1)
        assert not task.grade(sample, "").parsed
    graded = [(sample, sample.answer, task.grade(sample, sample.answer)) for sample in samples]
    assert task.report(graded)["all"]["n"] == len(samples)
