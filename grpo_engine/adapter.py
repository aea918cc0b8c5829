"""An adapter's layers (peft's LoRA), switched off for a while, or added to the weights that they belong to."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor


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


def present_weight(layer: Any) -> Tensor:
    """The weight (out, in) of a linear layer as it computes now, with its adapter added if that is on."""
    tuned = isinstance(layer, BaseTunerLayer)
    base: Any = layer.get_base_layer() if tuned else layer
    weight: Tensor = base.weight
    if not tuned or layer.disable_adapters:
        return weight
    (adapter,) = layer.active_adapters
    return weight + layer.get_delta_weight(adapter)
