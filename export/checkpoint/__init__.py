"""Open checkpoints: recognise the layout of their files, and read their weights one tensor at a time."""
