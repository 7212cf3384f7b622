"""The errors of fastav. Every user mistake ends in one of these.

    FastAVError
    ├── PlanError               an invalid plan, step or budget
    │   └── UnknownName         a name that is in no registry; the hint has the closest names
    ├── UnsupportedModel        a model with layers that cannot be pruned, or without an adapter
    ├── UnsupportedPlan         a plan, or a way of generating, that cannot be exact on this model and engine
    ├── UndeclaredSignal        a method that reads a signal its `needs` does not declare
    ├── PlanNotApplied          an engine did not carry out the plan: an incompatible library below it
    ├── EngineStopped           the processes of an engine have ended; it can answer nothing more
    ├── MediaError              a clip that cannot be used
    │   ├── UnreadableMedia     missing, not media, truncated, or too large
    │   └── MissingTrack        the clip lacks a video or audio track that the request needs
    ├── CheckpointError         weights or a processor that do not fit the model
    ├── InstallationError       a missing package, or one that does not fit the others
    ├── CalibrationError        evidence without a possible plan, or of another model or other settings
    └── TaskError               a benchmark with missing or malformed annotations or clips

`FastAVWarning` is no error. It tells you something about an answer that you still get.
"""


class FastAVError(Exception):
    """An error with a message, which says what was expected and what was found, and a hint, which says how to fix it.

    The CLI prints both and exits with code 2.
    """

    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__(message, hint)
        self.message = message
        self.hint = hint

    def __str__(self) -> str:
        return f"{self.message} ({self.hint})" if self.hint else self.message


class FastAVWarning(UserWarning):
    """A warning about an answer that you still get."""


class PlanError(FastAVError):
    """An invalid plan, step or budget."""


class UnknownName(PlanError):
    """A name that is in no registry."""


class UnsupportedModel(FastAVError):
    """A model with layers that cannot be pruned, or without an adapter."""


class UnsupportedPlan(FastAVError):
    """A plan, or a way of generating, that cannot be exact on this model and engine."""


class UndeclaredSignal(FastAVError):
    """A method reads a signal that its `needs` does not declare."""


class PlanNotApplied(FastAVError):
    """The engine did not carry out the plan, because a library below it is not one that fastav supports."""


class EngineStopped(FastAVError):
    """The processes of an engine have ended. The current request is not the cause, and no other can be answered."""


class MediaError(FastAVError):
    """A clip that cannot be used."""


class UnreadableMedia(MediaError):
    """The file is missing, not media, truncated, or too large."""


class MissingTrack(MediaError):
    """The clip lacks a track that the request needs."""


class CheckpointError(FastAVError):
    """Weights or a processor that do not fit the model."""


class InstallationError(FastAVError):
    """A missing package, or one that does not fit the others."""


class CalibrationError(FastAVError):
    """Evidence without a possible plan, or of another model or other settings."""


class TaskError(FastAVError):
    """A benchmark with missing or malformed annotations or clips."""


LONGEST_REASON = 300  # characters


def reason_of(error: BaseException, *, with_type: bool = False) -> str:
    """One line that says why an exception was raised; never empty.

    The line is the first non-empty line of the message, with the next one if it ends in a colon. One-word messages
    (`KeyError: 'x'`) start with the name of the type; without a message the name is the line. The root cause follows in
    parentheses, unless the line contains it already.
    with_type: start every line with the name of the type.
    """
    line = _line_of(error, with_type)
    root = _root_of(error)
    if root is not error and (root_line := _line_of(root)) not in line:
        line = f"{line} ({root_line})"
    return line if len(line) <= LONGEST_REASON else f"{line[: LONGEST_REASON - 3]}..."


def install_hint(extra: str) -> str:
    """The hint that says how to install one of fastav's extras; no package index has fastav."""
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
    """The exception at the bottom of the chain of causes.

    The context of an exception counts only if the exception itself has no message.
    """
    seen: set[int] = set()
    while id(error) not in seen:
        seen.add(id(error))
        context = None if error.__suppress_context__ or _first_line(error) else error.__context__
        error = error.__cause__ or context or error
    return error
