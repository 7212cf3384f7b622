"""Arguments and options that several commands take."""

from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from fastav.cli import _help

MACHINE, SAMPLING, SETTINGS = "Where it runs", "How tokens are chosen", "FastAV's settings"  # headings of the help

Device = Annotated[
    str | None, typer.Option(rich_help_panel=MACHINE, help="cpu, cuda, cuda:1, ...  [default: cuda where there is one]")
]
Dtype = Annotated[
    Literal["float32", "bfloat16", "float16"] | None,
    typer.Option(rich_help_panel=MACHINE, help="Type of the weights.  [default: bfloat16 on cuda, float32 on cpu]"),
]
DtypeOrAuto = Annotated[
    Literal["auto", "float32", "bfloat16", "float16"] | None,
    typer.Option(
        rich_help_panel=MACHINE,
        help="Type of the weights; auto: the checkpoint's.  [default: bfloat16 on cuda, float32 on cpu]",
    ),
]
Engine = Annotated[
    str,
    typer.Option(
        metavar="ENGINE",
        autocompletion=_help.engines,
        rich_help_panel=MACHINE,
        help="transformers, or vllm (docs/vllm.md), which is quickest with large batches.",
    ),
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON and nothing else.")]
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
        help="A preset (fastav models), a recipe (fastav recipes), or a plan's .json file.",
    ),
]

# what a model is asked, and where its answers go
ModelName = Annotated[
    str,
    typer.Argument(
        metavar="MODEL", autocompletion=_help.models, help="A name (fastav models), a local folder, or a hub id."
    ),
]
TaskName = Annotated[str, typer.Argument(metavar="TASK", autocompletion=_help.tasks, help="A benchmark's name.")]
Folder = Annotated[Path | None, typer.Option(metavar="DIR", help="With the benchmark's annotations, clips.")]
Limit = Annotated[
    int | None, typer.Option(min=1, metavar="N", help="Only so many samples, from the families by turns.")
]
Families = Annotated[
    list[str] | None, typer.Option(metavar="A,B,...", help="Only samples of these families. May be given again.")
]
Jobs = Annotated[
    int, typer.Option(min=1, max=256, metavar="N", rich_help_panel=MACHINE, help="Processes; each loads the model.")
]
Rows = Annotated[
    Path | None,
    typer.Option("--out", metavar="FILE", help="Where rows go as they come; what is there is not done again."),
]
KeepGoing = Annotated[bool, typer.Option("--keep-going", help="Write samples that fail down as errors, and go on.")]

# a question, and how its answer's tokens are chosen
Use = Annotated[
    Literal["auto", "both", "video", "audio"], typer.Option(help="Tracks to show the model; auto: those there are.")
]
MaxNewTokens = Annotated[int, typer.Option(min=1, metavar="N", rich_help_panel=SAMPLING, help="Longest answer.")]
Temperature = Annotated[
    float,
    typer.Option(
        metavar="T", rich_help_panel=SAMPLING, help="Draw tokens, the more evenly the higher; 0: take the likeliest."
    ),
]
TopP = Annotated[
    float,
    typer.Option(
        metavar="P", rich_help_panel=SAMPLING, help="Draw among the likeliest tokens with this share together."
    ),
]
TopK = Annotated[
    int | None, typer.Option(metavar="N", rich_help_panel=SAMPLING, help="Draw among so many tokens.  [default: all]")
]
RepetitionPenalty = Annotated[
    float | None,
    typer.Option(
        metavar="X",
        rich_help_panel=SAMPLING,
        help="Divide logits of tokens that occurred.  [default: as the model says]",
    ),
]
Stop = Annotated[
    list[str] | None,
    typer.Option(metavar="TEXT", rich_help_panel=SAMPLING, help="End an answer before this text. May be given again."),
]
Seed = Annotated[
    int | None,
    typer.Option(min=0, max=2**63 - 1, metavar="N", rich_help_panel=SAMPLING, help="Of the draws.  [default: chance]"),
]


def sampling(
    temperature: float,
    top_p: float,
    top_k: int | None,
    repetition_penalty: float | None,
    stop: list[str] | None,
    seed: int | None,
) -> Any:
    """These options as the library takes them.  Raises: FastAVError."""
    from fastav.engine import Sampling

    return Sampling(
        temperature=temperature,
        top_p=top_p,
        top_k=top_k,
        repetition_penalty=repetition_penalty,
        stop=tuple(stop or ()),
        seed=seed,
    )


# the settings of FastAV
Drop = Annotated[
    str | None,
    typer.Option(
        metavar="P",
        rich_help_panel=SETTINGS,
        help="Drop P of what is left entering every later layer: 20 (percent), 20% or 0.2.",
    ),
]
Start = Annotated[
    str | None,
    typer.Option(metavar="LAYER", rich_help_panel=SETTINGS, help="Layer of the global cut: a number, or middle."),
]
KeepAudio = Annotated[
    int | None,
    typer.Option(
        min=0, metavar="N", rich_help_panel=SETTINGS, help="Global cut: keep the first N audio tokens (and all video)."
    ),
]
Before = Annotated[
    int | None,
    typer.Option(
        min=0,
        metavar="POSITION",
        rich_help_panel=SETTINGS,
        help="Global cut: keep what stands before this position of the prompt.",
    ),
]
ExemptText = Annotated[
    bool | None,
    typer.Option(
        "--exempt-text/--no-exempt-text",
        rich_help_panel=SETTINGS,
        help="Whether the later cuts spare the text.  [default: spare]",
    ),
]

TEXT_TOKENS = 44  # of VideoLLaMA2's prompt with a short question
