"""transformers' own suites on our models: only `make hf-suite`, which sets FASTAV_HF_SUITE, collects them."""

import os

if "FASTAV_HF_SUITE" not in os.environ:
    collect_ignore_glob = ["test_*.py"]
