"""The HTTP server: chat completions of one model, with pruned prompts."""
