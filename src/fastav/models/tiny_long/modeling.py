"""The embedded model for long clips."""

from fastav.models.tiny import FastAVTinyForConditionalGeneration


class FastAVTinyLongForConditionalGeneration(FastAVTinyForConditionalGeneration):
    """The embedded model under another name, by which checkpoints for long clips are told from those for short ones."""
