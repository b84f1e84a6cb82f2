"""Softmax attention over chosen blocks of keys."""
