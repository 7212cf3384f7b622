"""Pruning inside vLLM, as a plugin that vLLM finds by its entry point. docs/vllm.md says how to serve.

`compat` alone imports vLLM. `guards` refuses what would not be exact; `plugin` prunes inside vLLM's processes;
`models` holds the families that vLLM has no models of; `offline` and `engine` are the engine of `fastav.pipeline`.
"""

import logging

from fastav.engines.vllm.engine import VllmEngine

__all__ = ["VllmEngine", "register"]


def register() -> None:
    """Make vLLM know our models and read plans; vLLM calls this in each of its processes.

    vLLM behaves differently only if `additional_config` holds `{"fastav": {"plan": ...}}`.
    """
    from fastav.engines.vllm import compat, models
    from fastav.engines.vllm.plugin.register import install

    try:
        if compat.is_supported():
            models.register()
        install()
    except ImportError as error:  # of a vLLM so different that even its configuration stands elsewhere
        logging.getLogger(__name__).warning("fastav does not prune inside this vLLM: %s", error)
