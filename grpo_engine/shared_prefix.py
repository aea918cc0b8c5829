"""Prompts and their whole groups of completions as one sequence: each prompt goes through the model once.

The sequence is the tokens of all prompts, then every completion's own tokens one after the other, without padding.
Each completion token attends to its prompt and to its own completion up to itself, and stands at the position it
would have in a sequence of its own. Everything but attention works on tokens one by one, so this gives exactly the
hidden states of separate sequences; and as it needs no key-value cache, gradient checkpointing works with it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

from .policy_family import PROBE_TOLERANCE, TESTED, language_model, position_rows, shaped

NAME = "sdpa_shared_prefix"
"""Under this name transformers' models find :func:`attention`."""


@dataclass(frozen=True)
class Layout:
    """Where in the one sequence the tokens of n groups stand.

    Attributes:
        end: tokens of all prompts together: where the completions begin.
        groups: n.
        longest: P, tokens of the longest prompt.
        heads: int64 (end,), of each prompt token in the order of the sequence: ``group * P + place in its prompt``.
        rows: R completions of all groups.
        width: T, tokens of the longest completion.
        places: int64 (N,), of each completion token in the order of the sequence: ``row * T + place in its row``.
        owners: int64 (R,), the group of each row.
        mask: float (R or 1, 1, T, P + T), added to the scores: 0 for what a token sees of its prompt's keys and of
            its own completion's, -inf for the others.
    """

    end: int
    groups: int
    longest: int
    heads: Tensor
    rows: int
    width: int
    places: Tensor
    owners: Tensor
    mask: Tensor

    def prompts(self, tokens: Tensor) -> Tensor:
        """The prompts' tokens of (1, H, end + N, d) as (n, H, P, d), zeros where a prompt has no more tokens."""
        own = tokens[:, :, : self.end]
        if self.groups == 1:  # a copy: what the backward pass keeps of it would otherwise hold the whole sequence
            return own.contiguous()
        spread: Tensor = _Spread.apply(own[0], self.heads, self.groups * self.longest)
        return spread.unflatten(1, (self.groups, self.longest)).transpose(0, 1)

    def completions(self, tokens: Tensor) -> Tensor:
        """Those of the completions as (R, H, T, d)."""
        return self.apart(tokens[0, :, self.end :]).unflatten(1, (self.rows, self.width)).transpose(0, 1)

    def apart(self, tokens: Tensor) -> Tensor:
        """Completion tokens (..., N, D) as rows (..., R * T, D), zeros where a completion has no more tokens."""
        spread: Tensor = _Spread.apply(tokens, self.places, self.rows * self.width)
        return spread

    def seen(self, prompts: Tensor, completions: Tensor) -> Tensor:
        """Each row's prompt (n, H, P, d) before its own tokens (R, H, T, d): (R, H, P + T, d)."""
        if self.groups == 1:
            before = prompts.expand(self.rows, -1, -1, -1)
        else:
            before = prompts.index_select(0, self.owners)
        return torch.cat([before, completions], dim=2)


class _Spread(torch.autograd.Function):
    """``index_copy`` into zeros along the last but one dimension; torch's own keeps its source for nothing."""

    @staticmethod
    def forward(context: Any, tokens: Tensor, places: Tensor, size: int) -> Tensor:
        context.save_for_backward(places)
        return tokens.new_zeros(*tokens.shape[:-2], size, tokens.shape[-1]).index_copy_(-2, places, tokens)

    @staticmethod
    def backward(context: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        (places,) = context.saved_tensors
        return gradients[0].index_select(-2, places), None, None


def attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    shared_prefix: Layout | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """transformers' SDPA attention; with ``shared_prefix`` that of prompts and their groups.

    Args:
        query: (1, H, end + N, d) after rotary embedding; ``key`` and ``value`` alike, maybe with fewer heads.
        attention_mask: the model's own, which knows nothing of the layout and is not used with one.

    Returns:
        (1, end + N, H, d), and None in the place of the weights.
    """
    if shared_prefix is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **options)
    layout = shared_prefix
    first, keys, values = (layout.prompts(tokens) for tokens in (query, key, value))
    of_prompts, _ = sdpa_attention_forward(module, first, keys, values, None, **options)
    together = of_prompts.flatten(0, 1)
    if layout.groups > 1:
        together = together.index_select(0, layout.heads)
    if len(layout.places):
        rows = (layout.completions(tokens) for tokens in (query, key, value))
        own, own_keys, own_values = rows
        every_key, every_value = layout.seen(keys, own_keys), layout.seen(values, own_values)
        of_rows, _ = sdpa_attention_forward(module, own, every_key, every_value, layout.mask, **options)
        together = torch.cat([together, of_rows.flatten(0, 1).index_select(0, layout.places)])
    return together.unsqueeze(0), None


AttentionInterface.register(NAME, attention)
AttentionMaskInterface.register(NAME, sdpa_mask)


def prepare(model: Any, suppressed: Tensor) -> bool:
    """Let ``model`` take a layout; false if its text side attends in another way, and then it is left as it was.

    It must attend by SDPA in every layer, each token to all before it: no windows, no recurrent layers, no capped
    scores. Of families that are not tested it is tried out. Without a layout the model computes what it did before.

    Args:
        model: from ``transformers``, with its head.
        suppressed: bool (V,), tokens that may mean something else than text.
    """
    config: Any = language_model(model).config
    kinds = set(getattr(config, "layer_types", None) or ["full_attention"])
    capped = getattr(config, "attn_logit_softcapping", None)
    if config._attn_implementation not in ("sdpa", NAME) or kinds != {"full_attention"} or capped:
        return False
    before, config._attn_implementation = config._attn_implementation, NAME
    if model.config.model_type in TESTED or _agrees(model, suppressed):
        return True
    config._attn_implementation = before
    return False


@torch.no_grad()
def _agrees(model: Any, suppressed: Tensor) -> bool:
    """Whether a small group behind one prompt has the hidden states of sequences of their own."""
    ids = (~suppressed).nonzero().squeeze(1)[:7]
    prompt, tokens = ids[:3], torch.stack([ids[[3, 4, 5]], ids[[4, 6, 6]]])
    mask = torch.tensor([[True, True, True], [True, True, False]], device=tokens.device)
    sequences = torch.cat([prompt.expand(2, -1), tokens], dim=1)
    positions = torch.arange(6, device=tokens.device).expand(2, -1)
    try:
        packed = hidden_states(model, [prompt], [2], tokens, mask)
        apart = model.model(
            input_ids=sequences, position_ids=shaped(positions, position_rows(model)), use_cache=False
        ).last_hidden_state[:, 2:-1]
    except (TypeError, ValueError, AttributeError, RuntimeError, IndexError):
        return False
    return float((packed - apart)[mask].norm()) <= PROBE_TOLERANCE * float(apart[mask].norm())


def hidden_states(model: Any, prompts: Sequence[Tensor], sizes: Sequence[int], tokens: Tensor, mask: Tensor) -> Tensor:
    """Hidden states (R, T, D) that predict each of ``tokens`` (R, T); anything on padding.

    The prompts' tokens + the sum over completions of (their tokens - 1) go through ``model``: nothing follows a last
    token.

    Args:
        model: a transformers model, :func:`prepare`d.
        prompts: int64 (P,) each, one of every group.
        sizes: completions of every group; R together.
        tokens: the completions of the groups, one group after the other.
        mask: bool (R, T), true on the first tokens of each row, at least one.
    """
    (rows, width), device, follows = tokens.shape, tokens.device, mask[:, 1:]
    lengths = torch.tensor([len(prompt) for prompt in prompts], device=device)
    owners = torch.arange(len(prompts), device=device).repeat_interleave(torch.tensor(sizes, device=device))
    longest = int(lengths.max())
    place = torch.arange(longest, device=device).expand(len(prompts), -1)
    real = place < lengths.unsqueeze(1)
    of_rows = lengths[owners].unsqueeze(1) + torch.arange(width - 1, device=device)  # positions, (R, T)
    where = torch.cat([place[real], of_rows[follows]])
    layout = Layout(
        end=int(lengths.sum()),
        groups=len(prompts),
        longest=longest,
        heads=real.flatten().nonzero().squeeze(1),
        rows=rows,
        width=width - 1,
        places=follows.flatten().nonzero().squeeze(1),
        owners=owners,
        mask=_visible(real if len(prompts) == 1 else real[owners], width - 1, model.dtype),
    )
    output = model.model(
        input_ids=torch.cat([*(prompt.to(tokens) for prompt in prompts), tokens[:, :-1][follows]]).unsqueeze(0),
        attention_mask=torch.ones(1, len(where), dtype=torch.long, device=device),  # else positions that begin anew
        position_ids=shaped(where.unsqueeze(0), position_rows(model)),  # would be taken for several sequences
        use_cache=False,
        shared_prefix=layout,
    )
    hidden = output.last_hidden_state[0]
    last = lengths.cumsum(0) - 1  # a prompt's last token predicts the first of each of its completions
    first = hidden.index_select(0, last[owners]).unsqueeze(1)
    return torch.cat([first, layout.apart(hidden[layout.end :]).unflatten(0, (rows, width - 1))], dim=1)


def _visible(real: Tensor, width: int, dtype: torch.dtype) -> Tensor:
    """:attr:`Layout.mask` for prompts whose tokens are ``real``, bool (R or 1, P), and ``width`` completion tokens."""
    own = torch.ones(width, width, dtype=torch.bool, device=real.device).tril()
    before = real.unsqueeze(1).expand(-1, width, -1)
    seen = torch.cat([before, own.expand(len(real), -1, -1)], dim=2).unsqueeze(1)
    return added(seen, dtype)


def added(seen: Tensor, dtype: torch.dtype) -> Tensor:
    """What is added to the scores of keys: 0 where ``seen``, bool of any shape, else -inf."""
    return torch.zeros(seen.shape, dtype=dtype, device=seen.device).masked_fill_(~seen, -torch.inf)
