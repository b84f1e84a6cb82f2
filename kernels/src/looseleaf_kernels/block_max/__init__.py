"""The largest score of each block of the attention map, heads added up."""
