"""Moved to :mod:`looseleaf_lab.attention`."""

from looseleaf_lab.attention import BlockWindow as BlockWindow
