"""`python -m fastav`: the command line."""

import sys

from fastav.cli import main

sys.exit(main())
