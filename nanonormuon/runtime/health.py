"""Whether a run is sound: losses, gradients and weights finite on every rank, gradients of the
usual size, how far an update moves the weights.

Every rank must call a function that reads other ranks' tensors, and every rank gets one answer.
"""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.nn.utils import get_total_norm
from torch.optim import Optimizer

from nanonormuon.errors import Diverged, NonFinite
from nanonormuon.runtime import distributed
from nanonormuon.runtime.faults import Stopping
from nanonormuon.storage.tensors import local

SPIKE_MEMORY = 50  # steps over which the gradient's usual norm is averaged
SPIKE_WARMUP = 20  # steps before anything counts as unusual
SPIKE_ROW = 10  # updates in a row that may be left out


@dataclass(frozen=True)
class Verdict:
    """What all ranks conclude before an update. `rank` is the first one with something amiss."""

    amiss: str  # "", "loss", "gradient" or "state" (a weight or an optimizer's buffer)
    rank: int
    stop: int  # the signal that any rank has received, 0: none
    grad_norm: float
    skip: bool = False  # leave this update out, its gradient is a spike


class BadStep(Exception):
    """A step that no rank may make: a loss, a gradient or the state is not finite somewhere."""

    def __init__(self, verdict: Verdict, loss: Tensor):
        super().__init__(f"{verdict.amiss} not finite on rank {verdict.rank}")
        self.verdict, self.loss = verdict, loss


class Guard:
    """Passes the verdict on a step, before its update."""

    def __init__(self, spikes: "Spikes", stopping: Stopping):
        self.spikes, self.stopping = spikes, stopping

    def check(self, loss: Tensor, engine: Any) -> Verdict:
        """The verdict on this rank's loss (0-d) and on an engine.Engine's gradients and state.

        Raises BadStep on every rank if any rank has a value that is not finite, unless the spike
        rule leaves the update out.
        """
        grad_norm = norm(p.grad for p in engine.model.parameters())
        verdict = judge(loss, grad_norm, engine.state(), self.stopping.number, engine.world)
        skip = verdict.amiss != "state" and self.spikes.skip(verdict.grad_norm)
        if verdict.amiss and not skip:
            raise BadStep(verdict, loss)
        return replace(verdict, skip=skip)


def norm(tensors: Iterable[Tensor | None]) -> Tensor:
    """The norm over whole tensors, wherever their shards are; 0-d, on the device."""
    total = get_total_norm([t for t in tensors if t is not None])
    return total.full_tensor() if isinstance(total, DTensor) else total


def judge(
    loss: Tensor, grad_norm: Tensor, state: Iterable[Tensor], stop: int, world: distributed.World
) -> Verdict:
    """Reduce once over ranks and read the device once, whatever there is to find.

    A sum of squares is finite if all values are (and below 1e19); it costs a memory read.
    """
    values = torch.stack(
        [loss, grad_norm, get_total_norm([local(t) for t in state if t.is_floating_point()])]
    ).float()
    flags = torch.isfinite(values).logical_not() * (world.size - world.rank)
    more = torch.stack([values[1].nan_to_num(nan=math.inf), torch.full_like(loss, stop)])
    found = torch.cat([flags, more]).float()
    if world.size > 1:
        dist.all_reduce(found, dist.ReduceOp.MAX)
    *flags, grad_size, signal = found.tolist()
    for what, flag in zip(("state", "loss", "gradient"), (flags[2], flags[0], flags[1])):
        if flag:
            return Verdict(what, world.size - int(flag), int(signal), grad_size)
    return Verdict("", 0, int(signal), grad_size)


def not_finite(tensors: Mapping[str, Tensor | None], device: torch.device) -> list[str]:
    """The names of those with a NaN or an infinity on any rank."""
    flags = [
        0.0 if t is None or bool(torch.isfinite(local(t)).all()) else 1.0 for t in tensors.values()
    ]
    return [name for name, flag in zip(tensors, distributed.largest(flags, device)) if flag]


def check_state(tensors: Mapping[str, Tensor], step: int, world: distributed.World) -> None:
    """Raise NonFinite or Diverged on every rank if these may not be saved."""
    if bad := not_finite(tensors, world.device):
        raise NonFinite(f"not finite: {bad[0]} after step {step}; it is not saved")
    check_replicas(tensors, step, world)


def check_replicas(tensors: Mapping[str, Tensor], step: int, world: distributed.World) -> None:
    """Raise Diverged on every rank, naming one that does not hold the others' bits."""
    replicated = {n: t for n, t in tensors.items() if not isinstance(t, DTensor)}
    if world.size == 1 or not replicated:
        return
    words = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    digests = [
        t.detach()
        .contiguous()
        .view(words[t.element_size()])
        .sum(dtype=torch.int64)
        .to(world.device)
        for t in replicated.values()
    ]
    everyone = distributed.gather(torch.stack(digests))  # (ranks, tensors)
    usual = everyone.mode(dim=0).values if world.size > 2 else everyone[0]
    differs = (everyone != usual).tolist()
    for rank, flags in enumerate(differs):
        if any(flags):
            names = [name for name, flag in zip(replicated, flags) if flag]
            error = Diverged(
                f"rank {rank} holds other values than {'most' if world.size > 2 else 'rank 0'} in "
                f"{len(names)} tensors after step {step}, first {names[0]}: replicas must be equal "
                "to the bit. Nothing of this was saved; suspect that machine's memory, then resume"
            )
            error.follows = rank != world.rank  # type: ignore[attr-defined]
            raise error


@dataclass
class Spikes:
    """Which updates are left out for an unusual gradient: those whose norm exceeds `factor` times
    its running mean. A function of the norms so far; what it remembers belongs to the run's state.
    """

    factor: float  # 0: none is ever left out
    mean: float = 0.0
    seen: int = 0
    skipped: int = 0
    row: int = 0  # left out one after the other

    def __post_init__(self) -> None:
        if not all(x >= 0 for x in (self.mean, self.seen, self.skipped, self.row)):
            raise ValueError(f"{self}: expected numbers of 0 or more")

    def skip(self, grad_norm: float) -> bool:
        """Whether to leave out the update with this norm, which may be infinite."""
        if self.factor and self.seen >= SPIKE_WARMUP and not grad_norm <= self.factor * self.mean:
            self.skipped, self.row = self.skipped + 1, self.row + 1
            if self.row > SPIKE_ROW:
                raise NonFinite(
                    f"{SPIKE_ROW} updates in a row had a gradient norm above {self.factor} times "
                    f"the usual {self.mean:.3g}: the run has diverged; go back to a checkpoint"
                )
            return True
        if math.isfinite(grad_norm):
            self.seen, self.row = self.seen + 1, 0
            self.mean += (grad_norm - self.mean) / min(self.seen, SPIKE_MEMORY)
        return False


# ------------------------------------------------------------------------------------------------
# What a logged row says of the hidden matrices


class WeightStats:
    """How long each neuron's weights are, and how far the last update went.

    Sums over ranks: with shards the whole, with replicas a multiple of it, of which only ratios are
    used; so the numbers are equal on every layout.
    """

    def __init__(self, optimizers: Sequence[Optimizer], device: torch.device):
        self.optimizers, self.device = optimizers, device
        self.moved = torch.zeros(2, device=device)

    def matrices(self) -> list[Tensor]:
        """What this rank holds of the hidden matrices."""
        groups = (g for optimizer in self.optimizers for g in optimizer.param_groups)
        return [local(p.detach()) for g in groups if g["role"] == "matrix" for p in g["params"]]

    @contextmanager
    def around(self, measured: bool) -> Iterator[None]:
        """Measure the update made in this block, decay included, if a row will report it."""
        before = [p.clone() for p in self.matrices()] if measured else None
        yield
        if before is not None:  # nothing here waits for the device
            size = squares(before)
            torch._foreach_sub_(before, self.matrices())
            self.moved = torch.stack([squares(before), size])

    def row(self) -> dict[str, float]:
        """The numbers for a row, of all hidden matrices together; every rank must call this.

        neuron_rms_min, _mean, _max: root mean square of a neuron's weights. update_ratio: the norm
        of the last update over the norm of the weights before it, the "update to data ratio" of
        Karpathy's makemore lectures; unlike the update's own size, which Muon and NorMuon all but
        fix, it says whether the rate fits the weights. 0 for an update that was left out.
        """
        matrices, moved = self.matrices(), self.moved
        self.moved = torch.zeros_like(moved)
        norms = torch.cat(
            [torch.linalg.vector_norm(p, dim=-1).flatten() / p.size(-1) ** 0.5 for p in matrices]
        )
        low, high = (
            (float(norms.min()), float(norms.max())) if len(norms) else (math.inf, -math.inf)
        )
        low, high = distributed.largest([-low, high], self.device)
        count = norms.new_tensor(float(len(norms)))
        sums = distributed.total(torch.stack([norms.sum(), count, *moved]))
        total, n, update, weights = sums.tolist()
        return {
            "neuron_rms_min": -low,
            "neuron_rms_mean": total / n,
            "neuron_rms_max": high,
            "update_ratio": math.sqrt(update / weights) if weights else 0.0,
        }


def squares(tensors: Sequence[Tensor]) -> Tensor:
    return torch.stack([torch.linalg.vector_norm(t) for t in tensors]).square().sum()
