"""One network over several processes: FSDP2 (torch's fully_shard), and whole tensors back from it.

Every process holds a part of each weight, gradient and moment of the autoencoder. Weights of a block are gathered just
before it runs and let go after it; gradients are summed and parted again as the backward pass leaves a block.

The contrastive head stays whole in every process (DDP): beside ViT-L it has less than 1 % of the weights, and FSDP
takes no scalar such as its temperature.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from tgmae.config.run import TrainConfig
from tgmae.model.videomae import VideoMAE
from tgmae.training.parallel import World

# torch.distributed.tensor takes a second to import, so that only what shards imports it.


def shares_network(config: TrainConfig, world: World) -> bool:
    """Return whether each process holds only a part of the network. One alone has nobody to share it with."""
    return config.parallel == "fsdp" and world.size > 1


def shard(mae: VideoMAE, world: World, use_bf16: bool) -> None:
    """Leave each process its part of the autoencoder, in place. Its weights must be equal in all processes.

    With bf16 a block's weights are gathered in bfloat16, and gradients are summed in float32. Every process must call
    it, and from then on run forward and backward as often as the others.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    mesh = init_device_mesh(world.device.type, (world.size,))
    # Autocast decides what is computed in bfloat16, as without FSDP: tokens between the blocks stay float32.
    half = MixedPrecisionPolicy(torch.bfloat16, torch.float32, cast_forward_inputs=False)
    policy = half if use_bf16 else MixedPrecisionPolicy(cast_forward_inputs=False)
    # What does not run stays whole: a decoder beside a contrastive loss alone. FSDP has no gradients to add up there.
    unused = {weight for weight in mae.parameters() if not weight.requires_grad}
    for part in (*(block for block in mae.blocks if unused.isdisjoint(block.parameters())), mae):
        # Also the root lets go: kept after a validation, its weights would be those of before the next step.
        fully_shard(part, mesh=mesh, reshard_after_forward=True, mp_policy=policy, ignored_params=unused)


def exchange_gradients(mae: VideoMAE, exchange: bool) -> None:
    """Let a sharded network's backward pass sum the gradients of all processes, or keep them until one that does."""
    mae.set_requires_gradient_sync(exchange)  # type: ignore[operator]  # of FSDPModule, which `shard` has made of it


def is_sharded(tensor: Tensor) -> bool:
    """Return whether a tensor is a DTensor, of which this process holds a part."""
    return hasattr(tensor, "full_tensor")


def gather(tensor: Tensor) -> Tensor:
    """Return the whole tensor. Every process must call it."""
    if not is_sharded(tensor):
        return tensor
    whole: Tensor = tensor.full_tensor()  # type: ignore[attr-defined]
    return whole


def gather_weights(weights: Mapping[str, Tensor], world: World) -> dict[str, Tensor]:
    """Return whole weights by name: on the main process's CPU where they are sharded. Every process must call it."""
    if not any(map(is_sharded, weights.values())):
        return dict(weights)
    whole: dict[str, Tensor] = {}
    for name, weight in weights.items():  # one at a time, so that no GPU holds them all
        gathered = gather(weight)
        if world.is_main:
            whole[name] = gathered.cpu()
    return whole


def place_like(ours: Tensor, whole: Tensor) -> Tensor:
    """Return the part of a whole tensor that this process holds where it holds a part of `ours`, of the same shape.

    Else return the whole.
    """
    if not is_sharded(ours) or whole.shape != ours.shape:
        return whole
    from torch.distributed.tensor import DTensor, distribute_tensor

    assert isinstance(ours, DTensor)
    mesh = ours.device_mesh
    # Without a source every process takes its part of its own copy, and nothing is sent.
    return distribute_tensor(whole.to(mesh.device_type), mesh, ours.placements, src_data_rank=None)
