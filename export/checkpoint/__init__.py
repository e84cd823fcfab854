"""The files that people have: their layouts, and their weights, read one tensor at a time."""
