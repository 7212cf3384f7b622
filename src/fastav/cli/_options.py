"""Arguments and options that several commands share."""

from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from fastav.cli import _help
from fastav.errors import FastAVError

MACHINE, SAMPLING, SETTINGS = "Hardware", "Sampling", "FastAV settings"  # headings in the help

Device = Annotated[
    str | None, typer.Option(rich_help_panel=MACHINE, help="cpu, cuda, cuda:1, ...  [default: cuda if available]")
]
Dtype = Annotated[
    Literal["float32", "bfloat16", "float16"] | None,
    typer.Option(
        rich_help_panel=MACHINE, help="Data type of the weights.  [default: bfloat16 on cuda, float32 on cpu]"
    ),
]
DtypeOrAuto = Annotated[
    Literal["auto", "float32", "bfloat16", "float16"] | None,
    typer.Option(
        rich_help_panel=MACHINE,
        help="Data type of the weights; auto is the checkpoint's.  [default: bfloat16 on cuda, float32 on cpu]",
    ),
]
Engine = Annotated[
    str,
    typer.Option(
        metavar="ENGINE",
        autocompletion=_help.engines,
        rich_help_panel=MACHINE,
        help="transformers, or vllm, which is fastest with large batches (docs/vllm.md).",
    ),
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON only.")]
Model = Annotated[
    str,
    typer.Option(
        metavar="MODEL", autocompletion=_help.models, help="A name (fastav models), a local folder, or a hub id."
    ),
]
PlanName = Annotated[
    str,
    typer.Option(
        "--plan",
        metavar="PLAN",
        autocompletion=_help.plans,
        help="A preset (fastav models), a recipe (fastav recipes), or the .json file of a plan.",
    ),
]
Retention = Annotated[
    str | None,
    typer.Option(
        metavar="R",
        help="Scale the plan to keep the share R of audio and video, mean over layers: 0.25, or audio:0.5+video:0.2.",
    ),
]

# models, benchmarks, and files of answers
ModelName = Annotated[
    str,
    typer.Argument(
        metavar="MODEL", autocompletion=_help.models, help="A name (fastav models), a local folder, or a hub id."
    ),
]
TaskName = Annotated[
    str, typer.Argument(metavar="TASK", autocompletion=_help.tasks, help="Name of a benchmark (docs/tasks.md).")
]
Folder = Annotated[
    Path | None, typer.Option(metavar="DIR", help="Folder with the annotations and clips of the benchmark.")
]
Limit = Annotated[
    int | None, typer.Option(min=1, metavar="N", help="Use at most N samples, taken from the families in turn.")
]
Families = Annotated[
    list[str] | None, typer.Option(metavar="A,B,...", help="Use samples of these families only. Can be repeated.")
]
Jobs = Annotated[
    int,
    typer.Option(
        min=1, max=256, metavar="N", rich_help_panel=MACHINE, help="Number of processes; each loads the model."
    ),
]
Rows = Annotated[
    Path | None,
    typer.Option(
        "--out", metavar="FILE", help="File of rows. New rows are appended; existing ones are not computed again."
    ),
]
KeepGoing = Annotated[bool, typer.Option("--keep-going", help="Record samples that fail as errors, and continue.")]

# tracks of a clip, and sampling
Use = Annotated[
    Literal["auto", "both", "video", "audio"],
    typer.Option(help="Tracks to show the model; auto uses all that the clip has."),
]
MaxNewTokens = Annotated[
    int, typer.Option(min=1, metavar="N", rich_help_panel=SAMPLING, help="Maximum length of an answer in tokens.")
]
Temperature = Annotated[
    float,
    typer.Option(
        metavar="T", rich_help_panel=SAMPLING, help="Sampling temperature; 0 always takes the most likely token."
    ),
]
TopP = Annotated[
    float,
    typer.Option(
        metavar="P", rich_help_panel=SAMPLING, help="Sample from the most likely tokens with total probability P."
    ),
]
TopK = Annotated[
    int | None,
    typer.Option(
        min=1, metavar="N", rich_help_panel=SAMPLING, help="Sample from the N most likely tokens.  [default: all]"
    ),
]
RepetitionPenalty = Annotated[
    float | None,
    typer.Option(
        metavar="X",
        rich_help_panel=SAMPLING,
        help="Divide the logits of earlier tokens by X.  [default: the model's setting]",
    ),
]
Stop = Annotated[
    list[str] | None,
    typer.Option(metavar="TEXT", rich_help_panel=SAMPLING, help="End an answer before this text. Can be repeated."),
]
Seed = Annotated[
    int | None,
    typer.Option(
        min=0, max=2**63 - 1, metavar="N", rich_help_panel=SAMPLING, help="Seed for sampling.  [default: random]"
    ),
]


def generation_settings(
    max_new_tokens: int,
    temperature: float,
    top_p: float,
    top_k: int | None,
    repetition_penalty: float | None,
    stop: list[str] | None,
    seed: int | None,
) -> dict[str, Any]:
    """The sampling options as keyword arguments of `generate`.  Raises: FastAVError."""
    from fastav.decoding.settings import check_settings, greedy_settings

    if not temperature and (top_p < 1 or top_k is not None or seed is not None):
        raise FastAVError("--top-p, --top-k and --seed need --temperature > 0", "set a temperature, e.g. 0.7")
    sampled = {"do_sample": True, "num_beams": 1, "temperature": temperature, "top_p": top_p, "top_k": top_k or 0}
    optional = {"repetition_penalty": repetition_penalty, "stop_strings": stop, "seed": seed}
    settings = {"max_new_tokens": max_new_tokens, **(sampled if temperature else greedy_settings())}
    return check_settings(settings | {name: value for name, value in optional.items() if value is not None})


# settings of FastAV plans
Drop = Annotated[
    str | None,
    typer.Option(
        metavar="P",
        rich_help_panel=SETTINGS,
        help="Drop the share P of the remaining tokens at every later layer: 20 (percent), 20% or 0.2.",
    ),
]
Start = Annotated[
    str | None,
    typer.Option(
        metavar="LAYER", rich_help_panel=SETTINGS, help="Layer of the global cut: a number, or middle (half the depth)."
    ),
]
KeepAudio = Annotated[
    int | None,
    typer.Option(
        min=0,
        metavar="N",
        rich_help_panel=SETTINGS,
        help="At the global cut, keep the first N audio tokens and all video.",
    ),
]
Before = Annotated[
    int | None,
    typer.Option(
        min=0,
        metavar="POSITION",
        rich_help_panel=SETTINGS,
        help="At the global cut, keep the tokens before this position of the prompt.",
    ),
]
ExemptText = Annotated[
    bool | None,
    typer.Option(
        "--exempt-text/--no-exempt-text",
        rich_help_panel=SETTINGS,
        help="Whether later cuts keep all text.  [default: they do]",
    ),
]

TEXT_TOKENS = 44  # text tokens of VideoLLaMA2's prompt with a short question
