"""A policy whose weights are shared out over the ranks: each holds a part of every layer (FSDP, arXiv 2304.11277).

A layer is put together from all ranks just before it computes, and dropped again behind it, forwards and backwards;
so a device holds its share and a layer or two, never the whole policy. Shared are the matrices of the language model's
layers. Whole on every rank stay the adapter, vectors, token embedding and output layer, and the vision tower. The whole
policy is read into the host's memory and sharded from there, layer by layer.

With an adapter, what is trained is whole, so optimiser and checkpoints know nothing of all this. Where all weights are
trained, each rank also has the gradients, the moments and the optimiser step of its share alone; a checkpoint puts
them together on the first rank, and is the file it always is.

To put a layer together takes all ranks at once: they use the policy in turns, see ``turns.py``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor

from .config import ConfigError
from .distributed import Ranks, World
from .policy_family import language_model, position_rows, shaped
from .turns import SharedTurns, Turn


def empty_pass(model: Any, *, learn: bool = False, trained: bool = False) -> None:
    """A pass of one token, with its backward pass where the ranks ``learn``.

    Leaves no gradient; of weights that are shared out and ``trained``, zeros are added to what other ranks learn.
    """
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
                nothing = 0.0 * output.last_hidden_state.sum()
                torch.autograd.backward(nothing, inputs=None if trained else first)
    finally:
        handle.remove()
        model.train(training)


class _Exchange:
    """What FSDP puts layers together and sums gradients with: as its own, but a rank that is lost is said to be."""

    def __init__(self, world: Ranks, exchange: Callable[..., dist.Work | None]) -> None:
        self._world, self._exchange = world, exchange

    def allocate(self, size: Sequence[int], *, dtype: torch.dtype, device: torch.device) -> Tensor:
        """The buffer of a layer."""
        return torch.empty(*size, dtype=dtype, device=device)

    def __call__(
        self, output_tensor: Tensor, input_tensor: Tensor, group: dist.ProcessGroup, **options: Any
    ) -> dist.Work | None:
        return self._world.meet(self._exchange, output_tensor, input_tensor, group=group, **options)


def shard(model: Any, kept: set[nn.Parameter], world: Ranks, device: torch.device) -> None:
    """Leave of ``model``, whose weights are in the host's memory, this rank's share on ``device``.

    Gradients of what is shared out are summed over the ranks by themselves.

    Args:
        model: a transformers model with its head; its layers may carry an adapter.
        kept: the adapter's weights, which stay whole.

    Raises:
        ConfigError: its layers can't be told apart.
    """
    layers = getattr(language_model(model), "layers", None)
    if not isinstance(layers, nn.ModuleList) or not len(layers):
        raise ConfigError(
            f"placement.shard_policy is true, but the layers of a {type(model).__name__} can't be told apart; set it "
            "to false, or use a Qwen2-VL, Qwen2.5-VL or Qwen3-VL policy."
        )
    mesh = DeviceMesh.from_group(world.group_on(device), device.type)
    units: list[Any] = list(layers)
    for layer in units:
        whole = {parameter for parameter in layer.parameters() if parameter in kept or parameter.ndim < 2}
        fully_shard(layer, mesh=mesh, reshard_after_forward=True, ignored_params=whole)
    for index, layer in enumerate(units):  # else guessed from passes before, which need not be the same on all ranks
        layer.set_modules_to_backward_prefetch([units[max(0, index - 1)]])
    # The model around them has nothing of its own to gather, but makes one whole of them.
    rest = {parameter for parameter in model.parameters() if not isinstance(parameter, DTensor)}
    fully_shard(model.model, mesh=mesh, ignored_params=rest)
    for tensor in (*rest, *model.buffers()):
        tensor.data = tensor.data.to(device)
    gather: Any = _Exchange(world, dist.all_gather_into_tensor)
    scatter: Any = _Exchange(world, dist.reduce_scatter_tensor)
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.set_custom_all_gather(gather)
            module.set_custom_reduce_scatter(scatter)
            module.set_force_sum_reduction_for_comms(True)  # gloo knows no other
            module.set_gradient_divide_factor(1.0)


def share_out(
    trained: Any, reference: Any, adapter: set[nn.Parameter], world: Ranks, device: torch.device
) -> SharedTurns:
    """:func:`shard` a policy; returns the turns in which all ranks must use it from now on.

    ``world`` does so too: nothing is exchanged before all ranks have come to it.

    Args:
        trained: the model; with an ``adapter`` its weights are frozen.
        reference: the untrained model, where that is another one; else None.
    """
    full = not adapter
    models = [trained] if reference is None else [trained, reference]
    for model in models:
        shard(model, adapter, world, device)
        empty_pass(model)  # FSDP finds its way through a model when it is first used
    go_along: dict[Turn, Callable[[], object]] = {
        Turn.FORWARD: lambda: empty_pass(trained),
        Turn.REFERENCE: lambda: empty_pass(reference),
        Turn.LEARN: lambda: empty_pass(trained, learn=True, trained=full),
    }

    def settled() -> None:  # else FSDP remembers the layers of every pass without a gradient
        for model in models:
            if hasattr(model.model, "reset_iter_state"):  # older versions of torch have no such method
                model.model.reset_iter_state()

    turns = SharedTurns(world.agree, go_along, settled)
    world.before_exchange = lambda: turns.take(Turn.MEET)
    return turns


def shared_out(tensors: Iterable[Tensor]) -> list[DTensor]:
    """Those of which this rank has a share only."""
    return [tensor for tensor in tensors if isinstance(tensor, DTensor)]


def collect(
    world: World, parameters: Iterable[nn.Parameter], optimizer: torch.optim.Optimizer, *, keep: bool
) -> dict[int, Tensor]:
    """Put together what is shared out of trained weights and their moments; all ranks at once, see ``Turn.COLLECT``.

    Returns CPU copies by the ``id`` of the share, or nothing unless ``keep``.
    """
    found = {}
    for parameter in shared_out(parameters):
        for share in (parameter, *shared_out(optimizer.state.get(parameter, {}).values())):
            whole = world.meet(share.full_tensor).detach()
            if keep:
                found[id(share)] = whole.cpu()
    return found


@torch.no_grad()
def spread(
    world: Ranks, parameters: Iterable[nn.Parameter], optimizer: torch.optim.Optimizer, loaded: Mapping[int, Tensor]
) -> None:
    """Give every rank its share of what the first one has loaded of weights that are shared out.

    Args:
        loaded: on the first rank, whole weights on the CPU by the ``id`` of its share. Whole moments are in the state
            of its ``optimizer``.
    """
    shares = shared_out(parameters)
    if not shares or not world.decide(lambda: bool(loaded)):
        return
    for parameter in shares:
        state = optimizer.state[parameter]
        tensors = {"": loaded[id(parameter)], **state} if world.first else {}
        for name, shape, dtype in world.decide(lambda: [(n, t.shape, t.dtype) for n, t in tensors.items()]):  # noqa: B023
            whole = tensors[name].cpu() if world.first else torch.empty(shape, dtype=dtype)
            world.meet(dist.broadcast, whole, 0)
            if not name:
                parameter.to_local().copy_(_share(whole, world))
            elif shape == parameter.shape:
                share = _share(whole, world).to(parameter.device, copy=True)
                state[name] = DTensor.from_local(
                    share, parameter.device_mesh, parameter.placements, shape=shape, stride=parameter.stride()
                )
            else:  # how many steps there were
                state[name] = whole


def _share(whole: Tensor, world: Ranks) -> Tensor:
    """This rank's rows, as FSDP deals them out."""
    parts = whole.chunk(world.size)
    return parts[world.rank] if world.rank < len(parts) else whole[:0]


def clip_gradients(parameters: Sequence[nn.Parameter], limit: float, world: World) -> Tensor:
    """``torch.nn.utils.clip_grad_norm_``, of shares too: the norm is that of the whole gradient."""
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    if not shared_out(gradients):
        return torch.nn.utils.clip_grad_norm_(parameters, limit)
    own = [gradient.to_local() if isinstance(gradient, DTensor) else gradient for gradient in gradients]
    squares = [float(gradient.float().norm()) ** 2 for gradient in own]
    whole = sum(square for square, each in zip(squares, gradients, strict=True) if not isinstance(each, DTensor))
    shares = sum(square for square, each in zip(squares, gradients, strict=True) if isinstance(each, DTensor))
    norm = torch.tensor(whole + sum(world.gather(shares))).sqrt()
    torch._foreach_mul_(own, float(torch.clamp(limit / (norm + 1e-6), max=1.0)))
    return norm


def held(model: nn.Module) -> tuple[int, int]:
    """Bytes that this rank holds of the weights of ``model``, and bytes of all of them."""
    here = whole = 0
    for parameter in model.parameters():
        size = parameter.numel() * parameter.element_size()
        here += parameter.to_local().untyped_storage().nbytes() if isinstance(parameter, DTensor) else size
        whole += size
    return here, whole
