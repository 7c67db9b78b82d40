"""train.canonical: an engine whose bits do not depend on the number of ranks."""

import os
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.optim import Optimizer

from nanonormuon.engine import Engine, Make
from nanonormuon.model import GPT
from nanonormuon.normuon import OneProcess
from nanonormuon.runtime.distributed import World


class Bitwise(Engine):
    """Makes bitwise equal weights on any number of ranks that divides the batch.

    Rounding depends on the order of sums, so micro-batches of a fixed size are dealt out to the
    ranks in turn and added up by their index in the batch; then every rank makes the whole update.
    That needs whole weights, gradients and buffers on every rank, so replicas serve for every
    `parallel`. Every micro-batch sends whole gradients, so this mode is slow.
    """

    dealt = True

    def __init__(self, model: GPT, make: Make, world: World, parallel: str = "ddp", **more: Any):
        torch.set_num_threads(1)  # splitting a matmul among threads changes its rounding
        # on a GPU, so do the order of atomic additions (as in attention's backward pass) and the
        # kernels that a compiler selects by timing
        torch.use_deterministic_algorithms(True)
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        super().__init__(model, lambda model: unshared(make(model)), world, "ddp", **more)
        self.sums: list[Tensor] = []

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


def unshared(optimizers: list[Optimizer]) -> list[Optimizer]:
    """Make every rank iterate all matrices: a smaller stack could be rounded differently."""
    for optimizer in optimizers:
        for bucket in getattr(optimizer, "buckets", ()):  # NorMuon's, and some of the zoo's
            bucket.layout = OneProcess()
    return optimizers
