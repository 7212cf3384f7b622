"""One module per family: a tiny random model of it, and its official processor with a tiny tokenizer."""
