"""Help in groups, and what a shell completes: names that are found without importing anything heavy."""

from collections.abc import Sequence
from typing import Any

from typer.core import TyperCommand, TyperGroup

LONGEST = 1000  # letters of a command's first sentence: however many, it is told whole
PRESETS = ("none", "fastav", "fastav-plus", "fastav-trim")  # of every model


class GroupedCommand(TyperCommand):
    """A command whose options stand under the headings that they name."""

    def format_options(self, ctx: Any, formatter: Any) -> None:
        """Write the sections of arguments and options."""
        _write_parameters(self, ctx, formatter)


class GroupedCommands(TyperGroup):
    """Commands under the headings that they name."""

    def format_options(self, ctx: Any, formatter: Any) -> None:
        """Write the sections of commands, then those of options."""
        self.format_commands(ctx, formatter)
        _write_parameters(self, ctx, formatter)

    def format_commands(self, ctx: Any, formatter: Any) -> None:
        """Write a section for each group of commands; one column is as wide in all."""
        groups: dict[str, list[tuple[str, Any]]] = {}
        for name in self.list_commands(ctx):
            if (command := self.get_command(ctx, name)) is not None and not command.hidden:
                heading = getattr(command, "rich_help_panel", None)
                groups.setdefault(heading if isinstance(heading, str) else "Commands", []).append((name, command))
        widest = max((len(name) for group in groups.values() for name, _ in group), default=0)
        for heading, group in groups.items():
            rows = [(name.ljust(widest), c.get_short_help_str(LONGEST)) for name, c in group]
            with formatter.section(heading):
                formatter.write_dl(rows)


def _write_parameters(command: Any, ctx: Any, formatter: Any) -> None:
    groups: dict[str, list[tuple[str, str]]] = {}
    for parameter in command.get_params(ctx):
        if (record := parameter.get_help_record(ctx)) is not None:
            heading = getattr(parameter, "rich_help_panel", None)
            usual = "Arguments" if parameter.param_type_name == "argument" else "Options"
            groups.setdefault(heading if isinstance(heading, str) else usual, []).append(record)
    for heading in sorted(
        groups, key=lambda one: (one != "Arguments", one != "Options")
    ):  # a sort keeps the rest's order
        with formatter.section(heading):
            formatter.write_dl(groups[heading])


def models(incomplete: str) -> list[str]:
    """Names of models that begin so."""
    from fastav.registry import MODELS

    return _beginning(list(MODELS), incomplete)


def plans(incomplete: str) -> list[str]:
    """Names of presets and recipes that begin so; of several with commas in between, the last."""
    from fastav.registry import RECIPES

    before, comma, last = incomplete.rpartition(",")
    return [f"{before}{comma}{name}" for name in _beginning([*PRESETS, *RECIPES], last)]


def tasks(incomplete: str) -> list[str]:
    """Names of benchmarks that begin so."""
    from fastav.registry import TASKS

    return _beginning(list(TASKS), incomplete)


def engines(incomplete: str) -> list[str]:
    """Names of engines that begin so."""
    from fastav.registry import ENGINES

    return _beginning(list(ENGINES), incomplete)


def _beginning(names: Sequence[str], incomplete: str) -> list[str]:
    return [name for name in dict.fromkeys(names) if name.startswith(incomplete)]
