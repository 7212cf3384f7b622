"""vLLM's own server under load, unpruned and pruned: `python -m benchmarks.load`.

In every round a server is started on loopback for each contender, and 1, 2, 4, ... concurrent clients ask it questions
about clips of mixed lengths. docs/vllm.md defines what is measured.
"""
