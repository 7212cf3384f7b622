"""Grouped help and shell completion. Completion finds names without heavy imports."""

from collections.abc import Sequence

from typer.core import TyperCommand, TyperGroup

from fastav.cli._types import Command, Context, HelpFormatter

MAX_SUMMARY = 1000  # characters of a command's first sentence: large enough that none is cut
PRESETS = ("none", "fastav", "fastav-plus", "fastav-trim")  # of every model


class GroupedCommand(TyperCommand):
    """A command that prints its options under headings."""

    def format_options(self, ctx: Context, formatter: HelpFormatter) -> None:
        """Write the sections of arguments and options."""
        _write_parameters(self, ctx, formatter)


class GroupedCommands(TyperGroup):
    """A group that prints its commands under headings."""

    def format_options(self, ctx: Context, formatter: HelpFormatter) -> None:
        """Write the sections of commands, then the sections of options."""
        self.format_commands(ctx, formatter)
        _write_parameters(self, ctx, formatter)

    def format_commands(self, ctx: Context, formatter: HelpFormatter) -> None:
        """Write one section per heading; the name column has the same width in all."""
        groups: dict[str, list[tuple[str, Command]]] = {}
        for name in self.list_commands(ctx):
            if (command := self.get_command(ctx, name)) is not None and not command.hidden:
                heading = getattr(command, "rich_help_panel", None)
                groups.setdefault(heading if isinstance(heading, str) else "Commands", []).append((name, command))
        widest = max((len(name) for group in groups.values() for name, _ in group), default=0)
        for heading, group in groups.items():
            rows = [(name.ljust(widest), c.get_short_help_str(MAX_SUMMARY)) for name, c in group]
            with formatter.section(heading):
                formatter.write_dl(rows)


def _write_parameters(command: Command, ctx: Context, formatter: HelpFormatter) -> None:
    groups: dict[str, list[tuple[str, str]]] = {}
    for parameter in command.get_params(ctx):
        if (record := parameter.get_help_record(ctx)) is not None:
            heading = getattr(parameter, "rich_help_panel", None)
            usual = "Arguments" if parameter.param_type_name == "argument" else "Options"
            groups.setdefault(heading if isinstance(heading, str) else usual, []).append(record)
    # the sort is stable, so other headings keep their order
    for heading in sorted(groups, key=lambda heading: (heading != "Arguments", heading != "Options")):
        with formatter.section(heading):
            formatter.write_dl(groups[heading])


def models(incomplete: str) -> list[str]:
    """Names of models that start with `incomplete`."""
    from fastav.registry import MODELS

    return _beginning(list(MODELS), incomplete)


def plans(incomplete: str) -> list[str]:
    """Names of presets and recipes that start with `incomplete`, or with its part after the last comma."""
    from fastav.registry import RECIPES

    before, comma, last = incomplete.rpartition(",")
    return [f"{before}{comma}{name}" for name in _beginning([*PRESETS, *RECIPES], last)]


def tasks(incomplete: str) -> list[str]:
    """Names of benchmarks that start with `incomplete`."""
    from fastav.registry import TASKS

    return _beginning(list(TASKS), incomplete)


def engines(incomplete: str) -> list[str]:
    """Names of engines that start with `incomplete`."""
    from fastav.registry import ENGINES

    return _beginning(list(ENGINES), incomplete)


def _beginning(names: Sequence[str], incomplete: str) -> list[str]:
    return [name for name in dict.fromkeys(names) if name.startswith(incomplete)]
