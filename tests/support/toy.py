"""Requests about scenes of the toy world."""

import numpy as np

from fastav.request import Request, Use
from fastav.world import SECONDS, Scene, clip


def scene_request(question="describe the clip.", seed=3, seconds=SECONDS):
    """A question about a clip in memory of a held-out scene."""
    scene = Scene.draw(np.random.default_rng(seed), held_out=True, seconds=seconds)
    return Request(clip=clip(scene), question=question, use=Use.BOTH)
