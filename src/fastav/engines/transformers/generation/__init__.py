"""Decoding in place of transformers' own loop: the loop, its buffers, CUDA graphs, and token sampling."""
