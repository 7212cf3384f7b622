"""What every model family must do; a new one is tested without a line here."""

import pytest

from fastav.adapter import ModelAdapter, adapter_for
from fastav.errors import MediaError, UnknownName, UnsupportedModel
from fastav.flops import paper_flops
from fastav.layout import Modality
from fastav.plan import Plan
from fastav.registry import MODELS
from support.engines import accepted


@pytest.fixture(params=sorted(MODELS))
def adapter(request):
    return MODELS[request.param]()


def test_it_is_found_by_name_and_by_architecture(adapter):
    assert isinstance(adapter, ModelAdapter)
    assert adapter.name in MODELS
    for architecture in adapter.architectures:
        assert type(adapter_for([architecture])) is type(adapter)


def test_the_release_is_known_without_download(adapter):
    config = adapter.config()
    assert set(config.architectures or ()) <= adapter.architectures
    shape = adapter.shape(config)
    assert shape.layers == config.get_text_config(decoder=True).num_hidden_layers
    assert shape.heads % shape.kv_heads == 0


def test_presets_are_there_fit_the_release_and_travel(adapter):
    config = adapter.config()
    layout = adapter.example(config, audio=None, video=None, text=44)
    shape = adapter.shape(config)
    assert {"fastav", "fastav-trim"} <= set(adapter.presets)
    for name, plan in adapter.presets.items():
        assert plan.name == name
        assert Plan.from_json(plan.to_json()) == plan
        tokens = plan.tokens(layout, shape.layers)
        saved = paper_flops(shape, [len(layout)] * shape.layers) - paper_flops(shape, tokens)
        assert saved > 0 or (saved == 0 and name == "fastav-trim" and not layout.padding.any())
        assert "transformers" in accepted(config, plan)
    assert adapter.preset("none") == Plan(name="none")
    with pytest.raises(UnknownName, match="did you mean 'fastav'"):
        adapter.preset("fastaw")


@pytest.mark.parametrize("counts", [(None, None, 44), (0, 5, 30), (7, 0, 1), (0, 0, 3)])
def test_an_example_has_the_tokens_asked_for(adapter, counts):
    audio, video, text = counts
    if audio and not adapter.supports_audio:
        with pytest.raises(MediaError, match="does not take audio"):
            adapter.example(adapter.config(), audio=audio, video=video, text=text)
        return
    layout = adapter.example(adapter.config(), audio=audio, video=video, text=text)
    assert layout.count(Modality.TEXT) == text
    assert audio is None or layout.count(Modality.AUDIO) == audio
    assert video is None or layout.count(Modality.VIDEO, Modality.IMAGE) == video
    assert ((layout.frame >= 0) <= (layout.modality != Modality.TEXT)).all()
    assert (layout.padding <= (layout.modality != Modality.TEXT)).all()


@pytest.mark.parametrize("seconds", [0.5, 10, 30, 60])
def test_an_example_of_any_length_has_video_and_what_is_heard(adapter, seconds):
    layout = adapter.example(adapter.config(), seconds=seconds, text=44)
    assert layout.count(Modality.VIDEO, Modality.IMAGE) > 0
    assert (layout.count(Modality.AUDIO) > 0) == adapter.supports_audio


def test_an_unknown_architecture_lists_what_is_known():
    with pytest.raises(UnsupportedModel, match="videollama2"):
        adapter_for(["LlamaForCausalLM"])
