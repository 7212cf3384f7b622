"""Decoding that is the same for every engine: stop texts and streams of text."""
