"""Finding a model's checkpoint: in a folder, on the hub, or in the hub's cache."""

import re
from os import PathLike, fspath
from pathlib import Path
from typing import Any

from huggingface_hub import constants, get_hf_file_metadata, hf_hub_url, try_to_load_from_cache
from huggingface_hub.errors import HfHubHTTPError

from fastav.errors import CheckpointError, FastAVError, UnknownName, reason_of
from fastav.registry import MODELS, unknown_name

HUB_ID = re.compile(r"\w[\w.-]*/\w[\w.-]*")
TIMEOUT = 5.0  # seconds to wait for the hub, unless HF_HUB_ETAG_TIMEOUT is set
RETRY_LATER = (408, 429)  # status codes that mean: try again later
NAMING_HINT = "a model is a name (fastav models), a local folder, or a hub id like owner/name"


def model_name(model: Any) -> str:
    """The name, folder or hub id of a model as text.  Raises: FastAVError for anything else."""
    if isinstance(model, str | PathLike):
        return str(fspath(model))
    raise FastAVError(
        f"a model must be a name, a folder, a hub id, or a loaded model of transformers, got {type(model).__name__}",
        NAMING_HINT,
    )


def find_source(model: str, revision: str | None = None, *, local: bool = False) -> str:
    """The folder or hub id of a model that is not in the registry.

    A hub that does not answer is asked only once. revision: of the checkpoint on the hub. local: whether to look at
    local files only, and ask no hub. Raises: UnknownName for a word that is no folder; CheckpointError if the folder
    does not exist, or if the hub cannot be reached and its cache has no copy.
    """
    if not model.strip():
        raise UnknownName("the name of the model is empty", NAMING_HINT)
    if Path(model).is_dir():
        return model
    if Path(model).is_file():
        raise CheckpointError(f"{model!r} is a file", "give the folder of a checkpoint")
    if HUB_ID.fullmatch(model):
        return model if local else reachable(model, revision)
    if "/" in model or "\\" in model:
        raise CheckpointError(f"the folder {model!r} does not exist", NAMING_HINT)
    error = unknown_name("model", model, MODELS)
    separator = " If not, " if error.hint.endswith("?") else "; "
    raise UnknownName(error.message, error.hint + separator + NAMING_HINT)


def reachable(hub_id: str, revision: str | None = None) -> str:
    """The hub id if the hub answers; otherwise the folder of the hub's cache.

    transformers asks an unreachable hub six times per file; this function asks once.
    Raises: CheckpointError if the hub does not answer and the cache has no copy.
    """
    if Path(hub_id).is_dir():
        return hub_id
    configured = constants.HF_HUB_ETAG_TIMEOUT
    timeout = TIMEOUT if configured == constants.DEFAULT_ETAG_TIMEOUT else configured
    try:
        get_hf_file_metadata(hf_hub_url(hub_id, "config.json", revision=revision), timeout=timeout)
    except HfHubHTTPError as error:
        if error.response.status_code < 500 and error.response.status_code not in RETRY_LATER:
            return hub_id  # the hub refuses; transformers has the better error message
        reason = reason_of(error)
    except Exception as error:  # the hub's client can use different HTTP libraries
        reason = reason_of(error)
    else:
        return hub_id
    cached = try_to_load_from_cache(hub_id, "config.json", revision=revision)
    if isinstance(cached, str):
        return str(Path(cached).parent)
    raise CheckpointError(
        f"the hub cannot be reached for {hub_id!r}, and its cache has no copy: {reason}",
        "check the network (and HF_HUB_OFFLINE), or give a local folder",
    )
