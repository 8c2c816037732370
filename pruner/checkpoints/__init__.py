"""Model folders: made, read, written, described."""
