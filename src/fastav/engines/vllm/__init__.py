"""Pruning inside vLLM, as a plugin that vLLM finds by its entry point. docs/vllm.md says how to serve.

`internals` alone knows vLLM. What it asks of the others: `guards` what to refuse, `passage` which tokens of a prompt
each layer keeps, `walk` where the tokens of a batch are on their way through the layers.
"""

import logging

from fastav.engines.vllm.engine import VllmEngine

__all__ = ["VllmEngine", "register"]


def register() -> None:
    """Called by vLLM in each of its processes, before it reads a model's configuration.

    Nothing of vLLM behaves differently unless `additional_config` holds `{"fastav": {"plan": ...}}`.
    """
    from fastav.engines.vllm import internals

    try:
        internals.install()
    except ImportError as error:  # of a vLLM so different that not even its configuration can be read
        logging.getLogger(__name__).warning("fastav does not prune inside this vLLM: %s", error)
