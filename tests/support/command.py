"""The command line, called in this process."""

import pytest

from fastav.cli import main


def stdout(capsys: pytest.CaptureFixture, *arguments: str) -> str:
    """What a command prints that must succeed."""
    assert main(arguments) == 0
    return capsys.readouterr().out


def failure(capsys: pytest.CaptureFixture, *arguments: str) -> str:
    """The message of a command that must exit with 2, print nothing, and say what was wrong in at most two lines."""
    assert main(arguments) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("error: ")
    assert len(err.splitlines()) <= 2
    return err
