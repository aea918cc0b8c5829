"""A prompt and its whole group of completions as one sequence: the prompt goes through the model once.

The sequence is the prompt's P tokens, then every completion's own tokens one after the other, without padding.
Each completion token attends to the prompt and to its own completion up to itself, and stands at the position it
would have in a sequence of its own. Everything but attention works on tokens one by one, so this gives exactly the
hidden states of G separate sequences; and as it needs no key-value cache, gradient checkpointing works with it.
"""

from __future__ import annotations

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
    """Where in the one sequence a group's tokens stand.

    Attributes:
        prompt: P, tokens of the prompt.
        rows: G completions.
        width: T, tokens of the longest completion.
        places: int64 (N,), of each completion token in the order of the sequence: ``row * T + place in its row``.
        mask: bool (1, 1, T, P + T), which of the prompt's keys and of its own completion's a token sees.
    """

    prompt: int
    rows: int
    width: int
    places: Tensor
    mask: Tensor

    def apart(self, tokens: Tensor) -> Tensor:
        """Completion tokens (..., N, D) as rows (..., G * T, D), zeros where a completion has no more tokens."""
        spread: Tensor = _Spread.apply(tokens, self.places, self.rows * self.width)
        return spread


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
    """transformers' SDPA attention; with ``shared_prefix`` that of a prompt and its group.

    Args:
        query: (1, H, P + N, d) after rotary embedding; ``key`` and ``value`` alike, maybe with fewer heads.
        attention_mask: the model's own, which knows nothing of the layout and is not used with one.

    Returns:
        (1, P + N, H, d), and None in the place of the weights.
    """
    if shared_prefix is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **options)
    layout, end = shared_prefix, shared_prefix.prompt

    def rows(tokens: Tensor) -> Tensor:
        """(1, H, P + N, d) -> (G, H, T, d)."""
        return layout.apart(tokens[0, :, end:]).unflatten(1, (layout.rows, layout.width)).transpose(0, 1)

    def seen(tokens: Tensor) -> Tensor:
        """(1, H, P + N, d) -> (G, H, P + T, d): the prompt's before every row's own."""
        return torch.cat([tokens[:, :, :end].expand(layout.rows, -1, -1, -1), rows(tokens)], dim=2)

    # Copies: what the backward pass keeps of the prompt would otherwise hold the whole sequence beside the rows.
    first, keys, values = (tokens[:, :, :end].contiguous() for tokens in (query, key, value))
    of_prompt, _ = sdpa_attention_forward(module, first, keys, values, None, **options)
    if not len(layout.places):
        return of_prompt, None
    of_rows, _ = sdpa_attention_forward(module, rows(query), seen(key), seen(value), layout.mask, **options)
    together = of_rows.flatten(0, 1).index_select(0, layout.places)
    return torch.cat([of_prompt, together.unsqueeze(0)], dim=1), None


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
        packed = hidden_states(model, prompt, tokens, mask)
        apart = model.model(
            input_ids=sequences, position_ids=shaped(positions, position_rows(model)), use_cache=False
        ).last_hidden_state[:, 2:-1]
    except (TypeError, ValueError, AttributeError, RuntimeError, IndexError):
        return False
    return float((packed - apart)[mask].norm()) <= PROBE_TOLERANCE * float(apart[mask].norm())


def hidden_states(model: Any, prompt_ids: Tensor, tokens: Tensor, mask: Tensor) -> Tensor:
    """Hidden states (G, T, D) that predict each of ``tokens`` (G, T); anything on padding.

    P + the sum over completions of (their tokens - 1) go through ``model``: nothing follows a last token.

    Args:
        model: a transformers model, :func:`prepare`d.
        prompt_ids: int64 (P,).
        mask: bool (G, T), true on the first tokens of each row, at least one.
    """
    rows, width = tokens.shape
    length, follows = len(prompt_ids), mask[:, 1:]
    positions = torch.arange(length + width - 1, device=tokens.device)
    layout = Layout(
        prompt=length,
        rows=rows,
        width=width - 1,
        places=follows.flatten().nonzero().squeeze(1),
        mask=torch.ones(1, 1, width - 1, length + width - 1, dtype=torch.bool, device=tokens.device).tril(length),
    )
    where = torch.cat([positions[:length], positions[length:].expand(rows, -1)[follows]])
    output = model.model(
        input_ids=torch.cat([prompt_ids.to(tokens), tokens[:, :-1][follows]]).unsqueeze(0),
        attention_mask=torch.ones(1, len(where), dtype=torch.long, device=tokens.device),  # else positions that begin
        position_ids=shaped(where.unsqueeze(0), position_rows(model)),  # anew would be taken for several sequences
        use_cache=False,
        shared_prefix=layout,
    )
    hidden = output.last_hidden_state[0]
    first = hidden[length - 1].expand(rows, 1, -1)  # the prompt's last predicts every completion's first
    return torch.cat([first, layout.apart(hidden[length:]).unflatten(0, (rows, width - 1))], dim=1)
