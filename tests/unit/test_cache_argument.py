"""transformers renamed the cache's argument in 5.24; fastav takes both names, and one module knows them."""

from inspect import signature
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import DynamicCache, Qwen2Config, Qwen2ForCausalLM

from fastav import cache_argument
from fastav.errors import FastAVError
from fastav.models.video_salmonn2 import VideoSalmonn2ForConditionalGeneration
from fastav.models.video_salmonn2_plus import VideoSalmonn2PlusForConditionalGeneration
from fastav.models.videollama2 import VideoLlama2ForConditionalGeneration

TESTS = Path(__file__).parents[1]
OURS = {
    "videollama2": VideoLlama2ForConditionalGeneration,
    "video_salmonn2": VideoSalmonn2ForConditionalGeneration,
    "video_salmonn2_plus": VideoSalmonn2PlusForConditionalGeneration,
}
IDS = torch.tensor([[5, 6, 7, 8]])


@pytest.fixture(scope="module", params=OURS)
def model(request: pytest.FixtureRequest) -> Any:
    return OURS[request.param].from_pretrained(TESTS / "reference" / request.param, dtype=torch.float32)


def test_no_other_module_spells_the_old_name() -> None:
    sources = [*(TESTS.parent / "src").rglob("*.py"), *TESTS.rglob("*.py")]
    spelt = {path.name for path in sources if "past_key_values" in path.read_text(encoding="utf-8")}
    assert spelt == {"cache_argument.py", Path(__file__).name}


def test_the_installed_name_is_the_one_that_transformers_uses() -> None:
    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_attention_heads": 1, "num_key_value_heads": 1}
    model = Qwen2ForCausalLM(Qwen2Config(vocab_size=9, num_hidden_layers=1, **sizes))
    name = cache_argument.installed_name()
    assert name in signature(model.forward).parameters
    assert name in signature(model.prepare_inputs_for_generation).parameters
    assert cache_argument.of_output(model(input_ids=IDS)).get_seq_length() == IDS.shape[1]
    assert cache_argument.name_in(model.forward) == name


@pytest.mark.parametrize("name", cache_argument.NAMES)
@torch.inference_mode()
def test_our_models_take_a_cache_by_either_name(model: Any, name: str) -> None:
    wanted = model(input_ids=IDS).logits[:, -1]
    cache = DynamicCache()
    first = model(input_ids=IDS[:, :-1], **{name: cache})
    assert cache_argument.of_output(first) is cache
    torch.testing.assert_close(model(input_ids=IDS[:, -1:], **{name: cache}).logits[:, -1], wanted, atol=1e-5, rtol=0)
    if type(model.model).__module__.startswith("fastav"):  # the base model too, where it is ours
        cache = DynamicCache()
        assert cache_argument.of_output(model.model(input_ids=IDS, **{name: cache})) is cache


def test_generate_goes_on_with_a_cache(model: Any) -> None:
    name = cache_argument.installed_name()
    options = {"max_new_tokens": 2, "do_sample": False, "return_dict_in_generate": True}
    whole = model.generate(input_ids=IDS, **options)
    assert isinstance(cache_argument.of_output(whole), DynamicCache)
    cache = DynamicCache()
    with torch.inference_mode():
        model(input_ids=IDS[:, :-1], **{name: cache})
    assert torch.equal(model.generate(input_ids=IDS, **{name: cache}, **options).sequences, whole.sequences)


def test_our_models_declare_the_installed_name(model: Any) -> None:
    for forward in (model.forward, model.model.forward):
        declared = [name for name in signature(forward).parameters if name in cache_argument.NAMES]
        assert declared == [cache_argument.installed_name()]


def test_two_caches_are_refused(model: Any) -> None:
    with pytest.raises(FastAVError, match="two names of one argument"):
        model(input_ids=IDS, **dict.fromkeys(cache_argument.NAMES, DynamicCache()))


def test_the_installed_name_counts_where_arguments_hold_both() -> None:
    both = {"cache": "new", "past_key_values": "old"}
    assert cache_argument.in_arguments(both) == both[cache_argument.installed_name()]
    assert cache_argument.in_arguments({"past_key_values": "old", "cache": None}) == "old"
    assert cache_argument.in_arguments({"use_cache": True}) is None
