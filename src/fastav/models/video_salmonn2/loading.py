"""Loading that accounts for every key: what the file lacks is an error, never random."""

from typing import Any

from transformers import PreTrainedModel

from fastav.models.videollama2.loading import refuse

UNUSED = "speech_Qformer.bert.embeddings.position_ids"


def complete(model: PreTrainedModel, info: dict[str, Any], source: str) -> None:
    """Refuse any difference between checkpoint and model, but for a buffer of numbers that nothing reads.

    `info`: as `output_loading_info` gives it.
    Raises: CheckpointError naming keys.
    """
    missing = set(info["missing_keys"]) - {UNUSED}
    info["missing_keys"] = missing
    refuse("lacks", sorted(missing), source)
    refuse("has unknown", sorted(info["unexpected_keys"]), source)
    refuse("has other shapes for", sorted(str(key[0]) for key in info["mismatched_keys"]), source)
