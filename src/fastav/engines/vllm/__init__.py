"""Pruning inside vLLM, as a plugin that vLLM finds by its entry point. docs/vllm.md says how to serve.

`internals` alone knows vLLM. What it asks of the others: `guards` what to refuse, `passage` which tokens of a prompt
each layer keeps, `walk` where the tokens of a batch are on their way through the layers. `families` holds models that
vLLM does not have, made of its documented parts for models.
"""

import logging

from fastav.engines.vllm.engine import VllmEngine

__all__ = ["VllmEngine", "register"]


def register() -> None:
    """Called by vLLM in each of its processes, before it reads a model's configuration.

    vLLM knows the models in `families` then. Nothing of it behaves differently unless `additional_config` holds
    `{"fastav": {"plan": ...}}`.
    """
    from fastav.engines.vllm import families, internals

    try:
        if internals.supported():
            families.register()
        internals.install()
    except ImportError as error:  # of a vLLM so different that not even its configuration can be read
        logging.getLogger(__name__).warning("fastav does not prune inside this vLLM: %s", error)
