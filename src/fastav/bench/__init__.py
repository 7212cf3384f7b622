"""How fast a model answers: transformers' own `generate`, our engine unpruned, and plans, by turns on random weights.

    fastav bench small                                        # on a CPU: a small decoder, 4,096 tokens
    python -m fastav.bench videollama2 --device cuda          # on a GPU: the released shape; the same command

What is claimed of speed rests on ratios: every round runs every contender once, a round's ratios share the machine's
mood, and medians with quartiles of those ratios are reported. docs/speed.md says what is measured, and how.
"""
