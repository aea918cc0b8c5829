"""The world of ranks: the processes that train one policy together, each with devices of its own.

Every rank holds the whole policy, or with ``placement.shard_policy`` a share of it (``sharding.py``), and takes whole
groups of each step; gradients are summed over ranks before one identical optimiser step on each. The loss of a group is
already divided by the size of the whole step, so the sum is the gradient that one process would have. The first rank
alone records.

A launcher (torchrun, or accelerate launch, which uses it) starts the ranks and tells them who they are through
the environment. Without one there is a single rank, and nothing here costs anything.
"""

from __future__ import annotations

import io
import os
import pickle
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import timedelta
from typing import Any, TypeVar

import numpy as np
import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import PrefixStore
from torch.distributed.rendezvous import rendezvous
from torch.distributed.tensor import DTensor

from .config import ConfigError
from .control import RunControl
from .liveness import SILENCE_S, RankLost, Watch

T = TypeVar("T")

JOIN_S = 600.0  # how long the ranks wait for each other at the start
UNLIMITED = timedelta(days=365)  # see liveness.py


class World:
    """A single rank: everything is its own.

    Attributes:
        rank: of this process, from 0.
        size: how many ranks there are.
        local_rank: of this process on its machine, from 0.
        local_size: how many ranks this machine has.
        before_exchange: called before ranks exchange anything; returns when all of them are about to.
    """

    rank, size, local_rank, local_size = 0, 1, 0, 1
    before_exchange: Callable[[], None] = staticmethod(lambda: None)

    @property
    def first(self) -> bool:
        """Whether this rank is the one that records."""
        return self.rank == 0

    def share(self, items: Sequence[T]) -> Sequence[T]:
        """This rank's part of what all ranks know: neighbours, in order; the parts differ by one at most."""
        begin, end = (len(items) * rank // self.size for rank in (self.rank, self.rank + 1))
        return items[begin:end]

    def gather(self, value: T) -> list[T]:
        """Every rank's ``value``, in the order of ranks, on every rank."""
        return [value]

    def collect(self, items: Sequence[T]) -> list[T]:
        """On the first rank everybody's ``items``, in the order of ranks; on another its own."""
        return list(items)

    def decide(self, choose: Callable[[], T]) -> T:
        """What ``choose`` says on the first rank, where alone it is called, on every rank."""
        return choose()

    def sum_gradients(self, parameters: Iterable[torch.nn.Parameter]) -> None:
        """Replace each gradient by its sum over ranks; a weight without one on every rank keeps none."""

    def align(self, parameters: Sequence[torch.nn.Parameter], optimizer: torch.optim.Optimizer) -> None:
        """Give every rank the first one's weights and optimiser state, bit for bit, except of weights shared out."""

    def obey(self, control: RunControl, stuck: Callable[[str], None] = lambda sentence: None) -> None:
        """Pass signals to any rank on to ``control`` as a stop, and the loss of a rank as an error to raise.

        ``stuck`` is called with the sentence if the trainer can't be reached; the process then ends.
        """

    def together(self, action: Callable[[], T]) -> T:
        """``action()`` on every rank.

        Raises:
            ConfigError: on every rank, if any rank's ``action`` did.
        """
        return action()

    def meet(self, exchange: Callable[..., T], *arguments: Any, **named: Any) -> T:
        """Do something that all ranks do at once, without waiting for their turn.

        Raises:
            RankLost: a rank is missing.
        """
        return exchange(*arguments, **named)

    def sum_figures(self, figures: Mapping[str, float], largest: Sequence[str] = ()) -> dict[str, float]:
        """Figures of all ranks added up by name; of those in ``largest``, the largest."""
        totals: dict[str, float] = defaultdict(float)
        for part in self.gather(dict(figures)):
            for name, value in part.items():
                # unlike max(), maximum() keeps a NaN
                totals[name] = float(np.maximum(totals[name], value)) if name in largest else totals[name] + value
        return totals


ALONE = World()


class Ranks(World):
    """Several ranks, which meet over gloo; gradients on GPUs are summed over NCCL.

    Made by :func:`join`. Every method must be called by all ranks in the same order. What goes wrong between
    them is raised as :class:`RankLost`, as soon as it is known who is missing.
    """

    def __init__(
        self, store: Any, rank: int, size: int, local_rank: int, local_size: int, *, silence: float = SILENCE_S
    ) -> None:
        self.rank, self.size, self.local_rank, self.local_size = rank, size, local_rank, local_size
        store.set(f"here/{rank}", "")
        store.wait([f"here/{other}" for other in range(size)], timedelta(seconds=JOIN_S))
        self.watch = Watch(store.clone(), rank, size, silence=silence)
        dist.init_process_group(
            "gloo", store=PrefixStore("group", store), rank=rank, world_size=size, timeout=UNLIMITED
        )
        self._gpu_group: Any = None

    def gather(self, value: T) -> list[T]:
        """See :class:`World`."""
        self.before_exchange()
        found: list[Any] = [None] * self.size
        self.meet(dist.all_gather_object, found, value)
        return found

    def collect(self, items: Sequence[T]) -> list[T]:
        """See :class:`World`."""
        self.before_exchange()
        found: list[Any] | None = [None] * self.size if self.first else None
        self.meet(dist.gather_object, list(items), found)
        return [item for part in found for item in part] if found is not None else list(items)

    def decide(self, choose: Callable[[], T]) -> T:
        """See :class:`World`."""
        self.before_exchange()
        chosen: list[Any] = [choose() if self.first else None]
        self.meet(dist.broadcast_object_list, chosen)
        value: T = chosen[0]
        return value

    def sum_gradients(self, parameters: Iterable[torch.nn.Parameter]) -> None:
        """See :class:`World`."""
        every = [parameter for parameter in parameters if not isinstance(parameter, DTensor)]  # summed by FSDP
        # A rank whose groups all lack spread has made no backward pass. That everybody answers here also means
        # that nobody is missing when the GPUs begin to wait for each other.
        present = self.gather([parameter.grad is not None for parameter in every])
        for parameter, somewhere in zip(every, map(any, zip(*present, strict=True)), strict=True):
            if somewhere:
                if parameter.grad is None:
                    parameter.grad = torch.zeros_like(parameter)
                self.meet(dist.all_reduce, parameter.grad, group=self.group_on(parameter.grad.device))

    def align(self, parameters: Sequence[torch.nn.Parameter], optimizer: torch.optim.Optimizer) -> None:
        """See :class:`World`."""
        self.before_exchange()
        own = {id(parameter) for parameter in parameters if isinstance(parameter, DTensor)}  # see sharding.spread
        for parameter in parameters:
            if id(parameter) in own:
                continue
            here = parameter.detach().cpu()
            self.meet(dist.broadcast, here, 0)
            with torch.no_grad():
                parameter.copy_(here)

        def packed() -> bytes:
            buffer, shared = io.BytesIO(), optimizer.state_dict()
            every = [parameter for group in optimizer.param_groups for parameter in group["params"]]
            for index in [index for index in shared["state"] if id(every[index]) in own]:
                del shared["state"][index]
            torch.save(shared, buffer)
            return buffer.getvalue()

        state = self.decide(packed)
        if not self.first:
            optimizer.load_state_dict(torch.load(io.BytesIO(state), map_location="cpu", weights_only=True))

    def obey(self, control: RunControl, stuck: Callable[[str], None] = lambda sentence: None) -> None:
        """See :class:`World`."""
        self.watch.on_stop = lambda: control.command("stop")
        self.watch.on_loss = control.abandon
        self.watch.on_stuck = stuck

    def together(self, action: Callable[[], T]) -> T:
        """See :class:`World`."""
        result: list[T] = []
        problem = ""
        try:
            result.append(action())
        except ConfigError as error:
            problem = str(error)
        for rank, said in enumerate(self.gather(problem)):
            if said:
                raise ConfigError(said if rank == 0 else f"On rank {rank} of {self.size}: {said}")
        return result[0]

    def leave(self) -> None:
        """The end, on every rank, however it came about."""
        self.watch.leave()
        if self.watch.lost is None and self.first:
            dist.destroy_process_group()

    def agree(self, wanted: int) -> int:
        """The largest number that any rank gives, on every rank."""
        number = torch.tensor([wanted])
        self.meet(dist.all_reduce, number, op=dist.ReduceOp.MAX)
        return int(number)

    def group_on(self, device: torch.device) -> Any:
        """The ranks as they meet with tensors on ``device``, which is this rank's GPU or the CPU."""
        if device.type == "cpu":
            return dist.group.WORLD
        if self._gpu_group is None:
            torch.cuda.set_device(device)
            self._gpu_group = dist.new_group(backend="nccl", timeout=UNLIMITED)
        return self._gpu_group

    def meet(self, exchange: Callable[..., T], *arguments: Any, **named: Any) -> T:
        """See :class:`World`."""
        try:
            return exchange(*arguments, **named)
        except (RuntimeError, pickle.UnpicklingError, EOFError) as error:  # torn connections
            raise self.watch.verdict(error) from error


def launched() -> bool:
    """Whether a launcher has started this process as one of several ranks."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1


def join(*, silence: float = SILENCE_S) -> Ranks:
    """Meet the other ranks that the launcher has started. Only from the main thread, before models are loaded.

    Raises:
        ConfigError: the launcher's variables are missing, or the others do not come.
    """
    missing = [name for name in ("RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT") if name not in os.environ]
    if missing:
        raise ConfigError(
            f"WORLD_SIZE is {os.environ.get('WORLD_SIZE')}, but {missing[0]} is not set; start the ranks with torchrun "
            "or accelerate launch, or unset WORLD_SIZE for a single one."
        )
    try:
        store, rank, size = next(rendezvous("env://", timeout=timedelta(seconds=JOIN_S)))
        local = int(os.environ["LOCAL_RANK"]), int(os.environ.get("LOCAL_WORLD_SIZE", size))
        world = Ranks(store, rank, size, *local, silence=silence)
    except (RuntimeError, ValueError) as error:
        raise ConfigError(
            f"The ranks could not meet at {os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']} "
            f"({str(error).splitlines()[0]}); start all {os.environ['WORLD_SIZE']} of them, and see that this port "
            "is free and reachable."
        ) from error
    world.watch.catch_signals()
    return world


__all__ = ["ALONE", "RankLost", "Ranks", "World", "join", "launched"]
