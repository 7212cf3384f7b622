"""Chats: questions one after another, answered from one pruned cache."""

import warnings
from collections.abc import Callable, Mapping, Sequence
from os import PathLike
from pathlib import Path
from typing import Any

from fastav.decoding.settings import check_settings
from fastav.engine import Answer, Conversation
from fastav.errors import FastAVError, FastAVWarning
from fastav.messages import Message, Use, is_conversation
from fastav.method import ATTENTION_SIGNALS, OWN_SIGNALS, Signal, method_of
from fastav.plan import Plan
from fastav.request import Request, clip_of, question_of

# signals that depend on what is asked
_BY_QUESTION = ATTENTION_SIGNALS | OWN_SIGNALS | {Signal.ROLLOUT, Signal.QUESTION}


class Chat:
    """A conversation about clips that are prefilled once.  Made by `Pipeline.chat`.

    Each question continues from the pruned cache of the turns before. A turn can bring new clips, sounds and images, as
    far as the model takes them; their tokens are pruned by the plan when they come, and earlier tokens stay as they
    were cut. Results equal those of the whole conversation with the dropped tokens masked (docs/exactness.md).

    messages: all messages so far, answers included. Threads can share a chat; questions take turns.
    """

    def __init__(
        self,
        conversation: Conversation,
        plan: Plan,
        *,
        system: str | None = None,
        tools: Sequence[Mapping[str, Any]] | None = None,
    ) -> None:
        self._conversation, self.plan, self._tools = conversation, plan, tools
        self.messages: tuple[Message, ...] = ()
        self._system = () if system is None else (Message(role="system", content=system),)
        self._is_resumed = self._has_warned = False

    def __repr__(self) -> str:
        return f"Chat({len(self.messages)} messages, plan={self.plan.name or self.plan.fingerprint!r})"

    def ask(
        self,
        *content: Any,
        use: Use | str = Use.AUTO,
        replan: bool = False,
        on_text: Callable[[str], None] | None = None,
        **settings: Any,
    ) -> Answer:
        """Ask the next question, and return its answer.  After an error the chat is as it was before.

        content: a question; a clip and a question; or the parts of a message or whole messages (docs/messages.md).
        use, on_text, settings: as for a pipeline.
        replan: prefill the whole conversation anew, so that the plan chooses tokens for this question. Otherwise, under
        a plan that scores by attention, the tokens that stay are those that earlier questions chose; a warning says so,
        once.

        The answer's `flops` are those of this turn's prefill, its `kv_bytes` those of the whole cache behind it. Its
        `prompt_tokens` and `tokens_per_layer` are those of this turn, to which the last token of the answer before can
        belong.
        Raises: as a call of a pipeline; FastAVError if the chat template changes earlier messages, or to replan a chat
        that was resumed from a file, which has no media.
        """
        settings, use = check_settings(settings), Use(use)
        with self._conversation.turn():
            return self._ask(content, use, replan, on_text, settings)

    def _ask(
        self,
        content: Sequence[Any],
        use: Use,
        replan: bool,
        on_text: Callable[[str], None] | None,
        settings: Mapping[str, Any],
    ) -> Answer:
        new = self._request(content, use)
        is_first = not self.messages
        request = new
        if replan and not is_first:
            if self._is_resumed:
                raise FastAVError("a resumed chat has no media to prefill anew", "start a new chat")
            request = Request(messages=(*self.messages, *new.messages), tools=self._tools)
        elif not is_first:
            self._warn_of_earlier_choice()
        answer = self._conversation.ask(request, anew=replan, on_text=on_text, **settings)
        self.messages += (*new.messages, Message(role="assistant", content=answer.text))
        return answer

    def save(self, path: str | PathLike[str]) -> None:
        """Write the conversation and its pruned cache to a file, which `Pipeline.chat(resume=path)` continues.

        Raises: FastAVError before the first answer, or if the file cannot be written.
        """
        with self._conversation.turn():
            texts = [{"role": message.role, "text": message.text} for message in self.messages]
            self._conversation.save(Path(path), {"messages": texts})

    def resume(self, path: str | PathLike[str]) -> "Chat":
        """Continue from a file that `save` wrote.  Raises: FastAVError if it is of another model, dtype or plan."""
        fields = self._conversation.load(Path(path))
        self.messages = tuple(Message(role=one["role"], content=one["text"]) for one in fields["messages"])
        self._is_resumed = True
        return self

    def _request(self, content: Sequence[Any], use: Use) -> Request:
        """The new messages.  Raises: FastAVError, MediaError."""
        if len(content) == 1 and is_conversation(content[0]) and not _are_parts(content[0]):
            messages: Any = content[0]
        elif len(content) == 1 and isinstance(content[0], list | tuple):
            messages = [{"role": "user", "content": list(content[0])}]
        elif len(content) == 1:
            messages = [{"role": "user", "content": question_of(content[0])}]
        elif len(content) == 2:
            messages = Request(clip=clip_of(content[0]), question=question_of(content[1]), use=use).messages
        else:
            raise FastAVError(
                f"ask takes a question, a clip and a question, or messages, got {len(content)} arguments",
                'chat.ask("clip.mp4", "What happens?")',
            )
        first = () if self.messages else self._system
        given = Request(messages=messages, use=use, tools=self._tools)
        return Request(messages=(*first, *given.messages), tools=self._tools) if first else given

    def _warn_of_earlier_choice(self) -> None:
        """Say once that earlier questions chose the tokens that this one is answered from."""
        has_media = any(message.media for message in self.messages) or self._is_resumed
        chooses = any(method_of(step).needs & _BY_QUESTION for step in self.plan.steps)
        if self._has_warned or not (has_media and chooses):
            return
        self._has_warned = True
        warnings.warn(
            "an earlier question chose the tokens that stay: this one is answered from them. "
            "chat.ask(..., replan=True) prefills the conversation anew",
            FastAVWarning,
            stacklevel=4,
        )


def _are_parts(value: Any) -> bool:
    """Whether a list holds the parts of one message, rather than messages."""
    return all(isinstance(one, Mapping) and "type" in one and "role" not in one for one in value)
