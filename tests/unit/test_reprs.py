"""How objects show themselves: plans and settings as code that makes equal ones, the rest in a line."""

import numpy as np
import pytest

from fastav import presets
from fastav.engine import Answer, Sampling, Saving
from fastav.layout import Layout, Modality
from fastav.plan import Before, Frames, Keep, Plan, Share, Step, Tokens, Unpadded

VALUES = [
    Sampling(),
    Sampling(temperature=0.7, seed=3, stop=("end",)),
    Keep(audio=Tokens(10), media=None, video=Share(0.5)),
    Keep(text=Unpadded(), audio=Frames(4), video=Before(3)),
    Step(layers="middle", method="random", options={"seed": 1}, keep=Keep(all=Share(0.5))),
    Step(layers="3", method="window", keep=Keep(media=Tokens(5)), cache_only=True),
    presets.NONE,
    presets.fastav(Keep(audio=Tokens(10))),
    Plan((), "mine", {"model": "tiny", "layers": 12, "hidden": 64}),
]


@pytest.mark.parametrize("value", VALUES, ids=repr)
def test_a_repr_is_code_that_makes_an_equal_object(value):
    assert eval(repr(value)) == value


def test_a_repr_leaves_out_what_has_its_default():
    assert repr(Keep(audio=Tokens(10))) == "Keep(audio=Tokens(10))"
    assert repr(Step(layers="3", method="position", keep=Keep(media=Share(0.5)))) == (
        "Step(layers='3', method='position', keep=Keep(media=Share(0.5)))"
    )
    assert repr(Sampling()) == "Sampling()"
    assert repr(Plan((), "none")) == "Plan((), name='none')"


def test_a_layout_shows_its_counts():
    video = Layout.of(Modality.VIDEO, 1200, frame=np.arange(1200) // 600, second=np.arange(1200) / 600)
    audio = Layout.of(Modality.AUDIO, 2, padding=np.array([False, True]))
    layout = Layout.join([Layout.of(Modality.TEXT, 1), audio, video])
    assert repr(layout) == ("Layout(1,203 tokens, 1 text + 2 audio + 1,200 video, 2 frames, 0.0 to 2.0 s, 1 padding)")
    assert repr(Layout.of(Modality.TEXT, 1)) == "Layout(1 token, 1 text)"


def test_an_answer_shows_what_it_says_and_costs():
    saving = Saving(200, 100)
    answer = Answer(
        text="three",
        token_ids=(5,),
        finish="stop",
        plan="fastav",
        prompt_tokens={"video": 64, "text": 8},
        tokens_per_layer=({"video": 64, "text": 8},) * 12,
        flops=saving,
        kv_bytes=saving,
        seconds={"media": 0.5, "prefill": 0.25},
        peak_bytes=None,
    )
    assert repr(answer) == (
        "Answer('three', finish='stop', plan='fastav': 72 prompt tokens, 1 new, FLOPs 50.0%, KV cache 50.0%, 0.75 s)"
    )
