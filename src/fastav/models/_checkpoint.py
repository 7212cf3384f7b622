"""Reading checkpoints so that nothing is left to chance: every key is accounted for, every failure is in words."""

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from json import JSONDecodeError
from typing import Any

from safetensors import SafetensorError
from transformers import PreTrainedModel, ProcessorMixin

from fastav.errors import CheckpointError, FastAVError, InstallationError, install_hint, reason_of
from fastav.installation import importable

HUB_OPTIONS = ("cache_dir", "force_download", "local_files_only", "token", "revision", "subfolder")
SHOWN = 10


@contextmanager
def readable(source: Any) -> Iterator[None]:
    """Turn what unreadable files raise into a CheckpointError."""
    try:
        yield
    except (SafetensorError, JSONDecodeError) as error:
        raise CheckpointError(
            f"a file of {source} is damaged: {reason_of(error)}", "truncated? download or copy it again"
        ) from error
    except OSError as error:
        raise CheckpointError(
            f"no readable checkpoint at {source}: {reason_of(error)}",
            "give a folder with config.json and weights, or a hub id",
        ) from error


def read_processor(kind: Any, source: str, options: dict[str, Any]) -> Any:
    """The processor of a checkpoint.

    Raises: CheckpointError; InstallationError if a package that it needs is missing or broken; OSError if there is no
    such folder or hub id.
    """
    try:
        with importable():
            return kind.from_pretrained(source, **options)
    except (OSError, FastAVError):
        raise
    except ImportError as error:
        raise InstallationError(
            f"the processor of {source} cannot be used: {reason_of(error)}", install_hint("transformers")
        ) from error
    except Exception as error:  # the tokenizers library raises bare ones for damaged files
        raise CheckpointError(
            f"the tokenizer of {source} cannot be read: {reason_of(error)}", "are its tokenizer files complete?"
        ) from error


def load(
    source: str, options: Mapping[str, Any], *, config: Any, processor: Any, model: Any
) -> tuple[PreTrainedModel, ProcessorMixin]:
    """A model (in evaluation mode) and its processor, from a local folder or a hub id, by their three classes.

    Raises: CheckpointError if keys are missing, left over, or of another shape, or files cannot be read.
    """
    hub = {name: options[name] for name in HUB_OPTIONS if name in options}
    with readable(source):
        config.from_pretrained(source, **hub)  # the clearest of errors if there is nothing there
        read = read_processor(processor, source, hub)
    return model.from_pretrained(source, **options).eval(), read


def refuse(what: str, keys: Sequence[str], source: str) -> None:
    """Raise CheckpointError naming the first keys, if there are any."""
    if keys:
        more = f" and {len(keys) - SHOWN} more" if len(keys) > SHOWN else ""
        raise CheckpointError(
            f"the checkpoint {source} {what} {len(keys)} key{'s' * (len(keys) > 1)}: {', '.join(keys[:SHOWN])}{more}",
            "is it complete, and of this model?",
        )


def refuse_differences(info: Mapping[str, Any], source: str) -> None:
    """Refuse any difference between checkpoint and model. `info`: as `output_loading_info` gives it.

    Raises: CheckpointError naming keys.
    """
    refuse("lacks", sorted(info["missing_keys"]), source)
    refuse("has unknown", sorted(info["unexpected_keys"]), source)
    refuse("has other shapes for", sorted(str(key[0]) for key in info["mismatched_keys"]), source)


class StrictLoading:
    """Mixin of a PreTrainedModel: loading it is strict. Stands before the class that knows how to load."""

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | os.PathLike | None,
        *args: Any,
        output_loading_info: bool = False,
        **kwargs: Any,
    ) -> Any:
        """As transformers' own, and nothing is left to chance: every key of the model and of the file must match.

        Raises: CheckpointError for unreadable files, and for missing, unexpected or mismatched keys.
        """
        parent: Any = super()
        with readable(pretrained_model_name_or_path):
            model, info = parent.from_pretrained(
                pretrained_model_name_or_path,
                *args,
                output_loading_info=True,
                **{**kwargs, "ignore_mismatched_sizes": True},  # named by `_complete` instead
            )
            model._complete(info, str(pretrained_model_name_or_path or ""))
        return (model, info) if output_loading_info else model

    def _complete(self, info: dict[str, Any], source: str) -> None:
        """Fill in what a sound checkpoint of this model may leave out, then refuse any difference."""
        refuse_differences(info, source)
