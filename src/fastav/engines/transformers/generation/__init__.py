"""Decoding in place of transformers' own loop: the loop, its buffers, CUDA graphs, and the choice of tokens."""
