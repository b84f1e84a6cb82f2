"""Causal softmax attention over chosen blocks of keys and single key columns."""
