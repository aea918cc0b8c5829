"""A group of rollouts as rows of table ``rollouts``."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from .rows import number, to_json

if TYPE_CHECKING:
    from torch import Tensor

    from ..rollout import Group

TokenText = Callable[[Sequence[int]], Sequence[str]]
"""Of token ids: the text of each, for showing tokens one by one."""


def rollout_rows(
    g: int, group: Group, *, tokens: bool = True, token_text: TokenText | None = None
) -> list[dict[str, Any]]:
    """The step's group number ``g`` as rows, without run, step and pictures. Shares no memory with the group.

    Without ``tokens`` the per-token columns are NULL; without ``token_text`` the tokens' texts are.
    """
    done = group.completions
    mask = _array(done.mask).astype(bool)
    per_token = {
        "token_ids": _array(done.token_ids).astype("<i4"),
        "logprobs": _array(done.logprobs).astype("<f4"),
        "entropies": _array(done.entropies).astype("<f4"),
    }
    if group.kl is not None:
        per_token["token_kl"] = _array(group.kl).astype("<f4")
    if group.shift is not None:
        per_token["shift"] = _array(group.shift).astype("<f4")
    finished, rewards, advantages = _array(done.finished), _array(group.rewards), _array(group.advantages)
    rows = []
    for k, completion in enumerate(done.texts):
        real = {name: values[k][mask[k]] for name, values in per_token.items()}
        kl = real.get("token_kl")
        row: dict[str, Any] = {
            "g": g,
            "k": k,
            "prompt_id": group.prompt.id,
            "prompt": group.prompt.text,
            "tier": group.prompt.tier,
            "completion": completion,
            "rewrite": group.rewrites[k],
            "finished": int(finished[k]),
            "reward": number(rewards[k]) if k < len(rewards) else None,
            "advantage": number(advantages[k]) if k < len(advantages) else None,
            "kl": number(kl.mean(dtype=np.float64)) if kl is not None and kl.size else None,
            "parts": to_json(group.scores[k].parts if k < len(group.scores) else {}),
            "latent_seed": str(group.latent_seed),
            "tokens": to_json(token_text(real["token_ids"].tolist())) if tokens and token_text else None,
        }
        for name in ("token_ids", "logprobs", "entropies", "token_kl", "shift"):
            row[name] = real[name].tobytes() if tokens and name in real else None
        rows.append(row)
    return rows


def _array(tensor: Tensor) -> NDArray[Any]:
    """The numbers in memory, floats as float32."""
    tensor = tensor.detach()
    return np.asarray((tensor.float() if tensor.is_floating_point() else tensor).cpu().numpy())
