"""What is removed from a model: targets, selection rules and masks."""
