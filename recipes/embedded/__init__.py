"""The embedded checkpoint: its script, its text samples, the weights."""
