"""Prefill time, decode time, memory and overhead, pruned against unpruned, on random weights.

    python -m fastav.bench                                   # on a CPU: a small decoder, 4096 tokens
    python -m fastav.bench --shape videollama2 --device cuda # on a GPU: the released shape

What is claimed of speed rests on ratios: every round runs every plan once, a round's ratios share the machine's mood,
and medians with quartiles of those ratios are reported.
"""
