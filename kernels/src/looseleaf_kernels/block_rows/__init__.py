"""Whole blocks of rows taken out of a sequence, and added back into one."""
