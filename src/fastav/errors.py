"""The tree of errors: every mistake a user can make ends in one of these.

    FastAVError
    ├── PlanError               a plan, step or budget that makes no sense
    │   └── UnknownName         a name that no registry knows, with the nearest that it does
    ├── UnsupportedModel        a model whose layers cannot be pruned, or that no adapter knows
    ├── UnsupportedPlan         a plan, or a way of generating, that cannot be exact on this model and engine
    ├── UndeclaredSignal        a method that reads a signal its `needs` does not declare
    ├── PlanNotApplied          an engine did not do what the plan says: a library that fastav does not fit
    ├── EngineStopped           the processes of an engine have ended, and nothing more can be answered
    ├── MediaError              a clip that cannot be used
    │   ├── UnreadableMedia     no such file, not media, truncated, or too large
    │   └── MissingTrack        the clip has no video (or audio) where the request needs it
    ├── CheckpointError         weights or a processor that do not fit the model
    ├── InstallationError       a package that is missing, or does not fit the others
    ├── CalibrationError        evidence that no plan can be read off, or that belongs to something else
    └── TaskError               a benchmark whose annotations or clips are missing or malformed

`FastAVWarning` is no error: what a user should know about an answer that is given all the same.
"""


class FastAVError(Exception):
    """What was wrong, and what to do about it.

    `message` says what was found and what was expected; `hint` says how to mend it. The CLI prints both and exits 2.
    """

    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__(message, hint)
        self.message = message
        self.hint = hint

    def __str__(self) -> str:
        return f"{self.message} ({self.hint})" if self.hint else self.message


class FastAVWarning(UserWarning):
    """What a user should know about an answer that is given all the same."""


class PlanError(FastAVError):
    """A plan, step or budget that makes no sense."""


class UnknownName(PlanError):
    """A name that no registry knows."""


class UnsupportedModel(FastAVError):
    """A model whose layers cannot be pruned, or that no adapter knows."""


class UnsupportedPlan(FastAVError):
    """A plan, or a way of generating, that cannot be exact on this model and engine."""


class UndeclaredSignal(FastAVError):
    """A method reads a signal that its `needs` does not declare."""


class PlanNotApplied(FastAVError):
    """An engine did not do what the plan says, as a library beneath it is not the one that fastav was made for."""


class EngineStopped(FastAVError):
    """The processes of an engine have ended: not the fault of the request at hand, and no other one can be answered."""


class MediaError(FastAVError):
    """A clip that cannot be used."""


class UnreadableMedia(MediaError):
    """No such file, not media, truncated, or too large."""


class MissingTrack(MediaError):
    """The clip lacks a track that the request needs."""


class CheckpointError(FastAVError):
    """Weights or a processor that do not fit the model."""


class InstallationError(FastAVError):
    """A package that is missing, or does not fit the others."""


class CalibrationError(FastAVError):
    """Evidence that no plan can be read off, or that belongs to another model or other settings."""


class TaskError(FastAVError):
    """A benchmark whose annotations or clips are missing or malformed."""


LONGEST_REASON = 300  # characters


def reason_of(error: BaseException, *, with_type: bool = False) -> str:
    """One line that says why an exception was raised; never empty.

    The first line of its message that holds anything, with the next one where it ends in a colon. Messages of a single
    word (`KeyError: 'x'`) have the name of the type in front, and exceptions without a message are that name. What
    caused the exception, at the bottom, stands behind it in parentheses, unless the line says it already.
    with_type: put the name of the type in front of every message.
    """
    line = _line_of(error, with_type)
    root = _root_of(error)
    if root is not error and (root_line := _line_of(root)) not in line:
        line = f"{line} ({root_line})"
    return line if len(line) <= LONGEST_REASON else f"{line[: LONGEST_REASON - 3]}..."


def install_hint(extra: str) -> str:
    """How to install the packages of one of fastav's extras, which no package index knows."""
    return f"in a checkout of fastav: pip install '.[{extra}]'"


def _line_of(error: BaseException, with_type: bool = False) -> str:
    text_ = _first_line(error)
    if " " in text_ and not with_type:
        return text_
    return f"{type(error).__name__}: {text_}" if text_ else type(error).__name__


def _first_line(error: BaseException) -> str:
    text = error.message if isinstance(error, FastAVError) else str(error)
    text_ = ""
    for line in filter(None, (" ".join(line.split()) for line in text.splitlines())):
        text_ = f"{text_} {line}".lstrip()
        if not line.endswith(":"):
            break
    return text_


def _root_of(error: BaseException) -> BaseException:
    """What an exception was raised from, at the bottom.

    What it was merely raised beside counts only where the exception itself says nothing.
    """
    seen: set[int] = set()
    while id(error) not in seen:
        seen.add(id(error))
        context = None if error.__suppress_context__ or _first_line(error) else error.__context__
        error = error.__cause__ or context or error
    return error
