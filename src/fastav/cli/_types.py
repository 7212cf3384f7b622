"""Types of the library for annotations in the commands, without importing their heavy modules at run time."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.status import Status
    from transformers import PreTrainedConfig
    from typer import Context
    from typer._click.core import Command
    from typer._click.formatting import HelpFormatter

    from fastav.adapter import ModelAdapter
    from fastav.calibrate import Calibration, Choice, Prompt
    from fastav.calibrate import Failure as CalibrationFailure
    from fastav.engine import Answer
    from fastav.evaluate import Evaluation
    from fastav.flops import DecoderShape
    from fastav.layout import Layout
    from fastav.media import Clip
    from fastav.method import Method
    from fastav.pipelines import Pipeline
    from fastav.plan import Plan, Step
    from fastav.request import Request
    from fastav.row_files import RowFile
    from fastav.task import Task
else:
    Answer = Calibration = CalibrationFailure = Choice = Clip = Command = Context = DecoderShape = Any
    Evaluation = HelpFormatter = Layout = Method = ModelAdapter = Pipeline = Plan = PreTrainedConfig = Prompt = Any
    Request = RowFile = Status = Step = Task = Any

__all__ = [
    "Answer",
    "Calibration",
    "CalibrationFailure",
    "Choice",
    "Clip",
    "Command",
    "Context",
    "DecoderShape",
    "Evaluation",
    "HelpFormatter",
    "Layout",
    "Method",
    "ModelAdapter",
    "Pipeline",
    "Plan",
    "PreTrainedConfig",
    "Prompt",
    "Request",
    "RowFile",
    "Status",
    "Step",
    "Task",
]
