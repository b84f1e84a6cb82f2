"""Attention of every query to keys of its own."""
