"""The core of pruning, the same for every engine.

`compiled`: a plan for one model, checked once. `state`: the remaining tokens while a prefill runs. `selection`: the
choice of tokens to keep. `device_layout`: layouts and counts as tensors. `indexing`: gathering tokens. `attention`,
`rollout`: scores from queries and keys. `decoder_layers`: windows and shared keys. `verification`: whether a plan took
effect.
"""
