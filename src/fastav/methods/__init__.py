"""Published ways to score tokens, one file each."""
