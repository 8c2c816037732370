"""Measuring a pruned model: perplexity, lm-eval's tasks, and the tables and plots of both."""
