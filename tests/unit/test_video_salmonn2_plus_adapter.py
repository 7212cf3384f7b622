"""What fastav knows about video-SALMONN 2+: inputs and layouts of clips, dimensions, where things are."""

from typing import Any

import numpy as np
import pytest

from fastav.errors import MissingTrack
from fastav.layout import Modality
from fastav.media import Clip
from fastav.request import Use
from support.native import VIDEO_SALMONN2_PLUS as FAMILY
from support.native import clip, requests

ADAPTER = FAMILY.adapter
RANDOM = np.random.default_rng(0)
FRAMES = RANDOM.integers(0, 256, (60, 56, 84, 3), dtype=np.uint8)  # 6 s at 10 frames a second, 2 x 3 tokens
SOUND = RANDOM.uniform(-0.5, 0.5, 5 * 16_000).astype(np.float32)


@pytest.fixture(scope="module")
def processor() -> Any:
    return FAMILY.processor()


@pytest.fixture(scope="module")
def config() -> Any:
    return FAMILY.config()


def test_layout_of_video_with_sound(processor: Any) -> None:
    prepared = ADAPTER.prepare(processor, requests(clip(FRAMES, SOUND)))
    layout = prepared.layouts[0]
    assert len(layout) == prepared.inputs["input_ids"].shape[1]
    video, audio, text = (layout.modality == m for m in (Modality.VIDEO, Modality.AUDIO, Modality.TEXT))
    assert prepared.inputs["video_grid_thw"].tolist() == [[30, 4, 6]]
    assert layout.frame[video].tolist() == np.repeat(np.arange(0, 60, 2), 6).tolist()
    assert layout.second[video] == pytest.approx(np.repeat(np.arange(30) * 0.2, 6))
    assert audio.sum() == 60
    # a step lasts 0.2 s, a sound token half a second: the first one follows the third step, whose sampled frame is 4
    follows = layout.frame[audio]
    wanted = [2 * next(s for s in range(30) if (s + 1) * 0.4 + 1e-9 >= i + 1) for i in range(11)]
    assert follows[:11].tolist() == wanted
    assert (follows[11:] == 58).all()
    assert layout.padding[audio].tolist() == [False] * 10 + [True] * 50
    assert layout.second[audio][:10].tolist() == [i / 2 for i in range(10)]
    assert np.isnan(layout.second[audio][10:]).all()
    assert not layout.padding[video].any()
    assert np.isnan(layout.second[text]).all()
    assert (layout.frame[text] == -1).all()


def test_long_sound_has_pieces_and_short_sound_may_end_before_the_picture(
    processor: Any,
) -> None:
    long = RANDOM.uniform(-0.5, 0.5, 31 * 16_000 + 1).astype(np.float32)
    frames = np.repeat(FRAMES, 11, axis=0)  # 66 s
    for sound, heard in ((long, 63), (SOUND, 10)):
        layout = ADAPTER.prepare(processor, requests(clip(frames, sound))).layouts[0]
        audio = layout.modality == Modality.AUDIO
        assert audio.sum() == 60 * -(-heard // 60)
        assert (~layout.padding[audio]).sum() == heard
        assert not layout.padding[audio][:heard].any()


@pytest.mark.parametrize(("one", "use"), [(clip(sound=SOUND), Use.AUTO), (clip(FRAMES, SOUND), Use.AUDIO)])
def test_sound_alone_is_refused(processor: Any, one: Clip, use: Use) -> None:
    with pytest.raises(MissingTrack, match="only along with a picture"):
        ADAPTER.prepare(processor, requests(one, use=use))


def test_one_frame_repeats(processor: Any) -> None:
    prepared = ADAPTER.prepare(processor, requests(clip(FRAMES[:1])))
    pixels = prepared.inputs["pixel_values_videos"].reshape(8, 24, 3, 2, 14, 14)
    assert (pixels == pixels[:1, :, :, :1]).all()


def test_example_of_the_release() -> None:
    layout = ADAPTER.example(ADAPTER.config(), audio=None, video=None, text=40)
    assert layout.by_modality() == {"text": 40, "audio": 120, "video": 200 * 8 * 15}
    assert layout.padding.sum() == 40
    assert layout.modality[:15].tolist() == [Modality.TEXT] * 15
    assert layout.modality[15] == Modality.VIDEO
    assert layout.frame.max() == 398
    assert (layout.frame[layout.padding] == 398).all()
