"""A conversation over one pruned cache: later turns continue from what earlier turns kept."""

import time
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager
from copy import copy
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import DynamicCache

from fastav import cache_argument
from fastav.adapter import Transcript
from fastav.decoding.stopping import Stop
from fastav.decoding.streaming import Stream
from fastav.engine import Answer, Conversation
from fastav.engines.transformers import guards, saved_cache
from fastav.engines.transformers.devices import input_device, running_on
from fastav.engines.transformers.generation.call import Call, checked_call, seeded, until_end
from fastav.engines.transformers.hooks import prune
from fastav.engines.transformers.prefetch import on_device
from fastav.engines.transformers.timing import PeakMemory, Phases
from fastav.errors import FastAVError, PlanError
from fastav.flops import Saving, kv_bytes, prefill_flops
from fastav.layout import Layout, Modality
from fastav.models._official import TOKEN_INPUTS
from fastav.pruning.compiled import CompiledPlan
from fastav.request import Request
from fastav.request_lock import Cancellation, RequestLock


class _State(NamedTuple):
    """A conversation after a turn.

    transcript: all messages. layers: of the cache; None before the first turn, and where the cache cannot be continued.
    tokens: arguments of `forward` with one value per token of the cache, each [1, tokens]. pending: last tokens of the
    answer, which the model has not run on. next_positions: the first free position in the text, and on the axes of
    M-RoPE, which can be a fraction (Qwen3-Omni).
    """

    transcript: Transcript = Transcript()
    layers: tuple[Any, ...] | None = None
    tokens: Mapping[str, Tensor] = {}
    pending: tuple[int, ...] = ()
    next_positions: tuple[int, int | float] = (0, 0)

    @property
    def length(self) -> int:
        """The number of tokens of the cache in the unpruned sequence."""
        return self.tokens["input_ids"].shape[1] if self.tokens else 0


class CachedConversation(Conversation):
    """A conversation of one model.  Made by `TransformersEngine.conversation`.

    Each turn is prefilled behind the cache of the earlier ones, and its tokens are pruned by the plan (`Pruning.turn`).
    """

    def __init__(self, engine: Any, compiled: CompiledPlan) -> None:
        self._engine, self._compiled = engine, compiled
        self._state = _State()
        self._turns = RequestLock()

    @property
    def transcript(self) -> Transcript:
        """All messages so far, as the chat template has them."""
        return self._state.transcript

    @contextmanager
    def turn(self) -> Generator[None]:
        """Hold the conversation; a thread that holds the model must not wait for it."""
        self._engine.refuse_nested()
        with self._turns:
            yield

    @torch.inference_mode()
    def ask(
        self,
        request: Request,
        *,
        anew: bool = False,
        on_text: Callable[[str], None] | None = None,
        cancellation: Cancellation | None = None,
        **settings: Any,
    ) -> Answer:
        """Answer new messages, or, if `anew`, a whole conversation with a new cache."""
        engine, state = self._engine, _State() if anew else self._state
        if state.layers is None and state.transcript.messages:
            raise FastAVError("the cache could not be cut where the last answer ended", "pass replan=True to continue")
        call = checked_call(settings, engine.generation_config, streams=on_text is not None)
        if (call.settings.config.num_beams or 1) > 1:
            raise PlanError("a conversation continues one answer, and beams have several", "remove num_beams")
        if (kind := call.settings.config.cache_implementation) is not None:
            raise PlanError(f"a conversation keeps its own cache, not one of {kind!r}", "remove cache_implementation")
        start = time.perf_counter()
        turn = engine.prepare_turn(request, state.transcript)
        media = time.perf_counter() - start
        layout = Layout.join([Layout.of(Modality.TEXT, len(state.pending)), turn.layout])
        total = state.length + len(layout)
        engine.require_room(total, call.settings.new_tokens(total))
        with engine.answering(cancellation):
            self._state, answer = self._answer(state, turn, layout, call, media, on_text, cancellation)
        return answer

    def save(self, path: Path, fields: Mapping[str, Any]) -> None:
        """Write the conversation to a file.  fields: to store with it."""
        state = self._state
        if state.layers is None:
            raise FastAVError("there is no cache to save", "ask something first, with replan=True after a failed cut")
        transcript = {"messages": state.transcript.messages, "text": state.transcript.text}
        known = {
            **fields,
            "transcript": {**transcript, "tools": state.transcript.tools},
            "pending": state.pending,
            "next_positions": state.next_positions,
        }
        saved_cache.save(path, self._identity(), known, state.layers, state.tokens)

    def load(self, path: Path) -> Mapping[str, Any]:
        """Continue from a file that `save` wrote; the fields that were stored with it."""
        device = input_device(self._engine.model)
        fields, layers, tokens = saved_cache.load(path, self._identity(), self._compiled, device)
        transcript = fields["transcript"]
        self._state = _State(
            Transcript(tuple(transcript["messages"]), transcript["text"], tuple(transcript["tools"])),
            layers,
            tokens,
            tuple(fields["pending"]),
            tuple(fields["next_positions"]),
        )
        return fields

    def _identity(self) -> dict[str, str]:
        """What a file must agree in."""
        engine = self._engine
        return {
            "model": engine.adapter.name,
            "configuration": saved_cache.fingerprint_of(engine.model.config),
            "dtype": engine.dtype,
            "weights": saved_cache.weights_of(engine.model),
            "plan": self._compiled.plan.fingerprint,
        }

    def _answer(
        self,
        state: _State,
        turn: Any,
        layout: Layout,
        call: Call,
        media: float,
        on_text: Callable[[str], None] | None,
        cancellation: Cancellation | None,
    ) -> tuple[_State, Answer]:
        engine = self._engine
        model, tokenizer = engine.model, engine.processor.tokenizer
        device = input_device(model)
        arguments = on_device(self._arguments(state, turn.inputs), model)
        cache: Any = DynamicCache(config=self._compiled.config)
        if state.layers is not None:
            cache.layers[: len(state.layers)] = map(copy, state.layers)  # whose tensors are replaced, not changed
        stop = Stop(tokenizer, call.settings.stop_texts)
        stream = None if on_text is None else Stream(tokenizer, on_text, stop, cancellation)
        phases, memory = Phases(device), PeakMemory(*running_on(model))
        prompt, positions = arguments["input_ids"].shape[1], arguments["position_ids"]
        options = call.arguments(engine.generation_config, engine.adapter, stop, stream, prompt=prompt, keep_cache=True)
        with (
            guards.patched(model, "generation_config", engine.generation_config),
            prune(model, self._compiled) as pruning,
            pruning.turn([layout]),
            phases.timing(model, engine.adapter.encoders(model)),
            seeded(call.settings.given.get("seed"), device),
            call.running(phases),
        ):
            output: Any = model.generate(
                **arguments, **cache_argument.as_argument(cache, model.prepare_inputs_for_generation), **options
            )
        ids: Tensor = output if isinstance(output, Tensor) else output.sequences
        layer_tokens = pruning.tokens()[0]
        tokens, text, is_complete = until_end(ids[0, prompt:].tolist(), call, stop)
        transcript = turn.transcript.answered(tokenizer.decode(tokens, skip_special_tokens=True))
        limit = call.settings.new_tokens(prompt)
        answer = self._report(state, layout, layer_tokens, {"media": media} | phases.seconds(), memory.bytes())
        answer = replace(
            answer,
            text=text.strip(),
            token_ids=tuple(tokens),
            finish="stop" if is_complete or len(tokens) < limit else "length",
        )
        # layers that share keys and values read these; 5.24 gives them layers without content
        layers = cache.layers[: self._compiled.n_kv_layers]
        return _after(layers, transcript, arguments, positions, tuple(tokens), prompt), answer

    def _arguments(self, state: _State, inputs: Mapping[str, Any]) -> dict[str, Any]:
        """Arguments of `generate`: ids and masks of the whole conversation, positions and media of the new turn."""
        pending = torch.tensor([state.pending], dtype=torch.long)
        turn: dict[str, Any] = dict(inputs)
        for name in TOKEN_INPUTS & turn.keys():
            first = pending if name == "input_ids" else torch.zeros_like(pending, dtype=turn[name].dtype)
            turn[name] = torch.cat([first, turn[name]], dim=1)
        turn["attention_mask"] = torch.ones_like(turn["input_ids"])
        if (own := turn.get("position_ids")) is None:  # as the model makes them for a prompt
            own = self._engine.model._prepare_position_ids_for_generation(turn["input_ids"], turn)
        else:
            first = torch.arange(len(state.pending)).expand(*own.shape[:-1], -1)
            own = torch.cat([first, own + len(state.pending)], dim=-1)
        turn["position_ids"] = _shifted(own, state.next_positions)
        for name in TOKEN_INPUTS & turn.keys():
            earlier = state.tokens.get(name)
            if earlier is None:
                earlier = torch.full((1, state.length), int(name == "attention_mask"), dtype=turn[name].dtype)
            turn[name] = torch.cat([earlier, turn[name]], dim=1)
        return turn

    def _report(
        self,
        state: _State,
        layout: Layout,
        layer_tokens: list[dict[str, int]],
        seconds: dict[str, float],
        peak: int | None,
    ) -> Answer:
        """The costs of a turn: FLOPs of its own prefill, bytes of the whole cache behind it."""
        engine, plan = self._engine, self._compiled.plan
        shape, itemsize = engine.adapter.shape(engine.model.config), engine.model.dtype.itemsize
        before, past = self._cached(state), [state.length] * shape.layers
        new = [sum(layer.values()) for layer in layer_tokens]
        head = prefill_flops(shape, [0] * shape.layers)

        def flops(earlier: list[int], later: list[int]) -> int:
            whole = prefill_flops(shape, [a + b for a, b in zip(earlier, later, strict=True)])
            return whole - prefill_flops(shape, earlier) + head

        full = [len(layout)] * shape.layers
        stored = [a + b for a, b in zip(before, plan.cache_tokens(layout, shape.layers), strict=True)]
        return Answer(
            text="",
            token_ids=(),
            finish="",
            plan=plan.name or plan.fingerprint,
            prompt_tokens=layout.by_modality(),
            tokens_per_layer=tuple(layer_tokens),
            flops=Saving(flops(past, full), flops(before, new)),
            kv_bytes=Saving(
                kv_bytes(shape, [state.length + len(layout)] * shape.layers, itemsize),
                kv_bytes(shape, stored, itemsize),
            ),
            seconds=seconds,
            peak_bytes=peak,
        )

    def _cached(self, state: _State) -> list[int]:
        """The number of tokens in the cache that each layer reads."""
        if state.layers is None:
            return [0] * self._compiled.depth
        counts = [layer.keys.shape[2] for layer in state.layers]
        return [counts[source] for source in self._compiled.kv_sources]


def _after(
    layers: Sequence[Any],
    transcript: Transcript,
    arguments: Mapping[str, Any],
    positions: Tensor,
    tokens: tuple[int, ...],
    prompt: int,
) -> _State:
    """The state after an answer.  tokens: of the answer, without what ended it."""
    n_run = layers[0].get_seq_length() - prompt  # answer tokens that the model has run on
    if n_run > len(tokens):
        try:
            for layer in layers:
                layer.crop(len(tokens) - n_run)
        except (ValueError, FastAVError):  # a sliding window has lost the tokens before
            return _State(transcript)
        n_run = len(tokens)
    kept = torch.tensor([tokens[:n_run]], dtype=torch.long)
    filler = {"input_ids": kept, "attention_mask": torch.ones_like(kept)}
    known = {
        name: torch.cat([value.cpu(), filler.get(name, torch.zeros_like(kept)).to(value.dtype)], dim=1)
        for name, value in arguments.items()
        if name in TOKEN_INPUTS
    }
    text = positions[0] if len(positions) == 4 else positions
    axes = positions[1:] if len(positions) == 4 else positions
    following = (int(text.max()) + 1 + n_run, axes.max().item() + 1 + n_run)
    return _State(transcript, tuple(layers), known, tokens[n_run:], following)


def _shifted(positions: Tensor, start: tuple[int, int | float]) -> Tensor:
    """Positions of a turn behind those of earlier turns.

    positions: [1, tokens]; [3, 1, tokens] on M-RoPE's axes; or [4, 1, tokens], where the first row counts tokens.
    """
    if positions.ndim == 2:
        return positions + start[0]
    shift = torch.full((len(positions), 1, 1), start[1])
    if len(positions) == 4:
        shift[0] = start[0]
    return positions + shift
