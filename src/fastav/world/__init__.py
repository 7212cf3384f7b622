"""A toy world: a moving shape and beeps, and questions about them with answers."""

from fastav.world.questions import FAMILIES, KINDS, Question, ask, caption, kinds, sentences
from fastav.world.render import clip, frames, waveform, write
from fastav.world.scene import LONG_SECONDS, SECONDS, Picture, Scene, Sound

__all__ = [
    "FAMILIES",
    "KINDS",
    "LONG_SECONDS",
    "SECONDS",
    "Picture",
    "Question",
    "Scene",
    "Sound",
    "ask",
    "caption",
    "clip",
    "frames",
    "kinds",
    "sentences",
    "waveform",
    "write",
]
