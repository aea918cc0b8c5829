"""A policy whose weights are shared out over the ranks: each holds a part of every layer (FSDP, arXiv 2304.11277).

A layer is put together from all ranks just before it computes, and dropped again behind it, forwards and backwards;
so a device holds its share and a layer or two, never the whole policy. Shared are the matrices of the language model's
layers. Whole on every rank stay the adapter (which is all that training changes, so optimiser and checkpoints know
nothing of this), vectors, token embedding and output layer, and the vision tower. The whole policy is read into the
host's memory and sharded from there, layer by layer.

To put a layer together takes all ranks at once. So every pass through the policy is made by all of them, in turns: a
rank that wants one says so, and who has none to make at that moment makes an empty pass, of a single token, with it.
Ranks may then differ in how many passes they make: rewrites of different lengths, groups without spread, shares of an
evaluation that differ by one prompt. Nothing that ranks exchange begins before all of them have come to it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from enum import IntEnum
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor

from .config import ConfigError
from .distributed import Ranks
from .policy_family import language_model, position_rows, shaped


class Turn(IntEnum):
    """What a rank wants to do next. The largest that any rank wants is done next, by those that want it."""

    MEET = 0  # exchange something: once all ranks want that
    SETTLE = 1  # go on to work without the policy: once no rank wants a pass
    FORWARD = 2
    LEARN = 3  # a forward pass, then its backward pass


class Turns:
    """Who uses the policy when. This one is of a policy that is whole here: it is always this rank's turn."""

    def take(self, wanted: Turn) -> None:
        """Return when it is time for ``wanted``, which must follow at once."""


class SharedTurns(Turns):
    """Keeps the passes of several ranks through one sharded model in step.

    Args:
        agree: the largest number that any rank gives, on every rank.
        go_along: makes an empty pass.
        settled: called after :attr:`Turn.SETTLE`.
    """

    def __init__(
        self,
        agree: Callable[[int], int],
        go_along: Callable[[Turn], None],
        settled: Callable[[], None] = lambda: None,
    ) -> None:
        self._agree, self._go_along, self._settled = agree, go_along, settled

    def take(self, wanted: Turn) -> None:
        """See :class:`Turns`. Until then it goes along with the passes of other ranks."""
        while (turn := Turn(self._agree(wanted))) != wanted:
            if turn > Turn.SETTLE:
                self._go_along(turn)
        if wanted == Turn.SETTLE:
            self._settled()


def empty_pass(model: Any, *, learn: bool) -> None:
    """A pass of one token, with its backward pass where the ranks ``learn``; leaves no gradient."""
    first: list[Tensor] = []

    def begin(module: nn.Module, arguments: Any, output: Tensor) -> Tensor:
        first.append(output.detach().requires_grad_(learn))
        return first[0]

    one = torch.zeros(1, 1, dtype=torch.long, device=model.get_output_embeddings().weight.device)
    training: bool = model.training
    model.eval()  # no dropout, whose random numbers belong to the passes that count
    handle = model.get_input_embeddings().register_forward_hook(begin)
    try:
        with torch.set_grad_enabled(learn):
            output = model.model(
                input_ids=one,
                attention_mask=torch.ones_like(one),
                position_ids=shaped(one, position_rows(model)),
                use_cache=False,
            )
            if learn:
                torch.autograd.backward(output.last_hidden_state.sum(), inputs=first)
    finally:
        handle.remove()
        model.train(training)


class _AllGather:
    """What FSDP puts layers together with: as its own, but a rank that is lost is said to be."""

    def __init__(self, world: Ranks) -> None:
        self._world = world

    def allocate(self, size: Sequence[int], *, dtype: torch.dtype, device: torch.device) -> Tensor:
        """The buffer of a layer."""
        return torch.empty(*size, dtype=dtype, device=device)

    def __call__(
        self, output_tensor: Tensor, input_tensor: Tensor, group: dist.ProcessGroup, async_op: bool = False
    ) -> dist.Work | None:
        work: dist.Work | None = self._world.meet(
            dist.all_gather_into_tensor, output_tensor, input_tensor, group=group, async_op=async_op
        )
        return work


def shard(model: Any, trained: set[nn.Parameter], world: Ranks, device: torch.device) -> Turns:
    """Leave of ``model``, whose weights are in the host's memory, this rank's share on ``device``.

    Returns the turns in which it must be used from now on, as ``world`` does before ranks exchange anything.

    Args:
        model: a transformers model with its head; its layers may carry an adapter.
        trained: the adapter's weights, which stay whole.

    Raises:
        ConfigError: its layers can't be told apart.
    """
    text = language_model(model)
    layers = getattr(text, "layers", None)
    if not isinstance(layers, nn.ModuleList) or not len(layers):
        raise ConfigError(
            f"placement.shard_policy is true, but the layers of a {type(model).__name__} can't be told apart; set it "
            "to false, or use a Qwen2-VL, Qwen2.5-VL or Qwen3-VL policy."
        )
    mesh = DeviceMesh.from_group(world.group_on(device), device.type)
    units: list[Any] = list(layers)
    for layer in units:
        whole = {parameter for parameter in layer.parameters() if parameter in trained or parameter.ndim < 2}
        fully_shard(layer, mesh=mesh, reshard_after_forward=True, ignored_params=whole)
    for index, layer in enumerate(units):  # else guessed from passes before, which need not be the same on all ranks
        layer.set_modules_to_backward_prefetch([units[max(0, index - 1)]])
    # The model around them has nothing of its own to gather, but makes one whole of them.
    rest = {parameter for parameter in model.parameters() if not isinstance(parameter, DTensor)}
    fully_shard(model.model, mesh=mesh, ignored_params=rest)
    for tensor in (*rest, *model.buffers()):
        tensor.data = tensor.data.to(device)
    gather: Any = _AllGather(world)
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.set_custom_all_gather(gather)
    turns = SharedTurns(
        world.agree,
        lambda turn: empty_pass(model, learn=turn == Turn.LEARN),
        model.model.reset_iter_state,  # else FSDP remembers the layers of every pass without a gradient
    )
    world.before_exchange = lambda: turns.take(Turn.MEET)
    return turns


def held(model: nn.Module) -> tuple[int, int]:
    """Bytes of the weights that this rank holds of ``model``, and of all of them."""
    here = whole = 0
    for parameter in model.parameters():
        own = parameter.to_local() if isinstance(parameter, DTensor) else parameter
        here += own.numel() * own.element_size()
        whole += parameter.numel() * parameter.element_size()
    return here, whole
