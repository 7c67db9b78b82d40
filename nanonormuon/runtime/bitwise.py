"""train.canonical: an engine whose bits do not depend on the number of ranks."""

import os
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.optim import Optimizer

from nanonormuon.engine import Engine, Make, shard
from nanonormuon.model import GPT
from nanonormuon.normuon import OneProcess
from nanonormuon.runtime.distributed import World
from nanonormuon.storage.tensors import as_buffer, placed_like, whole


class Bitwise(Engine):
    """Makes bitwise equal weights on any number of ranks that divides the batch.

    Rounding depends on the order of sums, so micro-batches of a fixed size are dealt out to the
    ranks in turn and added up by their index in the batch; then every rank makes the whole update.
    Under FSDP2, each rank gathers weights and optimizer state for the update and keeps its rows.
    Every micro-batch sends whole gradients and every update whole states, so this mode is slow.
    """

    dealt = True

    def __init__(self, model: GPT, make: Make, world: World, parallel: str = "ddp", **more: Any):
        torch.set_num_threads(1)  # splitting a matmul among threads changes its rounding
        # on a GPU, so do the order of atomic additions (as in attention's backward pass) and the
        # kernels that a compiler selects by timing
        torch.use_deterministic_algorithms(True)
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        self.make: Make = lambda model: [unshared(optimizer) for optimizer in make(model)]
        super().__init__(model, self.make, world, parallel, **more)
        self.parameters = list(model.parameters())  # as sharded between steps
        self.sums: list[Tensor] = []

    def distribute(self, dtype: torch.dtype | None, reshard: bool) -> None:
        # dtype None: FSDP2's mixed precision would cast where the model does not
        if self.sharded:
            shard(self.model, self.mesh, None, reshard)
            for module in self.shards():  # keep gathered parameters and their local gradients
                module.set_reshard_after_backward(False, recurse=False)

    def shards(self) -> list[Any]:
        return [module for module in self.model.modules() if hasattr(module, "unshard")]

    def sync(self, on: bool) -> None:
        super().sync(False)

    def backward(self, part: Tensor) -> None:
        (part / self.world.size).backward()
        if self.world.size == 1:
            return  # autograd adds in this order
        for i, p in enumerate(self.model.parameters()):
            pieces = [torch.empty_like(p) for _ in range(self.world.size)]
            dist.all_gather(pieces, p.grad)
            if i == len(self.sums):
                self.sums.append(pieces.pop(0))
            for piece in pieces:
                self.sums[i] += piece
            p.grad = None

    def accumulate(self, micro_batches: Iterator[tuple[Tensor, Tensor]], count: int) -> Tensor:
        loss = super().accumulate(micro_batches, count)
        for p, total in zip(self.model.parameters(), self.sums):
            p.grad = total
        self.sums = []
        return loss

    @torch.no_grad()
    def step(self) -> None:
        if not self.sharded:
            super().step()
            return
        for acting, kept in zip(self.make(self.model), self.optimizers):
            pass_on(kept, acting)
            acting.step()
            pass_on(acting, kept)

    @torch.no_grad()
    def zero_grad(self) -> None:
        super().zero_grad()
        for p, w in zip(self.parameters, list(self.model.parameters())):
            if p is not w:
                p.copy_(placed_like(w.detach(), p))
        for module in self.shards():
            module.reshard()


def unshared(optimizer: Optimizer) -> Optimizer:
    """Make every rank iterate all matrices: a smaller stack could be rounded differently."""
    for bucket in getattr(optimizer, "buckets", ()):  # NorMuon's, and some of the zoo's
        bucket.layout = OneProcess()
    return optimizer


def pass_on(source: Optimizer, target: Optimizer) -> None:
    """Copy settings and state to an optimizer of another layout; every rank must call this."""
    content = source.state_dict()
    params = [p for group in target.param_groups for p in group["params"]]
    for i, state in content["state"].items():
        content["state"][i] = {
            key: as_buffer(whole(value), target, params[i], key) for key, value in state.items()
        }
    target.load_state_dict(content)
