"""Published methods to score tokens, one per file."""
