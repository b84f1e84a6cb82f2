"""Where the last queries look, by key and by distance."""
