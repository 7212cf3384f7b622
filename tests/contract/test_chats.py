"""Chats of every family: each turn equals the model's own run over the whole conversation, masked."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch

from fastav.budgets import Share
from fastav.engines.transformers import TransformersEngine
from fastav.engines.transformers.generation.sampler import TokenSampler
from fastav.layout import Layout, Modality
from fastav.models._official import TOKEN_INPUTS, concatenate
from fastav.pipelines import Pipeline
from fastav.plan import Keep, Plan, Step
from fastav.presets import NONE
from support.family import NAMES, Family, family_of
from support.masked import masked_conversation, rules_of

EARLY = Plan((Step(layers="0", method="position", keep=Keep(media=Share(0.6))),))
STEPS = 3


class Recorder:
    """The turns of a chat as its engine runs them, and the logits of every step."""

    def __init__(self, family: Family, plan: Plan) -> None:
        self.engine = TransformersEngine(family.model(), family.processor, family.adapter)
        self.chat = Pipeline(self.engine, plan, family.adapter).chat()
        self.turns: list[Any] = []
        self.logits: list[torch.Tensor] = []
        prepare = self.engine.prepare_turn

        def recorded(*args: Any) -> Any:
            self.turns.append(prepare(*args))
            return self.turns[-1]

        self.engine.prepare_turn = recorded  # type: ignore[method-assign]

    @property
    def state(self) -> Any:
        return self.chat._conversation._state

    @contextmanager
    def recording(self) -> Iterator[None]:
        take = TokenSampler.take

        def recorded(sampler: TokenSampler, logits: torch.Tensor) -> torch.Tensor:
            self.logits.append(logits[0].clone())
            return take(sampler, logits)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(TokenSampler, "take", recorded)
            yield


@pytest.fixture(params=NAMES)
def family(request: Any) -> Family:
    return family_of(request.param)


def says_that_earlier_questions_chose() -> Any:
    return pytest.warns(match="an earlier question chose the tokens")


@pytest.mark.filterwarnings("ignore:an earlier question chose")
@pytest.mark.parametrize("early", [False, True])
def test_every_step_of_a_chat_equals_the_masked_model(family: Family, early: bool) -> None:
    plan = EARLY if early else family.plan
    record, (first, second) = Recorder(family, plan), family.clips
    asked: list[tuple[Any, ...]] = [(first.clip, "What moves?"), ("Where?",), (second.clip, "And here?"), ("Why?",)]
    if family.adapter.name == "gemma4" and family.module.__name__.endswith("bidirectional"):
        asked.pop(2)  # refused: `generate` passes the types of new tokens alone
    spans, places, layouts = [], [], []
    ids = family.prepared.inputs["input_ids"][0][-len(family.prepared.layouts[0]) :]
    media = (
        ids[torch.from_numpy(family.prepared.layouts[0].item >= 0)].unique().tolist()
    )  # which random weights may say
    with record.recording():
        for content in asked:
            start, n_pending = record.state.length, len(record.state.pending)
            answer = record.chat.ask(*content, max_new_tokens=STEPS, do_sample=False, suppress_tokens=media)
            layout = Layout.join([Layout.of(Modality.TEXT, n_pending), record.turns[-1].layout])
            layouts.append(layout)
            spans.append((start, start + len(layout)))
            places += range(spans[-1][1] - 1, spans[-1][1] - 1 + len(answer.token_ids))
            assert [sum(layer.values()) for layer in answer.tokens_per_layer] == list(plan.tokens(layout, family.depth))
            assert answer.prompt_tokens == layout.by_modality()
    state, inputs = record.state, concatenate([{**turn.inputs} for turn in record.turns])
    pending = torch.tensor([state.pending], dtype=torch.long)
    whole = {name: value for name, value in inputs.items() if name not in TOKEN_INPUTS}
    for name, value in state.tokens.items():
        last = pending if name == "input_ids" else torch.zeros_like(pending) + int(name == "attention_mask")
        whole[name] = torch.cat([value, last.to(value.dtype)], dim=1)
    rules = [(*span, rules_of(plan, layout, family.depth)) for span, layout in zip(spans, layouts, strict=True)]
    model = family.model()
    expected = masked_conversation(model, family.adapter.decoder(model).layers, whole, rules)[places]
    found = torch.stack(record.logits)
    assert found.shape == expected.shape
    assert (found - expected).abs().max() < 1e-3 * expected.abs().max()


def test_a_saved_chat_continues_as_if_it_had_not_been_saved(family: Family, tmp_path: Any) -> None:
    record, (first, _) = Recorder(family, family.plan), family.clips
    chat, options = record.chat, {"max_new_tokens": STEPS, "do_sample": False}
    chat.ask(first.clip, "What moves?", **options)
    chat.save(tmp_path / "chat.safetensors")
    resumed = Pipeline(record.engine, family.plan, family.adapter).chat(resume=tmp_path / "chat.safetensors")
    assert [(one.role, one.text) for one in resumed.messages] == [(one.role, one.text) for one in chat.messages]
    answers, logits = [], []
    for one in (chat, resumed):
        record.logits.clear()
        with record.recording(), says_that_earlier_questions_chose():
            answers.append(one.ask("Where?", **options))
        logits.append(torch.stack(record.logits))
    assert torch.equal(*logits)
    assert answers[0].token_ids == answers[1].token_ids
    assert answers[0].kv_bytes == answers[1].kv_bytes


def test_positions_between_whole_numbers_go_on_from_where_they_were() -> None:
    """Qwen3-Omni counts time in fractions; with letters alone the answers are tokenized as they were said."""
    family = family_of("qwen3_omni")
    record, make = Recorder(family, NONE), np.random.default_rng(0)
    pipe, tokenizer = Pipeline(record.engine, NONE, family.adapter), family.processor.tokenizer
    letters = set(tokenizer.convert_tokens_to_ids(list("abcdefgh")))
    options = {
        "max_new_tokens": STEPS,
        "do_sample": False,
        "suppress_tokens": [i for i in range(len(tokenizer)) if i not in letters],
    }
    frames = make.integers(0, 256, (31, 50, 20, 3), dtype=np.uint8)
    video = {"type": "video", "video": frames, "fps": 7.5}
    messages: list[dict[str, Any]] = []
    for content in ([video, {"type": "text", "text": "What moves?"}], [{"type": "text", "text": "Where?"}]) * 2:
        messages.append({"role": "user", "content": content})
        logits = []
        for ask in (lambda: record.chat.ask(messages[-1:], **options), lambda: pipe(messages, **options)):
            record.logits.clear()
            with record.recording():
                answer = ask()
            logits.append(torch.stack(record.logits))
        messages.append({"role": "assistant", "content": answer.text})
        assert (logits[0] - logits[1]).abs().max() < 1e-5 * logits[1].abs().max()
    assert record.state.next_positions[1] % 1 != 0, "no position is a fraction"
