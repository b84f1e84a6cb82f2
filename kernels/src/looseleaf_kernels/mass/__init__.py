"""The smallest set of largest scores that reaches a fraction of their sum."""
