"""Softmax probability of each block of the attention map."""
