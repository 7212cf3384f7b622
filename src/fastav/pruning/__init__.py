"""The core of pruning, the same for every engine.

`compiled`: a plan for one model, checked once. `state`: which tokens remain while a prefill runs. `selection`: which
tokens stay. `device_layout`: layouts and counts as tensors. `indexing`: gathering tokens. `attention`, `rollout`:
scores from queries and keys. `decoder_layers`: windows and shared keys. `verification`: whether a plan took effect.
"""
