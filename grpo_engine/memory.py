"""The memory plan: what a run needs on each device against what is there, before any model loads.

``memory_needs.py`` says what each model needs, ``memory_host.py`` what the process needs besides. On one device the
phases of a step take turns, so only the largest of them counts there. :meth:`MemoryPlan.require` refuses a run that
can't fit, and says which settings would make it fit: each was planned again with that setting, so the advice is as
true as the plan.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import psutil
import torch

from .config import ConfigError, RunConfig
from .memory_host import at_once, picture_needs, process_needs
from .memory_needs import Item, Needs, image_needs, policy_needs, reward_needs, total
from .model_sizes import ModelSizes, prompt_tokens, read_sizes
from .placement import PLANS, Placement, available_devices, resolve

GIB = 2**30
AUTO_SHARE = 0.85  # of the free memory that ``models.image.batch_size=0`` may fill: estimates are that good
CUDA_CONTEXT = 0.6 * GIB  # of one process on one GPU, with cuBLAS and cuDNN


@dataclass(frozen=True)
class Memory:
    """Bytes of one device: ``free`` is all that other programs leave, what this process holds included."""

    free: int
    total: int


@dataclass(frozen=True)
class DevicePlan:
    """Everything on one device; ``memory`` None = it is not here, or can't be asked."""

    device: str
    items: tuple[Item, ...]
    memory: Memory | None

    @property
    def needed(self) -> int:
        """Bytes of all counted items that are known: a lower bound where one is unknown."""
        return total(item for item in self.items if item.counted)

    @property
    def unknown(self) -> bool:
        """Whether something on this device has no known size."""
        return any(item.bytes is None for item in self.items)

    @property
    def fits(self) -> bool | None:
        """None where that can't be known."""
        if self.memory is None:
            return None
        if self.needed > self.memory.free:
            return False
        return None if self.unknown else True


@dataclass(frozen=True)
class Advice:
    """Settings with which the run fits, as ``--set`` takes them, and what each device then needs in bytes."""

    settings: tuple[str, ...]
    needed: Mapping[str, int]

    def __str__(self) -> str:
        return " with ".join(self.settings)


class MemoryRefusal(ConfigError):
    """The run can't fit. ``plan`` says what it would need."""

    def __init__(self, message: str, plan: MemoryPlan) -> None:
        super().__init__(message)
        self.plan = plan


@dataclass(frozen=True)
class MemoryPlan:
    """What a run needs on every device it uses, the CPU always among them."""

    devices: tuple[DevicePlan, ...]
    image_batch: int  # pictures rendered at once: ``models.image.batch_size``, or what stands for its 0
    notes: tuple[str, ...] = ()
    advice: tuple[Advice, ...] = ()

    @property
    def fits(self) -> bool | None:
        """False if a device is too small, None if that can't be known of one, else True."""
        answers = {device.fits for device in self.devices}
        return False if False in answers else None if None in answers else True

    def require(self) -> None:
        """Refuse what can't fit.

        Raises:
            MemoryRefusal: one sentence with device, needed, free, and what would help.
        """
        if self.fits is False:
            raise MemoryRefusal(self._refusal(), self)

    def _refusal(self) -> str:
        short = []
        for device in self.devices:
            if device.fits is False and device.memory is not None:
                counted = [item for item in device.items if item.counted]
                parts = {item.part: total(other for other in counted if other.part == item.part) for item in counted}
                split = ", ".join(f"{part} {_size(size)}" for part, size in parts.items() if size > 0)
                short.append(
                    f"{device.device} needs about {_size(device.needed)} ({split}), but only "
                    f"{_size(device.memory.free)} of its {_size(device.memory.total)} are free"
                )
        if self.advice:
            remedy = "set " + ", or ".join(str(advice) for advice in self.advice[:3])
        else:
            remedy = "no settings of these models make it fit; use smaller ones, or a device with more memory"
        if all(device.needed <= device.memory.total for device in self.devices if device.memory is not None):
            remedy += ", or end what else uses that memory"
        return f"{'; '.join(short)}; {remedy}."

    def as_rows(self) -> list[dict[str, Any]]:
        """One row an item, for a table: device, part, what, gib (None = unknown), kind, counted."""
        return [
            {
                "device": device.device,
                "part": item.part,
                "what": item.what,
                "gib": None if item.bytes is None else round(item.bytes / GIB, 3),
                "kind": item.kind,
                "counted": item.counted,
            }
            for device in self.devices
            for item in device.items
        ]

    def as_data(self) -> dict[str, Any]:
        """Everything as plain data; sizes in GiB."""
        return {
            "fits": self.fits,
            "devices": [
                {
                    "device": device.device,
                    "needed_gib": round(device.needed / GIB, 2),
                    "free_gib": None if device.memory is None else round(device.memory.free / GIB, 2),
                    "total_gib": None if device.memory is None else round(device.memory.total / GIB, 2),
                    "fits": device.fits,
                }
                for device in self.devices
            ],
            "items": self.as_rows(),
            "advice": [
                {
                    "settings": list(advice.settings),
                    "needed_gib": {device: round(size / GIB, 2) for device, size in advice.needed.items()},
                }
                for advice in self.advice
            ],
            "notes": list(self.notes),
        }

    def as_text(self) -> list[str]:
        """Lines for people."""
        lines = []
        for device in self.devices:
            least = "at least " if device.unknown else ""
            if device.memory is None:
                there = "not on this machine"
            else:
                there = f"{_size(device.memory.free)} of {_size(device.memory.total)} free"
            answer = {True: "fits", False: "does not fit", None: "can't say whether it fits"}[device.fits]
            lines.append(f"{device.device}: needs {least}{_size(device.needed)}, {there}: {answer}")
            for item in device.items:
                size = "?" if item.bytes is None else _size(item.bytes)
                turn = "" if item.counted else ", not at the same time"
                lines.append(f"  {size:>10}  {item.part}: {item.what} ({item.kind}{turn})")
        lines += list(self.notes)
        lines += [
            f"It would fit with {advice}: "
            + ", ".join(f"{_size(size)} on {device}" for device, size in advice.needed.items())
            + "."
            for advice in self.advice
        ]
        return lines


def _size(size: float) -> str:
    return f"{size / GIB:.1f} GiB" if size >= GIB else f"{size / 2**20:.0f} MiB"


def device_memory(device: str) -> Memory:
    """Memory of a device that is here. What this process holds counts as free: its runs come one after another."""
    if device.startswith("cuda"):
        free, capacity = torch.cuda.mem_get_info(torch.device(device))
        return Memory(free + torch.cuda.memory_reserved(torch.device(device)), capacity)
    memory = psutil.virtual_memory()
    return Memory(min(memory.total, memory.available + psutil.Process().memory_info().rss), memory.total)


def plan_memory(
    config: RunConfig,
    placement: Placement,
    *,
    prompts: Sequence[str] = (),
    memory: Mapping[str, Memory] | None = None,
    sizes: ModelSizes | None = None,
    ranks: int = 1,
    sharers: int = 1,
) -> MemoryPlan:
    """Plan a run's memory. Reads configurations and file headers; loads and downloads nothing.

    Args:
        prompts: that will be rewritten; without them, one as long as ``data.max_prompt_chars`` allows.
        memory: of every device there is; None = ask those that the run uses.
        sizes: of the models; None = read them.
        ranks: processes like this one on this machine, each with GPUs of its own; the CPU's memory they share.
        sharers: ranks of all machines, over which ``placement.shard_policy`` shares the policy out.

    Raises:
        ConfigError: a model's path names nothing.
    """
    head = prompt_tokens(config, prompts)
    found = read_sizes(config) if sizes is None else sizes
    used = {"cpu", *(str(device) for device in placement.devices)}
    # To ask a GPU makes this process a user of it: the others are asked only when advice needs them.
    asked = {name: device_memory(name) for name in available_devices() if name in used} if memory is None else memory
    if ranks > 1:
        asked = {**asked, "cpu": Memory(asked["cpu"].free // ranks, asked["cpu"].total // ranks)}
    chosen = _with_batch(config, placement, head, asked, found, sharers)
    plan = _planned(chosen, placement, head, asked, found, sharers)
    if chosen is not config:
        note = f"models.image.batch_size=0 (auto) is {plan.image_batch} here."
        plan = replace(plan, notes=(*plan.notes, note))
    if plan.fits is not False:
        return plan
    config = chosen
    if memory is None:
        asked = {name: asked.get(name) or device_memory(name) for name in available_devices()}
    return replace(plan, advice=tuple(_advice(config, placement, head, asked, found, sharers)))


def _with_batch(
    config: RunConfig, placement: Placement, head: int, memory: Mapping[str, Memory], sizes: ModelSizes, sharers: int
) -> RunConfig:
    """With a number in the place of ``models.image.batch_size=0``: as many pictures of a step as fit, in equal parts.

    Leaves some memory free, for on a CPU nothing is raised before the system ends the process. Where a size is not
    known, one group.
    """
    if config.models.image.batch_size:
        return config
    step = min(config.training.batch_size * config.sampling.num_rollouts, 512)
    roomy = {name: replace(there, free=int(AUTO_SHARE * there.free)) for name, there in memory.items()}

    def sized(batch: int) -> RunConfig:
        return changed_settings(config, {"models.image.batch_size": batch})

    if sizes.image is None:
        return sized(min(config.sampling.num_rollouts, step))
    fits, fails = 1, step + 1  # one at a time is tried whatever the plan says
    while fails - fits > 1:
        middle = (fits + fails) // 2
        if _planned(sized(middle), placement, head, roomy, sizes, sharers).fits is False:
            fails = middle
        else:
            fits = middle
    return sized(math.ceil(step / math.ceil(step / fits)))


def _planned(
    config: RunConfig, placement: Placement, head: int, memory: Mapping[str, Memory], sizes: ModelSizes, sharers: int
) -> MemoryPlan:
    sharers = sharers if config.placement.shard_policy else 1
    placed: list[tuple[torch.device, Needs]] = [
        (placement.policy, policy_needs(config, placement.policy, head, sizes.policy, sharers)),
        *((device, image_needs(config, device, sizes.image)) for device in placement.images),
        (placement.reward, reward_needs(config, placement.reward, sizes.reward)),
    ]
    names = [*(str(device) for device in placement.devices if device.type != "cpu"), "cpu"]
    devices = []
    for name in names:
        needs = [need for device, need in placed if str(device) == name]
        if name == "cpu":
            needs += [
                Needs(need.part, need.on_host, [[_passing(need, device)]] if need.through_host else [])
                for device, need in placed
                if device.type != "cpu"
            ]
            needs = [process_needs(config, placement), *needs, picture_needs(config)]
        together = config.training.streaming == "always" and name == str(placement.policy)
        devices.append(_device_plan(name, needs, memory.get(name), together=together))
    return MemoryPlan(tuple(devices), config.models.image.batch_size, sizes.notes)


def _passing(need: Needs, device: torch.device) -> Item:
    return Item(need.part, f"weights converted on their way to {device}", need.through_host, "estimate")


def _device_plan(device: str, needs: list[Needs], memory: Memory | None, *, together: bool) -> DevicePlan:
    """Models on one device take turns, unless streaming makes them work ``together``."""
    items = [] if device == "cpu" else [Item("process", "CUDA and its libraries", int(CUDA_CONTEXT), "estimate")]
    phases = [phase for need in needs for phase in need.phases]
    if together:
        heaviest = [max(need.phases, key=total, default=[]) for need in needs]
        phases = [[item for phase in heaviest for item in phase]]
    largest = at_once(phases, device)
    for need in needs:
        items += need.stays
        in_turn = dict.fromkeys(item for phase in need.phases for item in phase)  # some belong to several phases
        items += [replace(item, counted=item in largest) for item in in_turn]
    return DevicePlan(device, tuple(items), memory)


# -- advice --------------------------------------------------------------------------------------------------


def _advice(
    config: RunConfig, placement: Placement, head: int, memory: Mapping[str, Memory], sizes: ModelSizes, sharers: int
) -> Iterator[Advice]:
    """Settings that make the run fit as far as sizes are known: each by itself, else several that all are needed."""

    def fitting(settings: Mapping[str, Any]) -> Advice | None:
        try:
            changed = changed_settings(config, settings)
            same = changed.placement.plan == config.placement.plan
            moved = placement if same else resolve(changed.placement, list(memory))
            plan = _planned(changed, moved, head, memory, sizes, sharers)
        except ConfigError:  # a plan for more GPUs than there are, or FLUX without T5
            return None
        written = tuple(f"{name}={str(value).lower()}" for name, value in settings.items())
        needed = {device.device: device.needed for device in plan.devices}
        return None if plan.fits is False else Advice(written, needed)

    candidates = _candidates(config, placement, sharers)
    alone = False
    for name, values in candidates.items():
        if found := next(filter(None, (fitting({name: value}) for value in values)), None):
            alone = True
            yield found
    if alone:
        return
    left_out = ["placement.plan", *(["models.policy.quantize"] if sharers > 1 else [])]  # 4 bits can't be shared out
    chosen: dict[str, Any] = {}
    for name, values in candidates.items():
        if values and name not in left_out:
            chosen[name] = values[-1]
        if fitting(chosen):
            break
    else:
        return
    for name in reversed(list(chosen)):  # the costliest first: without it if possible, else as mildly as possible
        others = {key: value for key, value in chosen.items() if key != name}
        if fitting(others):
            chosen = others
        else:
            chosen[name] = next(value for value in candidates[name] if fitting({**chosen, name: value}))
    if found := fitting(chosen):
        yield found


def _candidates(config: RunConfig, placement: Placement, sharers: int) -> dict[str, list[Any]]:
    """Settings that need less memory, and their values from the mildest on; what changes no result comes first."""
    image, policy = config.models.image, config.models.policy
    shareable = sharers > 1 and policy.quantize == "none"
    packable = placement.policy.type == "cuda" and policy.adapter == "lora" and policy.quantize == "none"
    return {
        "placement.plan": [name for name in PLANS if name not in (config.placement.plan, "cpu")],
        "placement.shard_policy": [True] if shareable and not config.placement.shard_policy else [],
        "training.update_rows": _halves(config.training.update_rows or config.sampling.num_rollouts),
        "training.logit_chunk": [size for size in (256, 64, 16) if size < (config.training.logit_chunk or 1_000_000)],
        "sampling.prompts_per_pass": _halves(config.sampling.prompts_per_pass or config.training.batch_size),
        "models.image.decode_batch_size": _halves(image.decode_batch_size or image.batch_size),
        "models.image.batch_size": _halves(image.batch_size),
        "models.policy.gradient_checkpointing": [] if policy.gradient_checkpointing else [True],
        "models.policy.dtype": ["bfloat16"] if policy.dtype in ("auto", "float32") else [],
        "models.image.t5_on_cpu": [True] if image.use_t5 and not image.t5_on_cpu else [],
        "models.image.decode_tile": [side for side in (512, 256) if side < (image.decode_tile or image.resolution)],
        "models.policy.quantize": ["4bit"] if packable else [],
        "models.image.use_t5": [False] if image.use_t5 else [],
        "models.image.dtype": ["bfloat16"] if image.dtype == "float32" else [],
        "models.image.resolution": [side for side in (768, 512, 256) if side < image.resolution],
        "models.policy.adapter": ["lora"] if policy.adapter == "full" else [],
    }


def _halves(value: int) -> list[int]:
    """``value`` halved again and again, down to 1."""
    return [] if value <= 1 else [value // 2, *_halves(value // 2)]


def changed_settings(config: RunConfig, settings: Mapping[str, Any]) -> RunConfig:
    """``config`` with other values for some settings, by dotted name; raises ConfigError like ``RunConfig.parse``."""
    data = config.model_dump()
    for name, value in settings.items():
        *parents, leaf = name.split(".")
        node = data
        for parent in parents:
            node = node[parent]
        node[leaf] = value
    return RunConfig.parse(data)
