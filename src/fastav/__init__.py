"""Training-free token pruning inside audio-visual LLMs."""

__version__ = "0.1.0"
