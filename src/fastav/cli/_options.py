"""Arguments and options that several commands take."""

from typing import Annotated, Literal

import typer

Device = Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1, ...  [default: cuda where there is one]")]
Dtype = Annotated[
    Literal["float32", "bfloat16", "float16"] | None,
    typer.Option(help="Type of the weights.  [default: bfloat16 on cuda, float32 on cpu]"),
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON and nothing else.")]
Model = Annotated[str, typer.Option(metavar="MODEL", help="A name (fastav models), a local folder, or a hub id.")]
PlanName = Annotated[
    str,
    typer.Option(
        "--plan", metavar="PLAN", help="A preset (fastav models), a recipe (fastav recipes), or a plan's .json file."
    ),
]

# the settings of FastAV
Drop = Annotated[
    str | None,
    typer.Option(metavar="P", help="Drop P of what is left entering every later layer: 20 (percent), 20% or 0.2."),
]
Start = Annotated[str | None, typer.Option(metavar="LAYER", help="Layer of the global cut: a number, or middle.")]
KeepAudio = Annotated[
    int | None, typer.Option(min=0, metavar="N", help="Global cut: keep the first N audio tokens (and all video).")
]
Before = Annotated[
    int | None,
    typer.Option(min=0, metavar="POSITION", help="Global cut: keep what stands before this position of the prompt."),
]
ExemptText = Annotated[
    bool | None,
    typer.Option("--exempt-text/--no-exempt-text", help="Whether the later cuts spare the text.  [default: spare]"),
]

TEXT_TOKENS = 44  # of VideoLLaMA2's prompt with a short question
