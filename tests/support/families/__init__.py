"""One module per family: a tiny random model and the official processor with a tiny tokenizer."""
