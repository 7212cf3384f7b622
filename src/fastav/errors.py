"""The tree of errors: every mistake a user can make ends in one of these.

FastAVError
├── PlanError               a plan, step or budget that makes no sense
│   └── UnknownName         a name that no registry knows, with the nearest that it does
├── UnsupportedModel        a model whose layers cannot be pruned, or that no adapter knows
├── UnsupportedPlan         a plan, or a way of generating, that cannot be exact on this model and engine
├── PlanNotApplied          an engine did not do what the plan says: a library that fastav does not fit
├── MediaError              a clip that cannot be used
│   ├── UnreadableMedia     no such file, not media, truncated, or too large
│   └── MissingTrack        the clip has no video (or audio) where the request needs it
├── CheckpointError         weights or a processor that do not fit the model
├── CalibrationError        evidence that no plan can be read off, or that belongs to something else
└── TaskError               a benchmark whose annotations or clips are missing or malformed
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


class PlanError(FastAVError):
    """A plan, step or budget that makes no sense."""


class UnknownName(PlanError):
    """A name that no registry knows."""


class UnsupportedModel(FastAVError):
    """A model whose layers cannot be pruned, or that no adapter knows."""


class UnsupportedPlan(FastAVError):
    """A plan, or a way of generating, that cannot be exact on this model and engine."""


class PlanNotApplied(FastAVError):
    """An engine did not do what the plan says, as a library beneath it is not the one that fastav was made for."""


class MediaError(FastAVError):
    """A clip that cannot be used."""


class UnreadableMedia(MediaError):
    """No such file, not media, truncated, or too large."""


class MissingTrack(MediaError):
    """The clip lacks a track that the request needs."""


class CheckpointError(FastAVError):
    """Weights or a processor that do not fit the model."""


class CalibrationError(FastAVError):
    """Evidence that no plan can be read off, or that belongs to another model or other settings."""


class TaskError(FastAVError):
    """A benchmark whose annotations or clips are missing or malformed."""
