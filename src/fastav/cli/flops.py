"""`fastav flops`."""

import json
from collections.abc import Callable, Sequence
from typing import Annotated, Any

import typer

from fastav.cli import _help, _options, _plans, _render
from fastav.cli._output import print_json
from fastav.cli._progress import spinner, suppress_warnings
from fastav.cli._types import DecoderShape, Layout, Plan

MOST_TOKENS = 1_000_000
MOST_SECONDS = 86_400


def flops(
    model: Annotated[
        str,
        typer.Argument(
            metavar="MODEL", autocompletion=_help.models, help="A name (fastav models), a local folder, or a hub id."
        ),
    ] = "videollama2",
    plan: _options.PlanName = "fastav",
    retention: _options.Retention = None,
    drop: _options.Drop = None,
    start: _options.Start = None,
    keep_audio: _options.KeepAudio = None,
    before: _options.Before = None,
    exempt_text: _options.ExemptText = None,
    seconds: Annotated[
        float | None,
        typer.Option(
            min=0.1, max=MOST_SECONDS, metavar="S", help="Length of a 720p clip with sound.  [default: a typical one]"
        ),
    ] = None,
    video_tokens: Annotated[
        int | None,
        typer.Option(
            min=0, max=MOST_TOKENS, metavar="N", help="Video tokens of the prompt.  [default: those of the clip]"
        ),
    ] = None,
    audio_tokens: Annotated[
        int | None,
        typer.Option(
            min=0, max=MOST_TOKENS, metavar="N", help="Audio tokens of the prompt.  [default: those of the clip]"
        ),
    ] = None,
    text_tokens: Annotated[
        int, typer.Option(min=1, max=MOST_TOKENS, metavar="N", help="Text tokens of the prompt.")
    ] = _options.TEXT_TOKENS,
    as_json: _options.Json = False,
) -> None:
    """Compute the FLOPs and KV cache bytes of a prefill, with and without a plan.

    Only the configuration is needed, no weights. FLOPs are computed by the paper's formula, and exactly (grouped-query
    attention, SwiGLU, causal mask).

    The default prompt is a typical one of the model; --seconds gives one for a clip of another length. For VideoLLaMA2
    it has 676 video, 1,496 audio and 44 text tokens, and --drop 0, 10, 20 and 30 reproduce the paper's FLOPs column.
    """
    with spinner(f"reading {model}"), suppress_warnings():
        from fastav import pipelines

        adapter, _, config = pipelines.resolve(model)
        tuned_plan = _plans.tune(
            pipelines.plan_named(_plans.aimed(plan, retention), adapter),
            drop=drop,
            start=start,
            keep_audio=keep_audio,
            before=before,
            exempt_text=exempt_text,
        )
        _plans.check_runnable(tuned_plan, config, adapter)
        layout = adapter.example(config, seconds=seconds, audio=audio_tokens, video=video_tokens, text=text_tokens)
        report = {"model": model, **costs(adapter.shape(config), tuned_plan, layout)}
    if as_json:
        print_json(report)
    else:
        _render.flops(report)


def costs(shape: DecoderShape, plan: Plan, layout: Layout) -> dict[str, Any]:
    """The costs of a prompt with and without a plan, in the form of the JSON output."""
    from dataclasses import asdict

    from fastav.flops import kv_bytes, paper_flops, prefill_flops
    from fastav.retention import mean_retention

    plan = plan.for_decoder(shape)
    full, pruned = [len(layout)] * shape.layers, plan.tokens(layout, shape.layers)
    cached = plan.cache_tokens(layout, shape.layers)

    def saving(cost: Callable[[DecoderShape, Sequence[int]], int], tokens: Sequence[int] = pruned) -> dict[str, Any]:
        before, after = cost(shape, full), cost(shape, tokens)
        return {"full": before, "pruned": after, "ratio": after / before}

    prompt, layers = layout.by_modality(), plan.by_layer(layout, shape.layers)
    return {
        "decoder": asdict(shape),
        "plan": json.loads(plan.to_json()),
        "prompt_tokens": prompt,
        "tokens_per_layer": layers,
        "mean_retention": mean_retention(layers, prompt),
        "paper_flops": saving(paper_flops),
        "flops": saving(prefill_flops),
        "kv_bytes": {**saving(kv_bytes, cached), "dtype": "bfloat16"},
    }
