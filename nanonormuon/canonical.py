"""train.canonical: the same weights, bit by bit, on any number of ranks that divides the batch.

Rounding depends on the order of sums, so every sum has one order: micro-batches of a fixed size are
dealt out to the ranks in turn and added up one after the other by their number in the batch,
wherever they were computed; then every rank makes the whole update. Whole gradients are sent for
every micro-batch: this is for comparisons, not for speed. Replicas only: FSDP2 hands out no
gradient of a single micro-batch before it is summed over ranks.
"""

from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch import Tensor, nn

from nanonormuon.normuon import Alone, NorMuon


class Canonical:
    """The sum over the micro-batches of a step, on `size` ranks."""

    def __init__(self, model: nn.Module, optimizers: Iterable[torch.optim.Optimizer], size: int):
        torch.set_num_threads(1)  # how a product is cut among threads decides its rounding too
        self.parameters, self.size = list(model.parameters()), size
        self.sums: list[Tensor] = []
        for optimizer in optimizers:  # a stack of fewer matrices could round otherwise
            if isinstance(optimizer, NorMuon):
                optimizer.buckets = [
                    tuple(Alone() if isinstance(part, Alone) else part for part in bucket)
                    for bucket in optimizer.buckets
                ]

    def add(self) -> None:
        """After a micro-batch's backward pass: add its gradients and then the other ranks'."""
        if self.size == 1:
            return  # autograd adds in just this order
        for i, p in enumerate(self.parameters):
            pieces = [torch.empty_like(p) for _ in range(self.size)]
            dist.all_gather(pieces, p.grad)
            if i == len(self.sums):
                self.sums.append(pieces.pop(0))
            for piece in pieces:
                self.sums[i] += piece
            p.grad = None

    def finish(self) -> None:
        """After the last one: the sums become the gradients."""
        for p, total in zip(self.parameters, self.sums):
            p.grad = total
        self.sums = []
