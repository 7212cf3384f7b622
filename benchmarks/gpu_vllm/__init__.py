"""Pruning inside vLLM on a GPU, in minutes: `python -m benchmarks.gpu_vllm`, or `make gpu-vllm`.

First spot checks of exactness on random weights, then, if they pass, servers under load. docs/vllm.md says more.
"""
