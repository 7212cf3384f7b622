"""vLLM's own server under load, unpruned and pruned: `python -m fastav.bench.load`.

For every contender by turns, round after round, a server is started on loopback and asked by 1, 2, 4, ... concurrent
clients about clips of mixed lengths. docs/vllm.md says what is measured.
"""
