"""An encoder that no rank holds whole: torch's `fully_shard` (FSDP2), and whole tensors out of shards and back.

Each tower's repeated layers are gathered one after another as a chunk passes through, and let go of behind it; their
gradients are summed into the shards chunk by chunk, not once a step. Ranks must therefore encode equally many chunks:
see `data.chunks.filler`.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from retriever.config import ConfigError
from retriever.encoder.dual_encoder import DualEncoder
from retriever.encoder.towers import repeated_layers
from retriever.parallel.world import World


class PlacedEncoder:
    """Puts an encoder on its rank's device, in shards where `world.sharded`, and gives it back whole.

    Sharded, parameters are gathered in fp32 and rounded as a chunk is computed: a chunk is what it is without shards.
    """

    def __init__(self, encoder: DualEncoder, world: World) -> None:
        """`encoder`, on the host with the same weights on every rank, is changed in place."""
        self._encoder, self._sharded = encoder, world.sharded
        self._outline = _outline(encoder)
        if world.sharded:
            _shard(encoder, world)
        else:
            encoder.to(world.device)

    def whole(self, device: torch.device) -> DualEncoder:
        """The encoder as an ordinary module of its present weights: itself, or where it is in shards a copy on
        `device`.

        Every rank calls it, as shards come from all.
        """
        return self._copy(device, keep=True) if self._sharded else self._encoder

    def copy(self, *, keep: bool = True) -> DualEncoder:
        """A copy of the present weights in host memory, computed by the library's own layers; without weights where
        `keep` is false.

        Where the encoder is in shards every rank calls it.
        """
        return self._copy(torch.device("cpu"), keep)

    def _copy(self, device: torch.device, keep: bool) -> DualEncoder:
        encoder = copy.deepcopy(self._outline)
        if self._encoder.packed:
            encoder.pack()
        weights = whole_tensors(self._encoder.state_dict(), device, keep=keep)
        if keep:
            encoder.load_state_dict(weights, assign=True)
            encoder.to(device)  # buffers that are no part of the state
        return encoder


def whole_tensors(tensors: Mapping[str, Tensor], device: torch.device, *, keep: bool = True) -> dict[str, Tensor]:
    """Copies of the tensors on `device`, none in shards; nothing where `keep` is false.

    Where some are in shards every rank calls it, and one tensor at a time is whole on a rank that does not keep them.
    """
    whole = {}
    for name, tensor in tensors.items():
        gathered = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
        if keep:
            whole[name] = gathered.detach().to(device, copy=True).contiguous()
    return whole


def spread(tensor: Tensor, like: Tensor) -> Tensor:
    """`tensor`, the same on every rank, in shards as `like` is where the two have one shape; otherwise itself. Nothing
    is sent.
    """
    if not isinstance(like, DTensor) or tensor.shape != like.shape:
        return tensor
    return distribute_tensor(tensor.to(like.device), like.device_mesh, like.placements, src_data_rank=None)


def _shard(encoder: DualEncoder, world: World) -> None:
    if encoder.projections:
        raise ConfigError("model.name_or_path: names a model with Dense modules; expected one without them with FSDP")
    mesh = init_device_mesh(world.device.type, (world.size,))
    for tower in encoder.each_tower:
        for layer in repeated_layers(tower):
            fully_shard(layer, mesh=mesh)
        fully_shard(
            tower, mesh=mesh, reshard_after_forward=True
        )  # by default the outermost would stay whole until a backward pass
        for module in tower.modules():
            if isinstance(module, FSDPModule):
                # A sum over ranks: the loss is divided by the global number of queries already.
                module.set_gradient_divide_factor(1.0)
                module.set_force_sum_reduction_for_comms(True)

    def count(*_: object) -> None:
        if world.watch is not None:
            world.watch.enter()

    encoder.register_forward_pre_hook(count)  # a rank that stays behind in the chunks is one that the others wait for


def _outline(encoder: DualEncoder) -> DualEncoder:
    """A copy whose parameters take no memory."""
    empty = {
        id(p): nn.Parameter(torch.empty_like(p, device="meta"), requires_grad=p.requires_grad)
        for p in encoder.parameters()
    }
    return copy.deepcopy(encoder, empty)
