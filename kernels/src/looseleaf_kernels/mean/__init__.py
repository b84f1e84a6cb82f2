"""Means over blocks of rows."""
