"""What developers measure, from the root of a checkout: rollout, batches, preparing clips, and vLLM under load."""
