"""The plugin inside vLLM's processes.

`register` hooks into configurations and requests, in every process. `worker` and `scheduler` are the classes that a
pruning engine runs with; the other modules serve these. Host arithmetic stands in modules that need no vLLM:
`request_state`, `packed_batch`, `kv_groups`, `step_check`.
"""
