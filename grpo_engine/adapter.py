"""An adapter's layers (peft's LoRA), switched off for a while, or for a while made part of the weights."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

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
    """
    on = [layer for layer in layers if not layer.disable_adapters]
    weights: list[Tensor] = [layer.get_base_layer().weight for layer in on]
    small = sum(weight.nbytes for weight in weights) <= MERGED_BYTES
    if not small or any(weight.dtype != torch.float32 for weight in weights):
        yield
        return
    before = [weight.data for weight in weights]  # kept, not computed back: they must stay the same bits
    for layer, weight in zip(on, weights, strict=True):
        (adapter,) = layer.active_adapters
        weight.data = weight.data + layer.get_delta_weight(adapter)
        layer.merged_adapters.append(adapter)
    try:
        yield
    finally:
        for layer, weight, data in zip(on, weights, before, strict=True):
            weight.data = data
            layer.merged_adapters.clear()
