"""How fast a model answers: transformers' own `generate`, our engine unpruned, and plans, in turn, on random weights.

    fastav bench small                                        # on a CPU: a small decoder, 4,096 tokens
    python -m fastav.bench videollama2 --device cuda          # on a GPU: the released shape; the same command

Statements about speed rest on ratios: every round runs every contender once, so that all contenders of a round meet the
same load of the machine. Reports give medians with quartiles of the ratios. docs/speed.md defines what is measured.
"""
