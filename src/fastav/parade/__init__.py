"""A second toy world: things pass in front of a moving camera, to sounds of their own, and questions about both."""

from fastav.parade.questions import FAMILIES, KINDS, Question, ask, caption, facts, sentences
from fastav.parade.render import clip, frames, waveform, write
from fastav.parade.scene import LENGTHS, SECONDS, Picture, Scene, Sound

__all__ = [
    "FAMILIES",
    "KINDS",
    "LENGTHS",
    "SECONDS",
    "Picture",
    "Question",
    "Scene",
    "Sound",
    "ask",
    "caption",
    "clip",
    "facts",
    "frames",
    "sentences",
    "waveform",
    "write",
]
