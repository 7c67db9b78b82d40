"""train.canonical: the same weights, bit by bit, on any number of ranks that divides the batch.

Rounding depends on the order of sums, so every sum has one order: micro-batches of a fixed size are
dealt out to the ranks in turn and added up one after the other by their number in the batch,
wherever they were computed; then every rank makes the whole update. What FSDP2 shards is sharded
between the steps: for the update each rank takes it up whole, as one process would resume it from a
checkpoint, steps, and keeps its rows. Whole gradients are sent for every micro-batch, whole states
for every update: this is for comparisons, not for speed.
"""

from collections.abc import Callable, Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer

from nanonormuon.normuon import NorMuon, OneProcess
from nanonormuon.storage.tensors import placed_like, whole


class Canonical:
    """The sum over the micro-batches of a step on `size` ranks, and the update that follows.

    model: plain, or sharded by FSDP2 without mixed precision, which casts where the model does not.
    make: from a model to its optimizers, which are then at `optimizers`.
    """

    def __init__(
        self, model: nn.Module, make: Callable[[nn.Module], Sequence[Optimizer]], size: int
    ):
        torch.set_num_threads(1)  # how a product is cut among threads decides its rounding too
        self.model, self.size, self.make = model, size, lambda: [alone(o) for o in make(model)]
        self.parameters, self.optimizers = list(model.parameters()), self.make()
        self.sums: list[Tensor] = []
        self.sharded = [m for m in model.modules() if hasattr(m, "unshard")]
        for module in self.sharded:  # whole parameters stay, with this rank's whole gradients
            module.set_reshard_after_backward(False, recurse=False)

    def add(self) -> None:
        """After a micro-batch's backward pass: add its gradients and then the other ranks'."""
        if self.size == 1:
            return  # autograd adds in just this order
        for i, p in enumerate(self.model.parameters()):
            pieces = [torch.empty_like(p) for _ in range(self.size)]
            dist.all_gather(pieces, p.grad)
            if i == len(self.sums):
                self.sums.append(pieces.pop(0))
            for piece in pieces:
                self.sums[i] += piece
            p.grad = None

    def finish(self) -> None:
        """After the last one: the sums become the gradients."""
        for p, total in zip(self.model.parameters(), self.sums):
            p.grad = total
        self.sums = []

    @torch.no_grad()
    def update(self, skip: bool) -> None:
        """The optimizers' step, unless it is left out; gradients go, shards are shards again."""
        acting = self.make() if self.sharded else self.optimizers
        for one, kept in zip(acting if not skip else (), self.optimizers):
            if one is kept:
                kept.step()
                continue
            pass_on(kept, one)
            one.step()
            pass_on(one, kept)
        self.model.zero_grad(set_to_none=True)
        for p, w in zip(self.parameters, list(self.model.parameters())):
            if p is not w:
                p.copy_(placed_like(w.detach(), p))
        for module in self.sharded:
            module.reshard()


def alone(optimizer: Optimizer) -> Optimizer:
    """Have every rank make the whole update: in a stack of fewer matrices a product could round
    otherwise."""
    if isinstance(optimizer, NorMuon):
        for bucket in optimizer.buckets:
            bucket.layout = OneProcess()
    return optimizer


def pass_on(source: Optimizer, target: Optimizer) -> None:
    """Rates and buffers from one optimizer to its like of another layout; every rank takes part."""
    content = source.state_dict()
    params = [p for group in target.param_groups for p in group["params"]]
    for i, state in content["state"].items():
        p, content["state"][i] = params[i], {}
        for key, value in ((k, whole(v)) for k, v in state.items()):
            like = target.state[p].get(key, p if value.shape == p.shape else value)
            content["state"][i][key] = placed_like(value, like)
    target.load_state_dict(content)
