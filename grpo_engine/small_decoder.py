"""Token after token through a small policy, in few calls.

Decoding one token a row, a small model spends most of its time on calls and little on arithmetic. So of one whose
text side is known (Qwen2-VL and Qwen2.5-VL share it) the weights are copied for the time of a sampling: each adapter
added to its layer, the projections of one input side by side in one matrix. The result is the model's own up to
rounding. A large model gains nothing that its copy would be worth, and half precision would round the adapter away.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from .adapter import present_weight
from .kv_cache import RoomyLayer
from .policy_family import language_model, position_rows, shaped

FAMILIES = ("qwen2_vl", "qwen2_5_vl")
COPIED_BYTES = 2**26
"""Most bytes of weights that are copied."""


@dataclass(frozen=True)
class _Layer:
    """The weights of one decoder layer: D hidden, H query and K key heads of d, F inner."""

    before_attention: Tensor  # (D,)
    qkv: Tensor  # ((H + 2 K) d, D)
    bias: Tensor  # ((H + 2 K) d,)
    output: Tensor  # (D, H d)
    before_mlp: Tensor  # (D,)
    gate_up: Tensor  # (2 F, D)
    down: Tensor  # (D, F)


def suits(model: Any) -> bool:
    """Whether ``model``, whose attention is plain (``shared_prefix.prepare``), is small and of a known kind."""
    text: Any = language_model(model)
    if model.config.model_type not in FAMILIES or getattr(text.config, "hidden_act", None) != "silu":
        return False
    matrices = [weight for weight in text.layers.parameters() if weight.ndim == 2]  # the adapter's are a few of them
    return all(m.dtype == torch.float32 for m in matrices) and sum(m.nbytes for m in matrices) <= COPIED_BYTES


class SmallDecoder:
    """The present text side of ``model``, its adapter included if that is on, for one sampling.

    Args:
        model: a transformers model that :func:`suits`.
        layers: its cache, of the prompts of R rows, with room for T tokens more.
        positions: int64 (R, T), of the tokens to come.
    """

    def __init__(self, model: Any, layers: Sequence[RoomyLayer], positions: Tensor) -> None:
        text: Any = language_model(model)
        config = text.config
        self._embed, self._norm, self._eps = text.embed_tokens, text.norm.weight, config.rms_norm_eps
        self._heads, self._kv_heads = config.num_attention_heads, config.num_key_value_heads
        self._cache = layers
        self._layers = [_copied(layer) for layer in text.layers]
        self._width = config.hidden_size // config.num_attention_heads
        like = self._norm.new_empty(1)
        cos, sin = text.rotary_emb(like, shaped(positions, position_rows(model)))
        half = self._width // 2
        self._cos, self._sin = cos, torch.cat([-sin[..., :half], sin[..., half:]], dim=-1)  # (R, T, d)

    def __call__(self, tokens: Tensor, rows: Tensor, step: int, added: Tensor) -> Tensor:
        """The last hidden states (N, D) of ``tokens`` (N,), the ``step``-th of each row from 0.

        Args:
            rows: int64 (N,), which of the R rows the cache still holds.
            added: to the scores of all keys so far, these included, (N, 1, 1, L).
        """
        states = self._embed(tokens)
        cos, sin = (table[rows, step].unsqueeze(1) for table in (self._cos, self._sin))  # (N, 1, d)
        count, heads, rotating = len(tokens), self._heads, self._heads + self._kv_heads
        for layer, cache in zip(self._layers, self._cache, strict=True):
            inputs = self._normed(states, layer.before_attention)
            mixed = functional.linear(inputs, layer.qkv, layer.bias).view(count, -1, self._width)
            turned = mixed[:, :rotating]
            turned = turned * cos + turned.roll(self._width // 2, -1) * sin
            keys, values = cache.update(turned[:, heads:].unsqueeze(2), mixed[:, rotating:].unsqueeze(2))
            if heads != self._kv_heads:
                keys, values = (t.repeat_interleave(heads // self._kv_heads, dim=1) for t in (keys, values))
            seen = functional.scaled_dot_product_attention(turned[:, :heads].unsqueeze(2), keys, values, added)
            states = torch.addmm(states, seen.reshape(count, -1), layer.output.t())
            gate, up = functional.linear(self._normed(states, layer.before_mlp), layer.gate_up).chunk(2, dim=-1)
            states = torch.addmm(states, functional.silu(gate) * up, layer.down.t())
        return self._normed(states, self._norm)

    def _normed(self, states: Tensor, weight: Tensor) -> Tensor:
        return functional.rms_norm(states, weight.shape, weight, self._eps)


def _copied(layer: Any) -> _Layer:
    attention, mlp = layer.self_attn, layer.mlp
    mixing = attention.q_proj, attention.k_proj, attention.v_proj
    return _Layer(
        before_attention=layer.input_layernorm.weight,
        qkv=torch.cat([present_weight(projection) for projection in mixing]),
        bias=torch.cat([projection.bias for projection in mixing]),
        output=present_weight(attention.o_proj),
        before_mlp=layer.post_attention_layernorm.weight,
        gate_up=torch.cat([present_weight(projection) for projection in (mlp.gate_proj, mlp.up_proj)]),
        down=present_weight(mlp.down_proj),
    )
