"""What each model needs in memory: what stays on its device, and the phases of a step that take turns there.

Weights, adapters, gradients, optimizer state and caches follow exactly from the models' sizes. What sampling,
the update, rendering and scoring need for a while is estimated from what the code computes, in the same
chunks; encoding one text at a time is too little to count. Pure arithmetic on :mod:`model_sizes`.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import Literal

import torch

from .config import RunConfig
from .image_families import family_of
from .image_sizes import ImageSize
from .model_sizes import PolicySize, RewardSize
from .placement import compute_dtype
from .small_decoder import COPIED_BYTES
from .weight_sizes import Source, Weights

Kind = Literal["exact", "estimate", "published size", "unknown"]
KINDS: dict[Source, Kind] = {"files": "exact", "configuration": "exact", "published": "published size"}

NF4 = 0.5 + 1 / 64 + 4 / (64 * 256)  # bytes a weight: 4 bits, 8 for the scale of 64, 32 for that of 256 scales
WIDE = 4  # bytes of float32, in which the adapter and all losses are computed
DECODER_COPIES = 3.25  # tensors of the full-resolution stage alive at once: 3.0 measured, and the convolution's own
GATHERED = 3  # layers of a sharded policy that are there at once beside the shares
CLIP_COPIES = 12  # tensors (B, tokens, width) alive at once in a block of the vision tower: 12.0 measured


@dataclass(frozen=True)
class Item:
    """One line of the plan.

    Attributes:
        bytes: None = unknown.
        counted: false where a larger phase stands for it.
        block: bytes of one of the tensors that it mostly consists of; None = they are large. In the CPU's memory small
            ones stay with the process's heap when they are free, see ``heap.py``.
    """

    part: str
    what: str
    bytes: int | None
    kind: Kind
    counted: bool = True
    block: int | None = None


@dataclass(frozen=True)
class Needs:
    """Of one model on one device.

    Attributes:
        stays: held for the whole run.
        phases: each a list of what is held at once for a while; phases of one device take turns.
        through_host: bytes of the host's memory that loading the model onto a GPU takes for a while.
        on_host: what a model on a GPU holds in the host's memory for the whole run.
    """

    part: str
    stays: list[Item]
    phases: list[list[Item]] = field(default_factory=list)
    through_host: int = 0
    on_host: list[Item] = field(default_factory=list)


def total(items: Iterable[Item]) -> int:
    """Bytes of items whose size is known."""
    return sum(item.bytes or 0 for item in items)


def _weights(part: str, what: str, weights: Weights, dtype: torch.dtype) -> Item:
    return Item(part, f"{what} in {str(dtype).removeprefix('torch.')}", weights.bytes(dtype), KINDS[weights.source])


def estimate(part: str, what: str, amount: float, block: float | None = None) -> Item:
    """An item of ``amount`` bytes in tensors of ``block`` bytes, see :class:`Item`."""
    return Item(part, what, int(amount), "estimate", block=None if block is None else int(block))


def policy_needs(
    config: RunConfig, device: torch.device, head: int, size: PolicySize | None, sharers: int = 1
) -> Needs:
    """Of the policy, see ``policy.py`` and ``trainer.py``.

    Args:
        head: tokens of the longest prompt in its template.
        sharers: ranks that its layers are shared out over, see ``sharding.py``.
    """
    settings = config.models.policy
    if size is None:
        return Needs("policy", [Item("policy", "everything", None, "unknown")])
    packed = settings.quantize == "4bit"
    dtype = torch.bfloat16 if packed else compute_dtype(settings.dtype, device)
    weights = _weights("policy", "weights", size.weights, dtype)
    if packed:
        saved = size.packable * dtype.itemsize - int(size.packable * NF4)
        weights = replace(weights, what="weights in 4 bits and bfloat16", bytes=(weights.bytes or 0) - saved)
    through_host = 0 if packed else size.weights.converted(dtype)
    gathered: list[Item] = []
    if sharers > 1:
        layers = size.packable * dtype.itemsize
        own = (weights.bytes or 0) - layers + layers // sharers
        weights = replace(weights, what=f"{weights.what}, 1/{sharers} of every layer", bytes=own)
        # At work, together with what it is put together from, beside the next one on its way; gradients twice too.
        copies = GATHERED + 2 * (settings.adapter == "full")
        gathered = [estimate("policy", "layers put together to compute with", copies * layers / size.layers)]
    if settings.adapter == "lora":
        state = WIDE * size.adapter(settings.lora.rank, settings.lora.targets)  # peft keeps adapters in float32
        stays = [weights, Item("policy", "adapter, its gradients and AdamW's two moments", 4 * state, "exact")]
        if packed:
            layer = size.hidden * size.intermediate * dtype.itemsize
            stays.append(estimate("policy", "weights of a layer unpacked to compute with", 2 * layer))
    else:
        state = dtype.itemsize * (size.weights.elements - size.vision - size.packable + size.packable // sharers)
        through_host += size.weights.bytes(dtype) if sharers > 1 else 0  # the untouched copy is made there
        stays = [
            weights,
            replace(weights, what="untouched copy, the reference policy"),
            Item("policy", "gradients and AdamW's two moments", 3 * state, weights.kind),
        ]
    stays += gathered
    phases = [
        [*_sampling(config, size, dtype.itemsize, head), *_copies(size, dtype, sharers)],
        *_update(config, size, dtype.itemsize, head),
    ]
    if device.type == "cuda" and sharers > 1 and settings.adapter == "full":  # not fused: all square roots at once
        phases.append([estimate("policy", "AdamW step", state)])
    asked = config.evaluation.judge in ("auto", "vqa") or config.models.reward.weights.vqa != 0
    if asked and size.pixels_per_token:
        phases.append(_judging(config, size, dtype.itemsize, head))
    if device.type == "cpu" and sharers > 1:
        phases.append([estimate("policy", "whole, before it is shared out", through_host)])
    return Needs("policy", stays, phases, through_host)


def _copies(size: PolicySize, dtype: torch.dtype, sharers: int) -> list[Item]:
    """``small_decoder.SmallDecoder``: the layers' weights, while a small policy samples."""
    copied = WIDE * size.packable
    if dtype != torch.float32 or sharers > 1 or copied > COPIED_BYTES:
        return []
    return [estimate("policy", "copies with the adapter added", copied)]


def _kept(config: RunConfig, size: PolicySize) -> tuple[bool, int]:
    """Whether sampling truncates, and how many tokens a kept set has at most."""
    sampling = config.sampling
    return sampling.top_k > 0 or sampling.top_p < 1.0, min(sampling.top_k or size.vocabulary, size.vocabulary)


def _per_token(size: PolicySize, width: int) -> tuple[int, int]:
    """Bytes of a token's keys and values in all layers, and of what one layer holds of it without gradients."""
    cache = size.layers * 2 * size.kv_heads * size.head_dim * width
    return cache, (size.hidden + size.intermediate) * (3 * width + WIDE)


def _sampling(config: RunConfig, size: PolicySize, width: int, head: int) -> list[Item]:
    """``PureGRPOPolicy.sample`` with training's chunk of prompts or evaluation's, whichever has more rows.

    ``width``: bytes of a weight; ``head``: as in :func:`policy_needs`.
    """
    evaluation, tail = config.evaluation, config.sampling.max_new_tokens
    chunk = min(config.sampling.prompts_per_pass or config.training.batch_size, config.training.batch_size)
    shown = min(max(1, config.models.image.batch_size // evaluation.images_per_prompt), evaluation.prompts)
    rows, prompts = max((chunk * config.sampling.num_rollouts, chunk), (shown * max(1, evaluation.samples), shown))
    truncated, kept = _kept(config, size)
    cache, layer = _per_token(size, width)
    # They are written to their places; one layer's are repeated for all query heads where those are more.
    copied = 2 * (size.heads if size.heads > size.kv_heads else 0) * size.head_dim * width
    if truncated:  # sampler.truncate and draw
        logits = (width + 2 * WIDE) * size.vocabulary + 60 * kept
    else:  # sampler.whole_logprobs and draw
        logits = (width + 15 * WIDE) * size.vocabulary
    one_layer = rows * (head + tail) * size.kv_heads * size.head_dim * width  # its keys, or its values
    read = prompts * head * size.intermediate * width
    return [
        estimate("policy", f"key-value cache of {rows} rows", rows * (head + tail) * (cache + copied), one_layer),
        estimate("policy", f"prompts of {prompts} groups", prompts * head * layer, read),
        estimate("policy", f"logits of {rows} rows", rows * logits, rows * WIDE * size.vocabulary),
        estimate("policy", "kept sets of the sampled tokens", rows * tail * kept * 8 * 3 * truncated, rows * kept * 8),
    ]


@dataclass(frozen=True)
class UpdatePass:
    """What goes through the policy together in one forward and backward pass of the update: its memory follows from it.

    Attributes:
        rows: rewrites, of all groups in the pass.
        groups: whose prompts go through once each, before their rewrites.
    """

    rows: int
    groups: int = 1

    def tokens(self, head: int, tail: int) -> int:
        """That go through a layer, with prompts of ``head`` tokens and rewrites of ``tail``: nothing follows a last."""
        return self.groups * head + self.rows * (tail - 1)

    def keys(self, head: int, tail: int) -> int:
        """That are attended to: a prompt's are there for itself, and again for each of its rows."""
        return self.groups * head + self.rows * (head + tail - 1)

    def pairs(self, head: int, tail: int) -> int:
        """Tokens times the keys that each sees."""
        return self.groups * head**2 + self.rows * (tail - 1) * (head + tail - 1)


def update_pass(config: RunConfig) -> UpdatePass:
    """The largest pass of ``PureGRPOTrainer.update``: some rewrites of one group, all of them, or several groups."""
    group, training = config.sampling.num_rollouts, config.training
    rows = training.update_rows or group
    groups = min(max(1, rows // group), math.ceil(training.batch_size / training.minibatches))
    return UpdatePass(rows=min(rows, groups * group), groups=groups)


def _update(config: RunConfig, size: PolicySize, width: int, head: int) -> list[list[Item]]:
    """``group_loss.pass_loss``: rewrites forward, then backward, together."""
    tail, together = config.sampling.max_new_tokens, update_pass(config)
    rows, tokens = together.rows, together.tokens(head, tail)
    layer = saved_by_layer(config, size, width, tokens, together.keys(head, tail), together.pairs(head, tail))
    if config.models.policy.gradient_checkpointing:  # every layer's input; the rest of a layer when it is at work
        recomputed = layer
        kept = size.layers * size.hidden * width * tokens
    else:
        kept, recomputed = size.layers * layer, 0
    ends = 3 * size.hidden * WIDE * tokens  # embeddings and the last norm
    truncated, most = _kept(config, size)
    # Copies of (N, V) in sampler.truncated_logprobs and its backward pass: the whole distribution, or a few sets.
    logits = (width + 3 * WIDE) * size.vocabulary + 45 * most if truncated else (width + 26) * size.vocabulary
    measured = min(config.training.logit_chunk or rows * tail, rows * tail)
    one, inner = tokens * size.hidden * WIDE, tokens * size.intermediate * width
    activations = estimate("policy", f"activations of {rows} rows, {tokens} tokens", kept + ends, one)
    working = tokens * (3 * width + 2 * WIDE) * size.intermediate
    distribution = estimate(
        "policy", f"logits of {measured} tokens", measured * logits, measured * WIDE * size.vocabulary
    )
    return [
        [activations, distribution],
        [activations, estimate("policy", "backward pass of one layer", recomputed + working, inner)],
    ]


def _judging(config: RunConfig, size: PolicySize, width: int, head: int) -> list[Item]:
    """``PureGRPOPolicy.probability_of_yes``: one picture at a time."""
    seen = config.models.image.resolution**2 // size.pixels_per_token
    tower = 4 * seen * size.vision_width * 14 * width  # four patches a token; 14 tensors alive, 8 of them the MLP's
    read = (seen + head) * sum(_per_token(size, width))
    one = 4 * seen * size.vision_width * width
    return [estimate("policy", f"judging a picture of {seen} tokens", tower + read, one)]


def saved_by_layer(config: RunConfig, size: PolicySize, width: int, tokens: int, keys: int, pairs: int) -> int:
    """Bytes that one decoder layer keeps for the backward pass.

    Counted from what autograd saves in transformers' Qwen2-VL with PEFT (``torch.autograd.graph``): the norms'
    float32 inputs; queries, the attention's output (by rows) and its normaliser; gate, its SiLU and up; the inputs
    of the trained layers, of the output projection too; keys and values, repeated for every query head; the mask. An
    adapter of a half precision layer casts its input to float32, once for each layer.

    Args:
        width: bytes of a weight.
        tokens: that go through the layer, over all rows.
        keys: that are attended to, over all rows.
        pairs: token times key, over all rows.
    """
    policy = config.models.policy
    hidden, inner, query = size.hidden, size.intermediate, size.heads * size.head_dim
    each = 2 * hidden * WIDE + (2 * query + 3 * inner) * width + size.heads * WIDE
    dense = policy.lora.targets == "all-linear"
    if policy.adapter == "full":
        each += (2 * hidden + inner + query) * width + 2 * hidden * width  # the latter: outputs of the norms
    else:
        if width == WIDE:
            inputs = hidden + query + dense * (hidden + inner)
        else:
            inputs = 3 * hidden + query + dense * (2 * hidden + inner)
        each += inputs * WIDE + policy.lora.rank * WIDE * (7 if dense else 4)
    return tokens * each + keys * 2 * query * width + pairs * width


def image_needs(config: RunConfig, device: torch.device, size: ImageSize | None) -> Needs:
    """Of one image model, see ``image_families/``.

    Raises:
        ConfigError: its pipeline can't follow these settings.
    """
    settings = config.models.image
    if size is None:
        return Needs("image model", [Item("image model", "everything", None, "unknown")])
    family = family_of(size.pipeline)
    family.check(settings, size.pipeline)
    dtype, left_out = compute_dtype(settings.dtype, device), family.left_out(settings)
    formats = {name: dtype for name in size.parts if name not in left_out}
    if family.WIDE_DECODER and "vae" in formats:
        formats["vae"] = torch.float32
    through_host = sum(size.parts[name].converted(kind) for name, kind in formats.items())
    on_host = []
    if settings.t5_on_cpu and device.type != "cpu" and formats.pop(family.T5, None) is not None:
        on_host.append(_weights("image model", family.T5, size.parts[family.T5], dtype))
        through_host -= size.parts[family.T5].converted(dtype)
    stays = [_weights("image model", name, size.parts[name], kind) for name, kind in formats.items()]
    read = family.text_tokens(settings, size.text_tokens)
    if family.EMBEDDING_CACHE:
        texts = family.EMBEDDING_CACHE * read * size.text_width * dtype.itemsize
        stays.append(estimate("image model", f"{family.EMBEDDING_CACHE} remembered prompt embeddings", texts))
    batch, passes = settings.batch_size, family.passes(settings)
    side = settings.resolution // size.vae_factor
    latents = batch * size.latent_channels * side**2 * WIDE * 4  # noise, present, predicted, next
    tokens = passes * batch * (side**2 // size.patch_area + read)
    embedded = 2 * passes * batch * read * size.text_width * dtype.itemsize
    denoised = tokens * size.width * dtype.itemsize * size.copies
    decoder_width = WIDE if family.WIDE_DECODER else dtype.itemsize
    one_by_one = 1 if not family.WIDE_DECODER and settings.decode_batch_size else settings.decode_batch_size
    at_once = min(one_by_one or batch, batch)
    tile = min(settings.decode_tile or settings.resolution, settings.resolution)
    decoded = at_once * tile**2 * size.decoder_width * decoder_width * DECODER_COPIES
    finished = at_once if family.WIDE_DECODER else batch
    colours = 4 * finished * settings.resolution**2 * 3 * WIDE  # put together and scaled to whole numbers
    square = f"{settings.resolution} x {settings.resolution}"
    denoising = [
        estimate("image model", f"denoising {batch} pictures of {square}", denoised, denoised / size.copies),
        estimate("image model", "their latents and prompt embeddings", latents + embedded, latents / 4),
    ]
    in_tiles = f" in tiles of {tile}" if tile < settings.resolution else ""
    what = f"decoding {at_once} pictures of {square}{in_tiles}"
    decoding = [estimate("image model", what, decoded + colours + latents, decoded / DECODER_COPIES)]
    return Needs("image model", stays, [denoising, decoding], through_host, on_host)


def reward_needs(config: RunConfig, device: torch.device, size: RewardSize | None) -> Needs:
    """Of the reward model (see ``reward.py``); open_clip builds it on its device."""
    settings = config.models.reward
    if size is None:
        return Needs("reward", [Item("reward", "everything", None, "unknown")])
    dtype = compute_dtype(settings.dtype, device)
    batch = min(settings.batch_size, max(config.sampling.num_rollouts, config.models.image.batch_size))
    pixels = 3 * WIDE * 2 * (config.models.image.resolution**2 + size.image_size**2)
    blocks = CLIP_COPIES * size.tokens * size.width * dtype.itemsize
    scoring = estimate("reward", f"scoring {batch} pictures", batch * (pixels + blocks), batch * blocks / CLIP_COPIES)
    return Needs("reward", [_weights("reward", "weights", size.weights, dtype)], [[scoring]])
