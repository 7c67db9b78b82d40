"""Backward passes and updates on one process, under DDP and under FSDP2.

An engine owns the model, its optimizers and gradients. The loop calls `accumulate`, `clip`,
`update` and `zero_grad` and does not know the layout. runtime/bitwise.py has an engine whose bits
do not depend on the number of ranks, runtime/compilation.py compiles one.
"""

import inspect
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from nanonormuon.model import GPT
from nanonormuon.runtime import distributed
from nanonormuon.runtime.distributed import World
from nanonormuon.runtime.memory import together

Make = Callable[[nn.Module], list[Optimizer]]


class Engine:
    """A model in training.

    model: on its device. make: makes a model's optimizers. parallel: "ddp", or "fsdp" or "hsdp" for
    FSDP2, which turns the model's parameters into DTensors in place. dtype: FSDP2's compute dtype.
    reshard: under FSDP2, free a block's gathered weights after its forward pass. grad_clip: maximum
    gradient norm; 0: no clipping. qk_clip: see runtime/qk_clip.py.
    """

    dealt = False  # see data.Loader

    def __init__(
        self,
        model: GPT,
        make: Make,
        world: World,
        parallel: str = "ddp",
        dtype: torch.dtype | None = torch.float32,
        reshard: bool = True,
        grad_clip: float = 0.0,
        qk_clip: float = 0.0,
    ):
        self.model, self.world, self.grad_clip = model, world, grad_clip
        self.replica: nn.Module = model
        self.sharded = parallel in ("fsdp", "hsdp") and distributed.grouped()
        self.mesh = grid(world, parallel) if self.sharded else None
        # whether a rank that runs out of memory in a forward pass cannot notify the others
        self.lockstep = world.size == 1 or self.sharded or self.dealt
        self.extras: list[Any] = []  # what few runs need in every step
        if qk_clip:
            from nanonormuon.runtime.qk_clip import QkClip

            self.extras.append(QkClip(model, qk_clip, world.device))
        if model.config.mlp == "experts":
            from nanonormuon.runtime.expert_load import ExpertLoad

            self.extras.append(ExpertLoad(model, world))
        self.distribute(dtype, reshard)
        self.forward: Callable[..., Tensor] = self.replica  # or its compiled form
        self.optimizers = make(model)

    def distribute(self, dtype: torch.dtype | None, reshard: bool) -> None:
        """Shard or replicate the model if there are other ranks."""
        if self.sharded:
            shard(self.model, self.mesh, dtype, reshard)
        elif distributed.grouped():
            known = inspect.signature(DistributedDataParallel).parameters
            new, old = "forward_sync_buffers", "broadcast_buffers"  # renamed in torch 2.13
            unsynced = {new if new in known else old: False}
            self.replica = DistributedDataParallel(
                self.model, gradient_as_bucket_view=True, **unsynced
            )
            self.replica.require_backward_grad_sync = False  # see sync

    @property
    def evaluate(self) -> Callable[..., Tensor]:
        """The forward pass without DDP's hooks, compiled if training is."""
        return self.model if self.forward is self.replica else self.forward

    def state(self) -> list[Tensor]:
        """Return this rank's weights and optimizer buffers."""
        states = (s for optimizer in self.optimizers for s in optimizer.state.values())
        buffers = (t for state in states for t in state.values())
        return [*self.model.parameters(), *(t for t in buffers if isinstance(t, Tensor))]

    def accumulate(self, micro_batches: Iterator[tuple[Tensor, Tensor]], count: int) -> Tensor:
        """Add up the gradients of `count` micro-batches; returns this rank's mean loss (0-d).

        Replicas communicate only in the last backward pass. Before it, a rank that runs out of
        memory can notify the others (memory.together), which would otherwise wait for it there.
        """
        mean = torch.zeros((), device=self.world.device)
        for extra in self.extras:
            extra.begin()

        def forward() -> Tensor:
            part = self.forward(*next(micro_batches)) / count
            for extra in self.extras:
                extra.add(count)
            return part

        def backward(part: Tensor) -> None:
            self.backward(part)
            mean.add_(part.detach())

        def up_to_the_last() -> Tensor:
            for _ in range(count - 1):
                backward(forward())
            return forward()

        self.sync(False)
        last = together(up_to_the_last, alone=self.lockstep)
        self.sync(True)
        backward(last)
        for extra in self.extras:
            extra.finish()
        return mean

    def backward(self, part: Tensor) -> None:
        """Add a micro-batch's share of the gradient."""
        part.backward()

    def sync(self, on: bool) -> None:
        """Choose whether the next backward pass averages gradients over ranks.

        Called after the forward pass, because ranks may still agree to leave out the backward pass,
        and DDP cannot undo its preparation.
        """
        if self.sharded:
            self.model.set_requires_gradient_sync(on)  # type: ignore[attr-defined]
        elif on and isinstance(self.replica, DistributedDataParallel):
            self.replica.reducer.prepare_for_backward([])  # as its own forward pass does

    def clip(self, norm: float) -> None:
        """Scale gradients of the given norm down to grad_clip."""
        if self.grad_clip:
            grads = [p.grad for p in self.model.parameters() if p.grad is not None]
            scale = self.grad_clip / torch.tensor(norm, device=self.world.device)
            torch._foreach_mul_(grads, scale.clamp(max=1.0))

    def update(self) -> None:
        """Step the optimizers, then apply QK-clip and move the routers' biases."""
        for optimizer in self.optimizers:
            optimizer.step()
        for extra in self.extras:
            extra.apply()

    def zero_grad(self) -> None:
        """Drop the gradients."""
        self.model.zero_grad(set_to_none=True)


def grid(world: World, parallel: str) -> DeviceMesh:
    """Arrange all ranks as one dimension, or for "hsdp" as nodes x ranks of a node."""
    n = distributed.shards(parallel)
    shape = (world.size,) if parallel == "fsdp" else (world.size // n, n)
    names = ("replicate", "shard")[-len(shape) :]
    # without a mesh FSDP2 would use the machine's GPUs even if device = cpu
    return init_device_mesh(world.device.type, shape, mesh_dim_names=names)


def shard(model: GPT, mesh: DeviceMesh, dtype: torch.dtype | None, reshard: bool) -> None:
    """Shard a model in place with FSDP2, block by block (`model.layers`), over a mesh from `grid`.

    dtype: of computation, with gradients reduced in float32; None: both as in the model, which
    casts activations itself. FSDP2 shards only tensors of one dtype together, so an embedding in
    another dtype is a block of its own, and so is a router, which computes in float32.
    """
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    reduced = dtype and torch.float32
    policy = MixedPrecisionPolicy(dtype, reduced, cast_forward_inputs=False)
    exact = MixedPrecisionPolicy(None, reduced, cast_forward_inputs=False)
    for router in (m for m in model.modules() if hasattr(m, "rebalance")):
        fully_shard(router, mesh=mesh, mp_policy=exact, reshard_after_forward=reshard)
    mixed = len({p.dtype for p in model.parameters()}) > 1
    for block in [*model.layers, *([model.embed_tokens] if mixed else []), model]:
        fully_shard(block, mesh=mesh, mp_policy=policy, reshard_after_forward=reshard)
