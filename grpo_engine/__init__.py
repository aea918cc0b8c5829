"""A GRPO engine for prompt-rewriting vision-language policies."""

from .heap import prepare as _prepare_heap

_prepare_heap()  # here, as it must come before PyTorch's first tensor in whatever process this is
