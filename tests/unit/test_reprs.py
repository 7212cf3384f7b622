"""How objects show themselves: plans and settings as code that makes equal ones, the rest in a line."""

import numpy as np
import pytest

from fastav import presets
from fastav.budgets import Before, Frames, Share, Tokens, Unpadded
from fastav.engine import Answer, Sampling
from fastav.flops import Saving
from fastav.layout import Layout, Modality
from fastav.media import Clip
from fastav.plan import Keep, Plan, Step
from media_files import tone, write_clip

VALUES = [
    Sampling(),
    Sampling(temperature=0.7, seed=3, stop=("end",)),
    Keep(audio=Tokens(10), media=None, video=Share(0.5)),
    Keep(text=Unpadded(), audio=Frames(4), video=Before(3)),
    Step(layers="middle", method="random", options={"seed": 1}, keep=Keep(all=Share(0.5))),
    Step(layers="3", method="window", keep=Keep(media=Tokens(5)), cache_only=True),
    Step(layers="3", method="position", keep=Keep(media=Tokens(5)), earlier_caches=True),
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


def test_a_track_shows_what_is_known_and_what_is_about(tmp_path):
    sound = Clip.from_arrays(waveform=np.zeros((2, 16_001), np.float32), sample_rate=16_000).require_audio()
    assert repr(sound) == "AudioTrack(samples=16001, sample_rate=16000, channels=2, duration=1.0, start=0.0)"
    path = write_clip(tmp_path / "a.mp4", frames=20, fps=15, audio="aac", sound=tone(1, 16_000))
    clip = Clip.open(path)
    heard = clip.require_audio()
    assert len(heard.read(16_000)) != heard.samples, "of AAC more is decoded than the file says"
    assert repr(heard) == "AudioTrack(about 16000 samples, sample_rate=16000, channels=1, duration=1.0, start=0.0)"
    seen = "VideoTrack(frames=20, fps=15.0, duration=1.333, width=128, height=64, start=0.0)"
    assert repr(clip.require_video()) == seen
    assert repr(clip) == f"Clip(name='a.mp4', video={seen}, audio={heard!r})"
