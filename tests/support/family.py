"""The families that transformers has itself, each with a tiny model, clips and what it answers, made once a process."""

import importlib
import pkgutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch

from fastav.adapter import ModelAdapter, Prepared, adapter_for
from fastav.budgets import Share
from fastav.engines.transformers import TransformersEngine, prune
from fastav.media import Clip
from fastav.plan import Keep, Plan, Step
from fastav.presets import fastav
from fastav.request import Request
from support import families
from support.costs import answered
from support.masked import masked_logits, rules_of
from support.pretended import spread

NAMES = sorted(m.name for m in pkgutil.iter_modules(families.__path__) if not m.name.startswith("_"))
STEPS = 4
REFERENCE = Path(__file__).parents[1] / "reference"
PLAN = fastav(Keep(media=Share(0.6)), drop=0.2)
EARLY = Plan((Step(layers="0", method="position", keep=Keep(media=Share(0.6))),))
EARLIER = Plan(
    (
        Step(layers="1", method="position", keep=Keep(media=Share(0.8))),
        Step(layers="middle", method="last-query", keep=Keep(media=Share(0.6)), earlier_caches=True),
        Step(layers="middle+1", method="last-query", keep=Keep(media=Share(0.7))),
    ),
    "earlier caches",
)
EVERYTHING = fastav(Keep(media=Share(1.0)), drop=1e-9)


@dataclass(frozen=True)
class Generated:
    """What `generate` gave, and how many tokens of each modality every layer kept of each row."""

    sequences: torch.Tensor
    logits: tuple[torch.Tensor, ...]
    tokens: Any


class Family:
    """One family: adapter, model by attention, processor, and its plans."""

    def __init__(self, name: str) -> None:
        self.module = importlib.import_module(f"support.families.{name}")
        model, self.processor = self.module.build("sdpa")
        self.models = {"sdpa": model}
        self.adapter: ModelAdapter = adapter_for([type(model).__name__])
        self.depth = self.adapter.shape(model.config).layers
        self.plan: Plan = getattr(self.module, "PLAN", PLAN)
        self.everything: Plan = getattr(self.module, "EVERYTHING", EVERYTHING)
        self.clips = clips_of(
            self.adapter.supports_audio, getattr(self.module, "SOUND", None), getattr(self.module, "FPS", 10)
        )
        self.known: dict[tuple[int, ...], Prepared] = {}
        self.versions: dict[tuple[int, ...], dict[str, int]] = {}
        self.prepared = self.prepare(*self.clips)
        self.held: dict[int, int] = {}
        self.masked: dict[Any, torch.Tensor] = {}
        self.generated: dict[Any, Generated] = {}

    @cached_property
    def own(self) -> Plan:
        """Cuts by the attention of the layer about to run, of the first layer that sees everything and a middle one."""
        layers = [str(layer) for layer in (self.full_layers[0], self.full_layers[len(self.full_layers) // 2])]
        keep = Keep(media=Share(0.7))
        return Plan(tuple(Step(layers=layer, method="own-last-query", keep=keep) for layer in layers), "own")

    @cached_property
    def full_layers(self) -> list[int]:
        """The layers that have keys and values of their own, and see all tokens."""
        shape = self.adapter.shape(self.model().config)
        return [n for n in range(shape.own_kv_layers) if not (shape.windows and shape.windows[n])]

    def model(self, attention: str = "sdpa") -> Any:
        if attention not in self.models:
            self.models[attention], _ = self.module.build(attention)
        return self.models[attention]

    def spread(self, on_second: Callable[[int], bool]) -> Any:
        """The model on devices: which layers on the second."""
        model, _ = self.module.build("sdpa")
        model.load_state_dict(self.model().state_dict())
        if model._can_set_experts_implementation():
            model.set_experts_implementation("eager")  # others count tokens as only a real device does
        return spread(model, cast(Any, self.adapter.decoder(model)).layers, on_second)

    @cached_property
    def placed(self) -> tuple[Any, Any]:
        """The model on one device, and with its layers on two in turns."""
        return self.spread(lambda _: False), self.spread(lambda number: number % 2 == 1)

    def prepare(self, *requests: Request) -> Prepared:
        """Inputs and layouts; of the clips made once, to be read only."""
        key = tuple(number for one in requests for number, clip in enumerate(self.clips) if clip is one)
        if len(key) < len(requests):
            return self.adapter.prepare(self.processor, requests)
        if key not in self.known:
            self.known[key] = self.adapter.prepare(self.processor, requests)
            self.versions[key] = _versions(self.known[key])
        assert _versions(self.known[key]) == self.versions[key], "a test or a model changed inputs that others share"
        return self.known[key]

    def generate(self, plan: Plan, rows: Sequence[int], attention: str = "sdpa") -> Generated:
        """What `generate` answers about these clips under a plan; made once, to be read only."""
        key = plan, tuple(rows), attention
        if key not in self.generated:
            model, prepared = self.model(attention), self.prepare(*(self.clips[row] for row in rows))
            with prune(model, plan, layouts=prepared.layouts, adapter=self.adapter) as pruning:
                out = generate(model, prepared)
            self.generated[key] = Generated(out.sequences, out.logits, pruning.tokens())
        return self.generated[key]

    def masked_logits(self, clip: int, answer: torch.Tensor, plan: Plan, attention: str) -> torch.Tensor:
        """Logits of an answer about one clip by the oracle, which is the same for every batch."""
        key = clip, tuple(answer.tolist()), plan, attention
        if key not in self.masked:
            alone, model = self.prepare(self.clips[clip]), self.model(attention)
            rules, until = rules_of(plan, alone.layouts[0], self.depth), plan.earlier_caches_until(self.depth)
            layers = cast(Any, self.adapter.decoder(model)).layers
            self.masked[key] = masked_logits(model, layers, alone.inputs, answer, rules, until=until)
        return self.masked[key]

    def unpruned_bytes(self, clip: int) -> int:
        """What the cache holds of one clip without pruning."""
        if clip not in self.held:
            engine = TransformersEngine(self.model(), self.processor, self.adapter)
            self.held[clip] = answered(engine, [self.clips[clip]], self.adapter.preset("none"))[1]
        return self.held[clip]


def clips_of(supports_audio: bool, samples: int | None = None, fps: int = 10) -> tuple[Request, Request]:
    """Two questions about clips of different length, whose sound is as long as they are, or of so many samples."""
    make = np.random.default_rng(0)
    requests = []
    for frames, size, question in ((40, (24, 32), "What is heard?"), (21, (32, 24), "Who?")):
        clip = Clip.from_arrays(
            frames=make.integers(0, 256, (frames, *size, 3), dtype=np.uint8),
            fps=fps,
            waveform=make.uniform(-0.5, 0.5, samples or frames * 16_000 // fps).astype(np.float32)
            if supports_audio
            else None,
            sample_rate=16_000 if supports_audio else None,
        )
        requests.append(Request(clip=clip, question=question))
    return requests[0], requests[1]


def _versions(prepared: Prepared) -> dict[str, int]:
    """How often each tensor of the inputs was changed in place."""
    return {name: value._version for name, value in prepared.inputs.items() if isinstance(value, torch.Tensor)}


@cache
def family_of(name: str) -> Family:
    return Family(name)


def generate(model: Any, prepared: Prepared, **options: Any) -> Any:
    asked = {"max_new_tokens": STEPS, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
    return model.generate(**prepared.inputs, **asked | options)
