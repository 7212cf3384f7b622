"""video-SALMONN 2+'s computation, apart from what the original's arrays show."""

from typing import Any

import pytest
import torch
from transformers import DynamicCache

from fastav.cache_argument import as_argument, of_output
from fastav.errors import MediaError
from fastav.models._qformer import QFormer
from fastav.models.video_salmonn2_plus import (
    QFormerShape,
    VideoSalmonn2PlusAudioConfig,
    VideoSalmonn2PlusForConditionalGeneration,
)
from fastav.models.video_salmonn2_plus.speech import SpeechTower, windows
from support.native import BOTH, ROWS, SILENT, generated, inputs_of
from support.native import VIDEO_SALMONN2_PLUS as FAMILY


@pytest.fixture(scope="module")
def model() -> Any:
    return FAMILY.model()


@pytest.fixture(scope="module", params=["script", "dataset"])
def processor(request: pytest.FixtureRequest) -> Any:
    return FAMILY.processor(positions=request.param)


def test_media_are_encoded_once(model: Any, processor: Any) -> None:
    calls: list[int] = []
    hooks = [part.register_forward_hook(lambda *_: calls.append(1)) for part in (model.visual, model.audio)]
    try:
        generated(model, inputs_of(FAMILY, processor, BOTH), min_new_tokens=5)
    finally:
        for hook in hooks:
            hook.remove()
    assert len(calls) == 2


def test_embeddings_need_positions(model: Any, processor: Any) -> None:
    inputs = inputs_of(FAMILY, processor, SILENT)
    with torch.no_grad():
        embeds = model.embed(inputs["input_ids"], inputs["pixel_values_videos"], inputs["video_grid_thw"])
    ids = model.generate(inputs_embeds=embeds, position_ids=inputs["position_ids"], max_new_tokens=5, do_sample=False)
    assert ids.tolist() == generated(model, inputs).tolist()
    with pytest.raises(MediaError, match="do not tell where the clip is"):
        model(inputs_embeds=embeds)
    with pytest.raises(MediaError, match="do not tell where the clip is"):
        model.generate(inputs_embeds=embeds, max_new_tokens=2)
    with pytest.raises(MediaError, match="takes input_ids or inputs_embeds"):
        model()


def test_without_positions_the_model_falls_back_to_the_scripts(model: Any) -> None:
    script = FAMILY.processor(positions="script")
    inputs = inputs_of(FAMILY, script, *ROWS[FAMILY.name])
    with torch.no_grad():
        wanted = model(**inputs).logits
        alone = model(**{name: value for name, value in inputs.items() if name != "position_ids"}).logits
    assert torch.equal(alone, wanted)


def test_positions_by_the_dataset_must_be_given() -> None:
    model = VideoSalmonn2PlusForConditionalGeneration.from_pretrained(FAMILY.tiny, positions="dataset")
    processor = FAMILY.processor(positions="dataset")
    inputs = inputs_of(FAMILY, processor, BOTH)
    del inputs["position_ids"]
    with pytest.raises(MediaError, match="needs to know when frames are shown"):
        model(**inputs)


def test_decoding_by_hand_goes_on_where_the_prompt_ended(model: Any, processor: Any) -> None:
    inputs = inputs_of(FAMILY, processor, BOTH)
    new = torch.tensor([[7, 8]])
    later = inputs["position_ids"][..., -1:] + 1 + torch.arange(2)
    with torch.no_grad():
        cache = of_output(model(**inputs))
        wanted = model(input_ids=new, **as_argument(cache), position_ids=later).logits
        for mask in (None, torch.ones(1, inputs["input_ids"].shape[1] + 2, dtype=torch.long)):
            cache = of_output(model(**inputs))
            ours = model(input_ids=new, **as_argument(cache), attention_mask=mask).logits
            assert (ours - wanted).abs().max() <= 1e-5


def test_a_cache_of_unknown_origin_is_an_error(model: Any) -> None:
    cache = DynamicCache(config=model.config.text_config)
    with torch.no_grad():
        model.model(input_ids=torch.tensor([[1, 2, 3]]), **as_argument(cache))
        with pytest.raises(MediaError, match="does not tell where its prompts ended"):
            model(input_ids=torch.tensor([[4]]), **as_argument(cache))


def test_media_and_prompts_that_do_not_fit_are_an_error(model: Any) -> None:
    processor = FAMILY.processor()
    inputs = inputs_of(FAMILY, processor, BOTH)
    ids = inputs["input_ids"].clone()
    ids[ids == processor.media.audio_token_id] = 5
    with pytest.raises(MediaError, match="0 placeholders of id 263, their media give 60"):
        model(**inputs | {"input_ids": ids})
    with pytest.raises(MediaError, match="come without their sizes"):
        model(**inputs | {"video_grid_thw": None})
    with pytest.raises(MediaError, match="1 of the prompts show a video, video_grid_thw has 0"):
        model(inputs["input_ids"])


def test_windows_follow_one_another() -> None:
    speech = torch.arange(2 * 7 * 3).reshape(2, 7, 3).float()
    ours = windows(speech, 3)
    assert ours.shape == (4, 3, 3)
    assert torch.equal(ours[1], speech[0, 3:6])
    assert torch.equal(ours[2], speech[1, :3])


def test_a_window_is_read_where_cross_attention_is() -> None:
    sizes = {"hidden_size": 8, "num_hidden_layers": 4, "num_attention_heads": 2, "intermediate_size": 8}
    for every, layers in ((1, {"0", "1", "2", "3"}), (2, {"0", "2"})):
        config = VideoSalmonn2PlusAudioConfig(qformer_config=sizes | {"cross_attention_freq": every})
        with torch.device("meta"):
            names = SpeechTower._from_config(config, out_hidden_size=8).qformer.state_dict()
        assert {name.split(".")[3] for name in names if "crossattention" in name} == layers
    queries, qformer = torch.randn(1, 1, 8), QFormer(QFormerShape(**sizes), 6)
    with torch.no_grad():
        one, other = (qformer(queries, torch.randn(1, 5, 6)) for _ in range(2))
    assert not torch.allclose(one, other)
