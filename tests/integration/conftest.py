"""What several files of these tests use."""

import pytest

from fastav.registry import TASKS
from support.little_task import ENTRY


@pytest.fixture(scope="module")
def little():
    """The little task, in the registry."""
    TASKS._plugins["little"] = ENTRY
    yield
    del TASKS._plugins["little"]
