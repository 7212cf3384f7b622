"""`python -m fastav.bench`: the command `fastav bench`, also where fastav is not installed."""

import sys
from collections.abc import Sequence

from fastav import cli
from fastav.cli._text import print_error


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; the exit code is that of `fastav bench`."""
    try:
        return cli.main(["bench", *(sys.argv[1:] if arguments is None else arguments)])
    except ModuleNotFoundError as error:
        return print_error(f"fastav bench needs the package {error.name!r}, which is not installed")


if __name__ == "__main__":
    sys.exit(main())
