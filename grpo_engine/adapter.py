"""An adapter's layers (peft's LoRA), switched off for a while, or for a while made part of the weights."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch.nn import functional

MERGED_BYTES = 2**26
"""Most bytes of weights that are copied with the adapter added to them."""


@contextmanager
def switched_off(layers: Sequence[Any]) -> Iterator[None]:
    """Inside, ``layers`` compute what they did before they had an adapter.

    As peft's ``disable_adapter``, which also examines every module of the model, at each call.
    """
    for layer in layers:
        layer.enable_adapters(False)
    try:
        yield
    finally:
        for layer in layers:
            layer.enable_adapters(True)


@contextmanager
def merged(layers: Sequence[Any]) -> Iterator[None]:
    """Inside, the adapter is part of the weights, where that is exact up to rounding and a small model gains by it.

    Decoding token by token, a small model spends most of its time on calls, and half of them are the adapter's. A
    large one gains nothing that its copy would be worth, and half precision would round the adapter away.

    Args:
        layers: PEFT's, around ``torch.nn.Linear``; those that are switched off stay so.
    """
    on = [layer for layer in layers if not layer.disable_adapters]
    inner = [layer.get_base_layer() for layer in on]
    small = sum(linear.weight.nbytes for linear in inner) <= MERGED_BYTES
    if not small or any(linear.weight.dtype != torch.float32 for linear in inner):
        yield
        return
    try:
        for layer, linear in zip(on, inner, strict=True):
            (adapter,) = layer.active_adapters
            weight = linear.weight + layer.get_delta_weight(adapter)
            layer.forward = partial(functional.linear, weight=weight, bias=linear.bias)
        yield
    finally:
        for layer in on:
            vars(layer).pop("forward", None)
