"""Attention that evicts, its cache, and the hooks that put both into a model."""
