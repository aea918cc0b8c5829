"""The key-value cache with room, against the one that transformers grows."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import DynamicCache
from transformers.cache_utils import DynamicSlidingWindowLayer

from grpo_engine.kv_cache import RoomyLayer, repeat_with_room
from grpo_engine.seeding import normals

HEADS, SIZE = 2, 3


def filled(prompts: int, length: int) -> DynamicCache:
    cache = DynamicCache()
    for index in range(2):
        cache.update(*normals(index, (2, prompts, HEADS, length, SIZE)), index)
    return cache


@settings(max_examples=60, deadline=None)
@given(
    prompts=st.integers(1, 3),
    repeats=st.integers(1, 4),
    length=st.integers(1, 5),
    picks=st.lists(st.integers(0, 10_000) | st.none(), max_size=6),
)
def test_it_holds_what_a_growing_cache_holds(prompts: int, repeats: int, length: int, picks: list[int | None]) -> None:
    roomy, growing = filled(prompts, length), filled(prompts, length)
    repeat_with_room(roomy, repeats, length + len(picks))
    growing.batch_repeat_interleave(repeats)
    assert all(type(layer) is RoomyLayer for layer in roomy.layers)
    rows = prompts * repeats
    for step, pick in enumerate(picks):
        if pick is not None:  # some rows leave, in any order
            chosen = torch.randperm(rows, generator=torch.Generator().manual_seed(pick))[: 1 + pick % rows]
            for cache in (roomy, growing):
                cache.batch_select_indices(chosen)
            rows = len(chosen)
        for index in range(2):
            keys, values = normals(100 + step, (2, rows, HEADS, 1, SIZE))
            for one, other in zip(roomy.update(keys, values, index), growing.update(keys, values, index), strict=True):
                assert torch.equal(one, other)
        assert roomy.get_seq_length() == growing.get_seq_length()
        assert roomy.get_mask_sizes(1, 0) == growing.get_mask_sizes(1, 0)


def test_nothing_is_copied_when_a_token_is_added() -> None:
    cache = filled(2, 4)
    repeat_with_room(cache, 3, 9)
    before = cache.layers[0].keys
    assert before is not None
    after, _ = cache.update(*normals(7, (2, 6, HEADS, 1, SIZE)), 0)
    assert after.untyped_storage().data_ptr() == before.untyped_storage().data_ptr()


def test_layers_of_another_kind_only_become_more_rows() -> None:
    cache = filled(2, 4)
    windowed = DynamicSlidingWindowLayer(sliding_window=3)
    windowed.update(*normals(0, (2, 2, HEADS, 4, SIZE)))
    cache.layers[1] = windowed
    repeat_with_room(cache, 3, 9)
    assert type(cache.layers[0]) is RoomyLayer and cache.layers[1] is windowed
    assert windowed.keys is not None and windowed.keys.shape[0] == 6
