"""What a pruned model still knows: perplexity, lm-eval's tasks and our own."""
