"""The policy: a vision-language model that rewrites prompts, with its adapter on or off.

With the adapter off it is the reference policy of the KL penalty and, asked about a picture, the judge.
There is no second copy of the weights unless all of them are trained.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from peft import LoraConfig as PeftLoraConfig
from peft import PeftModel, get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from . import shared_prefix
from .adapter import switched_off
from .config import PolicyModelConfig, SamplingConfig
from .distributed import Ranks
from .kv_cache import RoomyLayer, repeat_with_room
from .policy_family import (
    TESTED,
    adapter_layers,
    end_tokens,
    forget_pictures,
    language_model,
    position_rows,
    shaped,
    suppressed_tokens,
)
from .rollout import Completions, Picture, stacked
from .sampler import Entropies, chunked_logprobs, draw, entropy_of, pad_kept, truncate, whole_logprobs
from .seeding import seeded_initialization, uniforms
from .sharding import share_out
from .small_decoder import SmallDecoder, suits
from .turns import SharedTurns, Turn, Turns

Poll = Callable[[], None]
"""Called often during long work; raises to stop it."""


DROP_SHARE = 0.75  # completions that have ended leave the batch once no more than this share of it still runs


def no_poll() -> None:
    """Never stops anything."""


class PureGRPOPolicy:
    """A causal vision-language model from ``transformers`` as a GRPO policy.

    Args:
        model: a model such as ``Qwen2VLForConditionalGeneration``, on its device.
        processor: its processor (tokenizer, image processor, chat template).
        config: adapter and template settings.
        sampling: temperature and truncation; also those of the log-probabilities.
        seed: of the adapter's initial weights.
        path: where the model came from, as the user wrote it.
    """

    def __init__(
        self,
        model: Any,
        processor: Any,
        config: PolicyModelConfig,
        sampling: SamplingConfig,
        *,
        seed: int,
        path: str,
    ) -> None:
        self.processor, self.config, self.sampling = processor, config, sampling
        self.processor_path = path
        self.turns = Turns()
        self.tokenizer = getattr(processor, "tokenizer", processor)
        self.device: torch.device = next(model.parameters()).device
        self.end_tokens = end_tokens(model, self.tokenizer)
        self.suppressed = suppressed_tokens(model, self.tokenizer, self.end_tokens).to(self.device)
        self._rows = position_rows(model)
        self._full_reference: nn.Module | None = None
        self.shares_prefix = shared_prefix.prepare(model, self.suppressed)
        model.requires_grad_(False)
        if config.adapter == "lora":
            self.adapted_layers = adapter_layers(model, config.lora.targets)
            alpha: Any = config.lora.alpha  # PEFT is annotated int, but scales by alpha / rank for any number
            with seeded_initialization(seed):
                self.model: Any = get_peft_model(
                    model,
                    PeftLoraConfig(
                        r=config.lora.rank,
                        lora_alpha=int(alpha) if alpha.is_integer() else alpha,
                        lora_dropout=config.lora.dropout,
                        target_modules=self.adapted_layers,
                        task_type="CAUSAL_LM",
                        base_model_name_or_path=path,
                    ),
                )
        else:
            self.adapted_layers = []
            self._full_reference = copy.deepcopy(model).eval()
            language_model(model).requires_grad_(True)
            model.get_output_embeddings().requires_grad_(True)
            self.model = model
        if config.gradient_checkpointing:
            self.model.gradient_checkpointing_enable({"use_reentrant": False})
            self.model.enable_input_require_grads()
        self.model.eval()
        self._small = self.shares_prefix and suits(self._base)
        self._adapters = [module for module in self.model.modules() if isinstance(module, BaseTunerLayer)]
        drops = config.lora.dropout > 0 or getattr(language_model(model).config, "attention_dropout", 0.0) > 0
        self._trains_otherwise = drops or config.gradient_checkpointing or model.config.model_type not in TESTED

    # -- weights -----------------------------------------------------------------------------------------

    def trainable(self) -> dict[str, nn.Parameter]:
        """The parameters that training changes, by stable name."""
        return {name: p for name, p in self.model.named_parameters() if p.requires_grad}

    @contextmanager
    def reference(self) -> Iterator[None]:
        """Inside, this object is the untrained policy."""
        if self._full_reference is not None:
            trained, self.model = self.model, self._full_reference
            try:
                yield
            finally:
                self.model = trained
        else:
            with switched_off(self._adapters):
                yield

    @contextmanager
    def training(self) -> Iterator[None]:
        """Inside, dropout and gradient checkpointing are at work; a policy that has neither is left as it is."""
        if self._trains_otherwise:
            self.model.train()
        try:
            yield
        finally:
            if self._trains_otherwise:
                self.model.eval()

    @property
    def _base(self) -> Any:
        """The transformers model itself; its layers carry the adapter in place."""
        return self.model.get_base_model() if isinstance(self.model, PeftModel) else self.model

    def shard(self, world: Ranks, device: torch.device) -> None:
        """Keep this rank's share of the weights, which are in the host's memory, on ``device``; see ``sharding.py``.

        From now on every rank must use the policy for a pass of any to end, or exchange something through ``world``.
        """
        adapter = set(self.trainable().values()) if self._full_reference is None else set()
        self.turns = share_out(self._base, self._full_reference, adapter, world, device)
        self.device, self.suppressed = device, self.suppressed.to(device)

    def _take_turn(self, *, learn: bool = False) -> None:
        """Wait until the ranks that share the policy make a pass together; it must follow at once."""
        forward = Turn.REFERENCE if self.model is self._full_reference else Turn.FORWARD
        self.turns.take(Turn.LEARN if learn else forward)

    # -- text --------------------------------------------------------------------------------------------

    def prompt_ids(self, prompt: str) -> Tensor:
        """The template and chat markup around ``prompt`` as token ids, int64 (P,).

        Raises:
            ValueError: ``prompt`` holds a special token's text, which would become chat markup.
        """
        for special in self.tokenizer.all_special_tokens:
            if special in prompt:
                raise ValueError(f"The prompt has {special!r}, which is markup of the policy's chat; remove it.")
        return self._chat_ids(self.config.template.replace("{prompt}", prompt))

    def _chat_text(self, content: str | list[dict[str, str]]) -> str:
        parts = content if isinstance(content, list) else [{"type": "text", "text": content}]
        messages: list[dict[str, Any]] = [{"role": "user", "content": parts}]
        if self.config.system:
            system = [{"type": "text", "text": self.config.system}]
            messages.insert(0, {"role": "system", "content": system})
        return self.processor.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)

    def _chat_ids(self, content: str) -> Tensor:
        ids = self.tokenizer(self._chat_text(content), add_special_tokens=False).input_ids
        return torch.tensor(ids, dtype=torch.long)

    # -- sampling ----------------------------------------------------------------------------------------

    @torch.no_grad()
    def sample(
        self,
        prompts: Sequence[str],
        seeds: Sequence[Sequence[int]],
        *,
        greedy: bool = False,
        poll: Poll = no_poll,
    ) -> list[Completions]:
        """Sample completions: one group for each prompt, one completion for each of its seeds.

        Each prompt goes through the model once; its key-value cache is then repeated for its group. Which
        tokens a rollout gets depends on its own seed alone, not on what else is in the batch (up to rounding).
        ``greedy`` takes the likeliest token instead. ``poll`` is called before every token.

        Raises:
            ValueError: if the groups are not equally large, or none are given.
        """
        sizes = {len(group) for group in seeds}
        if len(sizes) != 1 or 0 in sizes or len(seeds) != len(prompts):
            raise ValueError(f"sample needs one equally large group of seeds a prompt, not sizes {sorted(sizes)}.")
        prompt_ids = [self.prompt_ids(prompt) for prompt in prompts]
        randoms = uniforms([seed for group in seeds for seed in group], self.sampling.max_new_tokens).to(self.device)
        return self._decode(prompt_ids, sizes.pop(), randoms, greedy=greedy, poll=poll)

    def _decode(
        self, prompt_ids: Sequence[Tensor], size: int, randoms: Tensor, *, greedy: bool, poll: Poll
    ) -> list[Completions]:
        """Groups of ``size`` completions of each prompt, drawn with ``randoms`` (prompts * size, tokens)."""
        ids, mask, positions = _left_padded(prompt_ids, self._pad_token, self.device)
        positions = shaped(positions, self._rows)
        base, (rows, limit) = self._base, randoms.shape
        poll()
        self._take_turn()
        output = base.model(input_ids=ids, attention_mask=mask, position_ids=positions, use_cache=True)
        hidden, cache = output.last_hidden_state[:, -1], output.past_key_values
        read = mask.shape[1]
        repeat_with_room(cache, size, read + limit)
        hidden = hidden.repeat_interleave(size, dim=0)
        lengths = mask.sum(dim=1).repeat_interleave(size)
        seen = self._seen(mask.repeat_interleave(size, dim=0), limit)
        quick = self._small_decoder(cache, lengths.unsqueeze(1) + torch.arange(limit, device=self.device))
        ends = torch.tensor(self.end_tokens, device=self.device)
        tokens = torch.full((rows, limit), self._pad_token, device=self.device)
        masks = torch.zeros(rows, limit, dtype=torch.bool, device=self.device)
        logprobs, entropies = (torch.zeros(rows, limit, device=self.device) for _ in range(2))
        kept_sets = []
        here = torch.arange(rows, device=self.device)  # the rows that still go through the model
        running = torch.ones(rows, dtype=torch.bool, device=self.device)  # which of those have not ended
        for step in range(limit):
            token, logprob, entropy, kept = self._next_tokens(base.lm_head(hidden), randoms[here, step], greedy)
            own = here[running]
            tokens[own, step], masks[own, step] = token[running], True
            logprobs[own, step], entropies[own, step] = logprob[running], entropy[running]
            if kept is not None:
                every = kept.new_full((rows, kept.shape[1]), -1)
                every[own] = kept[running]
                kept_sets.append(every)
            running = running & ~torch.isin(token, ends)
            left = int(running.sum())
            if left == 0 or step + 1 == limit:
                break
            poll()
            self._take_turn()
            if left <= DROP_SHARE * len(here):
                here, token, seen, lengths = here[running], token[running], seen[running], lengths[running]
                cache.batch_select_indices(running.nonzero().squeeze(1))
                running = running[running]
            so_far = seen[..., : read + step + 1]
            if quick is not None:
                hidden = quick(token, here, step, so_far)
            else:
                output = base.model(
                    input_ids=token.unsqueeze(1),
                    attention_mask=so_far,
                    position_ids=shaped((lengths + step).unsqueeze(1), self._rows),
                    past_key_values=cache,
                    use_cache=True,
                )
                hidden = output.last_hidden_state[:, -1]
        self.turns.take(Turn.SETTLE)  # else the others would wait for this rank's pictures with rewrites half written
        kept_of_all = pad_kept(kept_sets) if kept_sets else None
        groups = []
        for index, prompt in enumerate(prompt_ids):
            group = slice(index * size, (index + 1) * size)
            groups.append(
                self._completions(
                    prompt,
                    tokens[group],
                    masks[group],
                    logprobs[group],
                    entropies[group],
                    None if kept_of_all is None else kept_of_all[group],
                )
            )
        return groups

    def _small_decoder(self, cache: Any, positions: Tensor) -> SmallDecoder | None:
        """For the tokens to come at ``positions`` (R, T) behind ``cache``; None where it would not be this policy's."""
        layers = [layer for layer in cache.layers if isinstance(layer, RoomyLayer)]
        whole = not isinstance(self.turns, SharedTurns) and len(layers) == len(cache.layers)
        return SmallDecoder(self._base, layers, positions) if whole and self._small else None

    def _seen(self, mask: Tensor, limit: int) -> Tensor:
        """What the tokens of rows see, up to ``limit`` tokens after their prompts, of which ``mask`` (R, L) are real.

        A model that is known to attend in the plain way is given the (R, 1, 1, L + limit) that are added to its
        scores, which it would else make anew of the (R, L + limit) at every token.
        """
        whole = torch.nn.functional.pad(mask, (0, limit), value=1)
        if not self.shares_prefix:
            return whole
        return shared_prefix.added(whole.bool(), self._base.dtype)[:, None, None]

    def _next_tokens(
        self, logits: Tensor, uniform: Tensor, greedy: bool
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """Tokens drawn from ``logits`` (N, V): ids, log-probabilities, entropies (N,), and the kept sets (N, K) or
        None when nothing is truncated; those of the sampling distribution, whether drawn from it or the likeliest.
        """
        sampling = self.sampling
        if sampling.top_k == 0 and sampling.top_p == 1.0:
            whole = whole_logprobs(logits, temperature=sampling.temperature, suppressed=self.suppressed)
            token = whole.argmax(dim=-1) if greedy else draw(whole, uniform)
            return token, whole.gather(1, token.unsqueeze(1)).squeeze(1), entropy_of(whole), None
        kept, logprobs = truncate(
            logits,
            temperature=sampling.temperature,
            top_k=sampling.top_k,
            top_p=sampling.top_p,
            suppressed=self.suppressed,
        )
        choice = (torch.zeros_like(kept[:, 0]) if greedy else draw(logprobs, uniform)).unsqueeze(1)
        token, logprob = (values.gather(1, choice).squeeze(1) for values in (kept, logprobs))
        return token, logprob, entropy_of(logprobs), kept

    def _completions(
        self,
        prompt: Tensor,
        tokens: Tensor,
        mask: Tensor,
        logprobs: Tensor,
        entropies: Tensor,
        kept: Tensor | None,
    ) -> Completions:
        """One group, trimmed to its longest completion, on the CPU."""
        width = int(mask.sum(dim=1).max())
        tokens, mask, logprobs, entropies = (t[:, :width].cpu() for t in (tokens, mask, logprobs, entropies))
        if kept is not None:
            kept = kept[:, :width]
            kept = kept[..., : int((kept >= 0).sum(dim=-1).max())].cpu()
        texts = self.tokenizer.batch_decode(
            [row[keep].tolist() for row, keep in zip(tokens, mask, strict=True)], skip_special_tokens=True
        )
        last = tokens.gather(1, (mask.sum(dim=1, keepdim=True) - 1)).squeeze(1)
        finished = torch.isin(last, torch.tensor(self.end_tokens))
        return Completions(prompt, tokens, mask, logprobs, entropies, kept, tuple(texts), finished)

    def token_text(self, token_ids: Sequence[int]) -> list[str]:
        """How each token reads by itself."""
        return [self.tokenizer.decode([token_id]) for token_id in token_ids]

    @property
    def _pad_token(self) -> int:
        return self.tokenizer.pad_token_id if self.tokenizer.pad_token_id is not None else self.end_tokens[0]

    # -- log-probabilities -------------------------------------------------------------------------------

    def token_logprobs(
        self,
        *groups: Completions,
        share_prefix: bool = True,
        logit_chunk: int = 0,
        entropies: Entropies = "learned",
    ) -> tuple[Tensor, Tensor]:
        """Log-probabilities and entropies of sampled tokens under the present weights, with gradient.

        Over the same kept sets that were sampled from. All groups go through the model together; their R rows stand
        one group after the other, padded to the longest (:func:`stacked`). Logits are computed for completion tokens
        only, at most ``logit_chunk`` tokens at a time (0 = all at once). With ``share_prefix`` a prompt goes through
        the model once for its whole group (if the model can, see :func:`shared_prefix.prepare`), else once a row.
        ``entropies`` says what is wanted of those. None of this changes the log-probabilities or their gradient but by
        rounding. Where gradients are enabled the backward pass must be the next that is done with the policy.

        Returns:
            float32 (R, T) and (R, T) on the policy's device, 0 on padding.
        """
        mask = stacked([group.mask for group in groups]).to(self.device)
        tokens = stacked([group.token_ids for group in groups]).to(self.device)
        prompts = [group.prompt_ids.to(self.device) for group in groups]
        sizes = [len(group) for group in groups]
        self._take_turn(learn=torch.is_grad_enabled())
        if share_prefix and self.shares_prefix:
            hidden = shared_prefix.hidden_states(self._base, prompts, sizes, tokens, mask)
        else:
            hidden = self._hidden_plain(prompts, sizes, tokens, mask)
        kept = [group.kept for group in groups if group.kept is not None]
        logprobs, entropy = chunked_logprobs(
            self._base.lm_head,
            hidden[mask],
            tokens[mask],
            stacked(kept, -1).to(self.device)[mask] if kept else None,
            chunk=logit_chunk,
            temperature=self.sampling.temperature,
            suppressed=self.suppressed,
            entropies=entropies,
        )
        zeros = torch.zeros(tokens.shape, device=self.device)
        return zeros.masked_scatter(mask, logprobs), zeros.masked_scatter(mask, entropy)

    def _hidden_plain(self, prompts: Sequence[Tensor], sizes: Sequence[int], tokens: Tensor, mask: Tensor) -> Tensor:
        """Hidden states (R, T, D) that predict each of ``tokens`` (R, T), every row with its own copy of the prompt."""
        rows, width = tokens.shape
        repeats = torch.tensor(sizes, device=self.device)
        heads = pad_sequence(list(prompts), batch_first=True, padding_value=self._pad_token)
        lengths = torch.tensor([len(prompt) for prompt in prompts], device=self.device).repeat_interleave(repeats)
        ids = heads.new_full((rows, heads.shape[1] + width), self._pad_token)
        ids[:, : heads.shape[1]] = heads.repeat_interleave(repeats, dim=0)
        places = lengths.unsqueeze(1) + torch.arange(width, device=self.device)
        ids.scatter_(1, places, tokens)
        positions = torch.arange(ids.shape[1], device=self.device).expand(rows, -1)
        attention = (positions < (lengths + mask.sum(dim=1)).unsqueeze(1)).long()
        output = self._base.model(
            input_ids=ids, attention_mask=attention, position_ids=shaped(positions, self._rows), use_cache=False
        )
        before = (places - 1).unsqueeze(2)  # the hidden state that predicts a token is that of the one before it
        return output.last_hidden_state.take_along_dim(before, dim=1)

    # -- judging -----------------------------------------------------------------------------------------

    @torch.no_grad()
    def probability_of_yes(self, pictures: Sequence[Picture], prompts: Sequence[str]) -> list[float]:
        """P(Yes) / (P(Yes) + P(No)) when asked whether each picture shows its prompt."""
        yes, no = (self.tokenizer(word, add_special_tokens=False).input_ids[0] for word in ("Yes", "No"))
        out = []
        for picture, prompt in zip(pictures, prompts, strict=True):
            question = self.config.question.replace("{prompt}", prompt)
            text = self._chat_text([{"type": "image"}, {"type": "text", "text": question}])
            inputs = self.processor(text=[text], images=[picture], return_tensors="pt").to(self.device)
            self._take_turn()
            hidden = self._base.model(**inputs).last_hidden_state[:, -1]
            forget_pictures(self._base)  # the offset of this picture must not reach text-only calls
            logits = self._base.lm_head(hidden).float()[0]
            out.append(float(torch.sigmoid(logits[yes] - logits[no])))
        return out


def _left_padded(rows: Sequence[Tensor], pad: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Token ids, mask and positions, each (P, L), with all rows ending together."""
    width = max(len(row) for row in rows)
    ids = torch.full((len(rows), width), pad, dtype=torch.long)
    mask = torch.zeros(len(rows), width, dtype=torch.long)
    for index, row in enumerate(rows):
        ids[index, width - len(row) :] = row
        mask[index, width - len(row) :] = 1
    positions = (mask.cumsum(dim=1) - 1).clamp(min=0)
    return ids.to(device), mask.to(device), positions.to(device)
