"""What a run's process needs of the CPU's memory besides its models: libraries, compiled kernels, pictures.

Measured on glibc and x86-64, with the packages of ``requirements.txt``; see ``benchmarks/memory.py``.
"""

from __future__ import annotations

import math

import torch

from .config import RunConfig
from .evaluation import BASELINE_ARMS, TRAINED_ARMS
from .heap import LARGE
from .memory_needs import Item, Needs, estimate, total, update_pass
from .placement import Placement, compute_dtype

MIB = 2**20
# 0.91 GiB after all imports (Python, torch, transformers, diffusers, peft, open_clip); the code of their libraries that
# is first used, and so read from the disk, while a run goes on; what building the models leaves; holes in the heap.
PROCESS = 1.01 * 2**30
# oneDNN compiles kernels for every shape that it meets and keeps them. Pictures in a batch of a new size take about 55,
# in float32, where only convolutions are its business, less. It keeps the last 1024, but of those for products of
# bfloat16 matrices a part for ever.
SIZE_KERNELS = {torch.bfloat16: 8.7 * MIB, torch.float32: 1.5 * MIB}
SIZE_KERNELS_KEPT = {torch.bfloat16: 4.3 * MIB, torch.float32: 0.0}
SIZES_WHOLE = 1024 // 55
# The same of a bfloat16 policy, for every length of what goes through it together.
PASS_KERNELS, PASS_KERNELS_KEPT, PASSES_WHOLE = 10.5 * MIB, 5.0 * MIB, 1024 // 65


def process_needs(config: RunConfig, placement: Placement) -> Needs:
    """Of the process itself: what it holds before and besides any model's work."""
    kernels = [*_policy_kernels(config, placement), *_image_kernels(config, placement)]
    return Needs("process", [Item("process", "Python and its libraries", int(PROCESS), "estimate"), *kernels])


def _image_kernels(config: RunConfig, placement: Placement) -> list[Item]:
    """How many pictures a batch has follows from how many of a step's rewrites differ: almost any number happens."""
    if all(device.type != "cpu" for device in placement.images):
        return []
    image, most = config.models.image, config.models.image.batch_size or 1
    step = config.training.batch_size * config.sampling.num_rollouts
    # A step's batches are equal to within one picture, and so are those of an evaluation's arm.
    sizes = min(most, len(BASELINE_ARMS) + len(TRAINED_ARMS) + config.training.steps * (1 if step <= most else 2))
    dtype = compute_dtype(image.dtype, torch.device("cpu"))
    whole = min(sizes, SIZES_WHOLE)
    size = whole * SIZE_KERNELS.get(dtype, SIZE_KERNELS[torch.bfloat16])
    size += (sizes - whole) * SIZE_KERNELS_KEPT.get(dtype, SIZE_KERNELS_KEPT[torch.bfloat16])
    return [estimate("process", f"kernels compiled for {sizes} sizes of picture batches", size)]


def _policy_kernels(config: RunConfig, placement: Placement) -> list[Item]:
    """Products of float32 matrices are not oneDNN's business, so a float32 policy has none."""
    dtype = compute_dtype(config.models.policy.dtype, placement.policy)
    if placement.policy.type != "cpu" or dtype == torch.float32:
        return []
    rows = update_pass(config).rows
    passes = math.ceil(config.training.batch_size * config.sampling.num_rollouts / rows)
    lengths = min(config.training.steps * passes, rows * config.sampling.max_new_tokens)
    whole = min(lengths, PASSES_WHOLE)
    size = whole * PASS_KERNELS + (lengths - whole) * PASS_KERNELS_KEPT
    return [estimate("process", f"kernels compiled for {lengths} lengths of an update's passes", size)]


def picture_needs(config: RunConfig) -> Needs:
    """Of pictures in the memory of the process that records them; uint8, as they are drawn.

    A step's are held while it goes on, and again while they are written. An evaluation's are held until all of it can
    be recorded at once; some are remembered, to be used again (``rendering.RenderCache``).
    """
    evaluation, each = config.evaluation, 3 * config.models.image.resolution**2
    shown = evaluation.images_per_prompt * each
    arms = len(BASELINE_ARMS) + len(TRAINED_ARMS)
    validation = arms * evaluation.validation_prompts * shown if evaluation.every else 0
    remembered = min(arms * evaluation.prompts * shown + validation, config.models.image.cache_mb * 10**6)
    largest = max(len(BASELINE_ARMS) * evaluation.prompts * shown, validation)
    step = config.training.batch_size * config.sampling.num_rollouts * each
    return Needs(
        "pictures",
        [
            estimate("pictures", "remembered of evaluations", remembered, each),
            # Those that are remembered are the same ones.
            estimate("pictures", "of an evaluation until it is recorded", max(0, largest - remembered), each),
            estimate("pictures", "of a step, and of the one before it", 2 * step, each),
        ],
    )


def at_once(phases: list[list[Item]], device: str) -> list[Item]:
    """The items of ``phases``, which take turns on a device, that make up its peak.

    In the CPU's memory small tensors are cut out of one heap, which stays as large as the phase with the most of them
    made it; large ones come from the system and go back. So both the most small ones and the most large ones count.
    """
    if device != "cpu":
        return max(phases, key=total, default=[])
    small = [[item for item in phase if _in_heap(item)] for phase in phases]
    large = [[item for item in phase if not _in_heap(item)] for phase in phases]
    return [*max(small, key=total, default=[]), *max(large, key=total, default=[])]


def _in_heap(item: Item) -> bool:
    return item.block is not None and item.block < LARGE
