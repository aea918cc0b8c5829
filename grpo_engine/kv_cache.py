"""A key-value cache with room for all tokens that may come: a token is written to its place, nothing is copied.

The cache that transformers grows copies every layer's keys and values at every token, which for a small model is a
sixth of its decoding, and for a large one holds a layer twice.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import DynamicLayer


class RoomyLayer(DynamicLayer):
    """One layer's keys and values, float (rows, H, L, d) each, as views of tensors with more room along L.

    Args:
        keys: (P, H, L, d), of the tokens read so far.
        values: alike.
        repeats: how many rows each of the P becomes, side by side.
        room: tokens there is room for.
    """

    def __init__(self, keys: Tensor, values: Tensor, repeats: int, room: int) -> None:
        super().__init__()
        self.lazy_initialization(keys, values)
        self._all = [_with_room(tensor, repeats, room) for tensor in (keys, values)]
        self._show(keys.shape[2])

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """Write the tokens to come, (rows, H, new, d) each; returns all keys and all values so far."""
        begin = self.get_seq_length()
        end = begin + key_states.shape[2]
        for tensor, states in zip(self._all, (key_states, value_states), strict=True):
            tensor[:, :, begin:end] = states
        return self._show(end)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Only keep the rows ``indices``."""
        self._all = [tensor.index_select(0, indices) for tensor in self._all]
        self._show(self.get_seq_length())

    def _show(self, end: int) -> tuple[Tensor, Tensor]:
        self.keys, self.values = (tensor[:, :, :end] for tensor in self._all)
        return self.keys, self.values


def _with_room(tensor: Tensor, repeats: int, room: int) -> Tensor:
    prompts, heads, length, size = tensor.shape
    roomy = tensor.new_zeros(prompts, repeats, heads, room, size)
    roomy[:, :, :, :length] = tensor.unsqueeze(1)
    return roomy.flatten(0, 1)


@torch.no_grad()
def repeat_with_room(cache: Any, repeats: int, room: int) -> None:
    """Repeat each row of a transformers ``DynamicCache`` ``repeats`` times, with room for ``room`` tokens a row.

    Layers of another kind (with a window, or recurrent) only become more rows; they grow as transformers has them.
    """
    for index, layer in enumerate(cache.layers):
        if type(layer) is DynamicLayer and layer.keys is not None and layer.values is not None:
            cache.layers[index] = RoomyLayer(layer.keys, layer.values, repeats, room)
        else:
            layer.batch_repeat_interleave(repeats)
