"""A GRPO engine for prompt-rewriting vision-language policies."""
