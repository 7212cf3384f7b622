"""Models that the caller has loaded, in a pipeline: wrapped, quantized, offloaded, whole, and what is refused."""

import copy
import importlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import cpu_offload, dispatch_model
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import GenerationConfig

import fastav
from fastav.adapter import adapter_for
from fastav.engines.transformers import loaded, prune
from fastav.engines.transformers.wrapped import is_quantized
from fastav.errors import CheckpointError, FastAVError, UnknownName, UnsupportedModel, UnsupportedPlan
from fastav.media import Clip
from fastav.models.tiny import TinyAdapter
from fastav.pipelines import Pipeline, resolve
from fastav.request import Request
from integration.test_no_trace import state_of

# PEFT asks for an attribute that transformers 5.24 has renamed
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")

ASSETS = Path(fastav.__file__).parent / "assets"
CLIP, QUESTION = Clip.open(ASSETS / "clips" / "knock.mp4"), "describe the clip."
LONG = {"max_new_tokens": 12, "min_new_tokens": 12}


def load(**options: Any) -> tuple[Any, Any]:
    return TinyAdapter().load(str(ASSETS / "tiny"), **{"dtype": torch.float32, **options})


@pytest.fixture(scope="module")
def expected():
    return fastav.pipeline("tiny", device="cpu")(CLIP, QUESTION, **LONG)


def own_tokens(model: Any, processor: Any) -> list[int]:
    """The tokens of the model's own `generate`, pruned."""
    prepared = TinyAdapter().prepare(processor, [Request(clip=CLIP, question=QUESTION)])
    with prune(model, "fastav", layouts=prepared.layouts), torch.no_grad():
        return model.generate(**prepared.inputs, **LONG)[0, prepared.inputs["input_ids"].shape[1] :].tolist()


def check(model: Any, processor: Any, expected: Any, plan: str = "fastav") -> Any:
    """That a pipeline answers with a model as it is, and leaves it so."""
    before = state_of(model)
    pipe = fastav.pipeline(model, plan, processor=processor)
    answer = pipe(CLIP, QUESTION, **LONG)
    assert list(answer.token_ids) == own_tokens(model, processor)
    if expected is not None:
        assert answer.token_ids == expected.token_ids
        assert (answer.flops, answer.tokens_per_layer) == (expected.flops, expected.tokens_per_layer)
    (mapped,) = (answer for _, answer in pipe.map([Request(clip=CLIP, question=QUESTION)], **LONG))
    assert mapped.token_ids == answer.token_ids
    assert state_of(model) == before
    return answer


def test_a_plain_model(expected):
    model, processor = load()
    check(model, processor, expected)
    assert repr(fastav.pipeline(model=model, processor=processor, plan="none")).startswith(
        "Pipeline('tiny', plan='none'"
    )


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_any_attention(expected, attention):
    check(*load(attn_implementation=attention), expected)


def test_a_processor_that_is_left_out_is_that_of_the_folder(expected):
    model, _ = load()
    assert fastav.pipeline(model)(CLIP, QUESTION, **LONG).token_ids == expected.token_ids


def test_adapters_of_peft(expected):
    model, processor = load()
    torch.manual_seed(1)
    lora = LoraConfig(r=4, lora_alpha=64, target_modules=["q_proj", "v_proj", "down_proj"], init_lora_weights=False)
    outer = get_peft_model(model, lora).eval()
    on = check(outer, processor, None)
    assert on.token_ids != expected.token_ids
    pipe = fastav.pipeline(outer)  # whose processor is that of the base model
    with outer.disable_adapter():
        assert pipe(CLIP, QUESTION, **LONG).token_ids == expected.token_ids
    assert check(copy.deepcopy(outer).merge_and_unload(), processor, None).token_ids == on.token_ids


@pytest.mark.filterwarnings("ignore:You are calling .generate:UserWarning")
@pytest.mark.parametrize("kind", ["offloaded", "dispatched"])
def test_models_that_accelerate_dispatches(expected, kind, monkeypatch):
    model, processor = load()
    if kind == "offloaded":
        model = cpu_offload(model, execution_device=torch.device("cpu"))
    else:
        model = dispatch_model(model, {"": "cpu"}, force_hooks=True)
    monkeypatch.setattr(type(model), "to", lambda *_, **__: pytest.fail("moved"))
    check(model, processor, expected)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
def test_weights_that_are_quantized(expected, monkeypatch):
    model, processor = load()
    quantized = torch.ao.quantization.quantize_dynamic(model, {nn.Linear}, dtype=torch.qint8)
    assert not any(type(module) is nn.Linear for module in quantized.get_decoder().modules())
    monkeypatch.setattr(type(quantized), "to", lambda *_, **__: pytest.fail("moved"))
    answer = fastav.pipeline(quantized, processor=processor)(CLIP, QUESTION, **LONG)
    assert list(answer.token_ids) == own_tokens(quantized, processor)
    assert answer.flops == expected.flops


class _Wrapper(torch.Tensor):
    """A weight as torchao's: a tensor of a class of its own."""


def test_quantized_weights_are_known_and_not_moved(monkeypatch):
    linear = nn.Linear(2, 2)
    assert not is_quantized(linear)
    linear.weight = nn.Parameter(torch.ones(2, 2).as_subclass(_Wrapper), requires_grad=False)
    assert is_quantized(linear)
    monkeypatch.setattr(nn.Linear, "to", lambda *_: pytest.fail("moved"))
    assert loaded.moved(linear, torch.device("meta"), is_required=False) is linear
    assert loaded.moved(linear, torch.device("cpu"), is_required=True) is linear
    with pytest.raises(FastAVError, match=r"cannot be moved to meta .load them there: model_kwargs=.'device_map'"):
        loaded.moved(linear, torch.device("meta"), is_required=True)


@pytest.mark.parametrize("family", ["qwen2_5_omni", "qwen3_omni"])
def test_a_whole_omni_model_answers_by_its_thinker(family):
    module = importlib.import_module(f"support.families.{family}")
    whole, processor = module.full_model(), module.processor()
    make = np.random.default_rng(0)
    clip = Clip.from_arrays(
        frames=make.integers(0, 256, (30, 24, 32, 3), dtype=np.uint8),
        fps=10,
        waveform=make.uniform(-0.5, 0.5, 48_000).astype(np.float32),
        sample_rate=16_000,
    )
    settings = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None}
    before = state_of(whole), whole.thinker.generation_config
    pipe = fastav.pipeline(whole, processor=processor)
    answer = pipe(clip, "What?", **settings)
    assert (state_of(whole), whole.thinker.generation_config) == before
    assert whole.thinker.generation_config is before[1]
    alone = fastav.pipeline(whole.thinker, processor=processor)(clip, "What?", **settings)
    assert answer.token_ids == alone.token_ids
    assert answer.flops.ratio < 1
    end = answer.token_ids[-1]
    whole.generation_config = GenerationConfig(eos_token_id=end, pad_token_id=0)
    ended = pipe(clip, "What?", max_new_tokens=6, do_sample=False)  # by the settings of the whole checkpoint
    assert ended.token_ids == answer.token_ids[: answer.token_ids.index(end)]
    assert ended.finish == "stop"


# --- what is refused


@pytest.mark.parametrize(
    "options", [{"device": "cpu"}, {"dtype": "float32"}, {"attention": "sdpa"}, {"model_kwargs": {"revision": "main"}}]
)
def test_options_of_loading_are_refused(options):
    model, processor = load()
    with pytest.raises(FastAVError, match=f"{next(iter(options))} cannot be set for a model that is loaded already"):
        fastav.pipeline(model, processor=processor, **options)


def test_what_a_pipeline_cannot_take_is_one_error(tmp_path):
    model, processor = load()
    other = importlib.import_module("support.families.qwen2_5_omni")
    with pytest.raises(CheckpointError, match="needs a VideoLlama2Processor, got Qwen2_5OmniProcessor"):
        fastav.pipeline(model, processor=other.processor())
    with pytest.raises(CheckpointError, match="qwen2-5-omni needs a Qwen2_5OmniProcessor, got VideoLlama2Processor"):
        fastav.pipeline(other.build()[0], processor=processor)
    with pytest.raises(CheckpointError, match=r"no processor was passed.*does not say where it is from"):
        fastav.pipeline(other.build()[0])
    model.config._name_or_path = str(tmp_path)
    with pytest.raises(
        CheckpointError, match=r"no processor was passed, and none is found for this tiny: .* .pass proc"
    ):
        fastav.pipeline(model)
    model.config._name_or_path = "nobody/has-this-model"
    with pytest.raises(CheckpointError, match="none is found for this tiny"):
        fastav.pipeline(model)
    with pytest.raises(FastAVError, match="processor goes with a loaded model"):
        fastav.pipeline("tiny", processor=processor)
    with pytest.raises(UnsupportedModel, match="no adapter knows the architecture"):
        fastav.pipeline(importlib.import_module("support.tiny").tiny_model(), processor=processor)
    with pytest.raises(UnsupportedModel, match="pass the inner model"):
        fastav.pipeline(nn.DataParallel(model), processor=processor)
    with pytest.raises(UnsupportedModel, match="cannot run a loaded model"):
        fastav.pipeline(model, processor=processor, engine="vllm")
    with pytest.raises(UnknownName, match="did you mean 'fastav'"):
        fastav.pipeline(model, "fastaw", processor=processor)
    model.config._attn_implementation = "flex_attention"
    with pytest.raises(UnsupportedPlan, match="flex_attention"):
        fastav.pipeline(model, processor=processor)


def test_a_model_that_drops_out_is_refused():
    model, processor = load()
    lora = LoraConfig(r=2, target_modules=["q_proj"], lora_dropout=0.5)
    outer = get_peft_model(model, lora).train()
    with pytest.raises(FastAVError, match=r"in training mode.*call model\.eval"):
        fastav.pipeline(outer, processor=processor)
    fastav.pipeline(outer.eval(), processor=processor)


# --- arguments of from_pretrained


@pytest.mark.parametrize(
    "model_kwargs",
    [
        {"device_map": "cpu"},
        {"device_map": "auto", "local_files_only": True},
        {"attn_implementation": "eager", "torch_dtype": torch.float32},
        {"dtype": "float32", "use_safetensors": True},
    ],
    ids=str,
)
def test_arguments_of_from_pretrained(expected, model_kwargs, monkeypatch):
    if "device_map" in model_kwargs:
        monkeypatch.setattr(nn.Module, "to", lambda *_, **__: pytest.fail("moved"))
    pipe = fastav.pipeline("tiny", model_kwargs=model_kwargs)
    assert pipe.engine.model.config._attn_implementation == model_kwargs.get("attn_implementation", "sdpa")
    monkeypatch.undo()
    if torch.cuda.is_available():
        pytest.skip("on a GPU the default is bfloat16")
    assert pipe(CLIP, QUESTION, **LONG).token_ids == expected.token_ids


def test_quantized_weights_are_loaded_where_they_run(monkeypatch):
    given: dict[str, Any] = {}
    made = load()

    def capture(self: Any, source: str, **options: Any) -> Any:
        given.update(options)
        return made

    monkeypatch.setattr(TinyAdapter, "load", capture)
    fastav.pipeline("tiny", device="cpu", model_kwargs={"quantization_config": object()})
    assert given["device_map"] == {"": torch.device("cpu")}
    fastav.pipeline("tiny", model_kwargs={"quantization_config": object(), "device_map": "auto", "revision": "abc"})
    assert (given["device_map"], given["revision"]) == ("auto", "abc")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"device": "cpu", "model_kwargs": {"device_map": "auto"}}, "both say where the model goes"),
        (
            {"dtype": "float32", "model_kwargs": {"dtype": torch.float16}},
            "dtype and model_kwargs.'dtype'. are the same",
        ),
        ({"dtype": "float32", "model_kwargs": {"torch_dtype": "auto"}}, "are the same setting"),
        ({"attention": "sdpa", "model_kwargs": {"attn_implementation": "eager"}}, "attention and model_kwargs"),
        ({"model_kwargs": {"attn_implementation": "flex_attention"}}, "not supported while pruning"),
        ({"model_kwargs": {"dtype": "int3"}}, "dtype must be"),
        ({"model_kwargs": {"nonsense": 1}}, "cannot be loaded with nonsense: .* .model_kwargs are those of from_pre"),
    ],
    ids=str,
)
def test_arguments_that_contradict_are_one_error(options, message):
    with pytest.raises(FastAVError, match=message):
        fastav.pipeline("tiny", **options)


def test_a_folder_takes_arguments_of_the_hub():
    adapter, source, config = resolve(str(ASSETS / "tiny"), local_files_only=True)
    assert (adapter.name, source, config.num_hidden_layers) == ("tiny", str(ASSETS / "tiny"), 12)
    with pytest.raises(CheckpointError, match="no model at 'nobody/has-this-model'"):
        resolve("nobody/has-this-model", local_files_only=True)


def test_a_pipeline_of_an_engine_is_as_before():
    model, processor = load()
    adapter = adapter_for([type(model).__name__])
    engine = fastav.pipeline(model, processor=processor).engine
    assert isinstance(Pipeline(engine, adapter.preset("none"), adapter)(CLIP, QUESTION).text, str)
