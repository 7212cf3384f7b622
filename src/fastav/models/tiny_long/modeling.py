"""The embedded model for long clips."""

from fastav.models.tiny import FastAVTinyForConditionalGeneration


class FastAVTinyLongForConditionalGeneration(FastAVTinyForConditionalGeneration):
    """The embedded model under another name, which distinguishes checkpoints for long clips from the others."""
