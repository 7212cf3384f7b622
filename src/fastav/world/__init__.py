"""A toy world: four seconds of a moving shape and of beeps, questions about them, and what is true."""

from fastav.world.questions import FAMILIES, KINDS, Question, ask, caption, sentences
from fastav.world.render import clip, frames, waveform, write
from fastav.world.scene import Picture, Scene, Sound

__all__ = [
    "FAMILIES",
    "KINDS",
    "Picture",
    "Question",
    "Scene",
    "Sound",
    "ask",
    "caption",
    "clip",
    "frames",
    "sentences",
    "waveform",
    "write",
]
