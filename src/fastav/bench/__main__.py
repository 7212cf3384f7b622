"""`python -m fastav.bench`: `fastav bench` where fastav is not installed."""

import sys
from collections.abc import Sequence

import typer

from fastav.bench.command import bench
from fastav.errors import FastAVError
from fastav.installation import importable

app = typer.Typer(add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False)
app.command("bench")(bench)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; the exit code is 2 for what the user can mend."""
    try:
        with importable():
            app(list(sys.argv[1:] if arguments is None else arguments), prog_name="python -m fastav.bench")
    except SystemExit as done:
        return int(done.code or 0)
    except FastAVError as error:
        print(f"fastav.bench: {error}", file=sys.stderr)
        return 2
    except ModuleNotFoundError as error:
        print(f"fastav.bench needs the package {error.name!r}, which is not installed", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
