"""Checks of a run: finite losses, gradients and weights on every rank, equal replicas, gradient
spikes; and the size of updates relative to the weights.

Every rank must call the functions that communicate, and all get equal results.
"""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
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

SPIKE_MEMORY = 50  # steps over which the gradient norm is averaged
SPIKE_WARMUP = 20  # steps before any update is skipped
SPIKE_ROW = 10  # updates in a row that may be skipped


@dataclass(frozen=True)
class Verdict:
    """The decision of all ranks before an update."""

    amiss: str  # what is not finite: "", "loss", "gradient" or "state" (weights and buffers)
    rank: int  # the first rank where it is not finite
    stop: int  # a signal that any rank has received; 0: none
    grad_norm: float
    skip: bool = False  # whether to skip the update as a gradient spike


class BadStep(Exception):
    """Loss, gradients or state are not finite on some rank: no rank may make the update."""

    def __init__(self, verdict: Verdict, loss: Tensor):
        super().__init__(f"{verdict.amiss} not finite on rank {verdict.rank}")
        self.verdict, self.loss = verdict, loss


def norm(tensors: Iterable[Tensor | None]) -> Tensor:
    """Return the total norm of tensors, sharded or not; 0-d, on the device."""
    total = get_total_norm([t for t in tensors if t is not None])
    return total.full_tensor() if isinstance(total, DTensor) else total


def judge(loss: Tensor, engine: Any, spikes: "Spikes", stopping: Stopping) -> Verdict:
    """Decide on all ranks whether to make an update, with one reduction over ranks and one transfer
    from the device. Raises BadStep on every rank if any value is not finite, unless the update is
    skipped as a spike.

    loss: this rank's (0-d). engine: an engine.Engine, with its gradients and state. stopping: has
    the signal that this rank has received. All values of the state are finite if their norm is;
    the converse fails only above 1e19.
    """
    world, grad_norm = engine.world, norm(p.grad for p in engine.model.parameters())
    state_norm = get_total_norm([local(t) for t in engine.state() if t.is_floating_point()])
    values = torch.stack([state_norm, loss, grad_norm]).float()
    flags = torch.isfinite(values).logical_not() * (world.size - world.rank)
    more = torch.stack([values[2].nan_to_num(nan=math.inf), torch.full_like(loss, stopping.number)])
    found = torch.cat([flags, more]).float()
    if world.size > 1:
        dist.all_reduce(found, dist.ReduceOp.MAX)
    *flags, grad_size, signal = found.tolist()
    odd = [(n, f) for n, f in zip(("state", "loss", "gradient"), flags) if f]
    amiss, flag = odd[0] if odd else ("", world.size)
    skip = amiss != "state" and spikes.skip(grad_size)
    verdict = Verdict(amiss, world.size - int(flag), int(signal), grad_size, skip)
    if amiss and not skip:
        raise BadStep(verdict, loss)
    return verdict


def not_finite(tensors: Mapping[str, Tensor | None]) -> list[str]:
    """Name the tensors that contain NaN or infinity on any rank."""
    flags = [t is not None and not local(t).isfinite().all() for t in tensors.values()]
    return [name for name, flag in zip(tensors, distributed.largest(flags)) if flag]


def check_state(tensors: Mapping[str, Tensor], step: int, world: distributed.World) -> None:
    """Raise on every rank if tensors must not be saved: NonFinite, or Diverged, naming a rank."""
    if bad := not_finite(tensors):
        raise NonFinite(f"not finite: {bad[0]} after step {step}; it is not saved")
    words = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    for n in sorted({pieces(t) for t in tensors.values()} - {world.size}):
        copied = {name: local(t.detach()) for name, t in tensors.items() if pieces(t) == n}
        bits = (t.contiguous().view(words[t.element_size()]) for t in copied.values())
        digests = torch.stack([b.sum(dtype=torch.int64).to(world.device) for b in bits])
        copies = distributed.gather(digests).unflatten(0, (-1, n))  # (copies, pieces, tensors)
        usual = copies.mode(dim=0).values if len(copies) > 2 else copies[0]
        for rank, flags in enumerate((copies != usual).flatten(0, 1).tolist()):
            if names := [name for name, flag in zip(copied, flags) if flag]:
                other = "most" if len(copies) > 2 else f"rank {rank % n}"
                what = f"in {len(names)} tensors after step {step}, first {names[0]}"
                advice = "This state was not saved; check that machine's memory, then resume"
                why = f"replicas must be bitwise equal. {advice}"
                error = Diverged(f"rank {rank} differs from {other} {what}: {why}")
                error.follows = rank != world.rank  # type: ignore[attr-defined]
                raise error


def pieces(t: Tensor) -> int:
    """Return the number of consecutive ranks that share one copy of a tensor."""
    places = zip(t.device_mesh.shape, t.placements) if isinstance(t, DTensor) else ()
    return math.prod(n for n, place in places if not place.is_replicate())


@dataclass
class Spikes:
    """Decides to skip updates whose gradient norm exceeds `factor` times its running mean. Depends
    only on earlier norms; the fields are saved with the run's state."""

    factor: float  # 0: never skip
    mean: float = 0.0
    seen: int = 0
    skipped: int = 0
    row: int = 0  # updates skipped since the last one made

    def __post_init__(self) -> None:
        if not all(x >= 0 for x in (self.mean, self.seen, self.skipped, self.row)):
            raise ValueError(f"{self}: expected numbers of 0 or more")

    def skip(self, grad_norm: float) -> bool:
        """Whether to skip the update with this gradient norm, which may be infinite."""
        if self.factor and self.seen >= SPIKE_WARMUP and not grad_norm <= self.factor * self.mean:
            self.skipped, self.row = self.skipped + 1, self.row + 1
            if self.row > SPIKE_ROW:
                spikes = f"{SPIKE_ROW} updates in a row had a gradient norm above {self.factor}"
                advice = "the run has diverged; go back to a checkpoint"
                raise NonFinite(f"{spikes} times the average {self.mean:.3g}: {advice}")
            return True
        if math.isfinite(grad_norm):
            self.seen, self.row = self.seen + 1, 0
            self.mean += (grad_norm - self.mean) / min(self.seen, SPIKE_MEMORY)
        return False


class WeightStats:
    """Metrics of the hidden matrices: the size of weights and of the last update.

    Sums over ranks count shards once and replicas several times, but the metrics are ratios of
    sums, so they are equal in every layout.
    """

    def __init__(self, optimizers: Sequence[Optimizer], device: torch.device):
        self.optimizers = optimizers
        self.moved = torch.zeros(2, device=device)  # squared norms: of the update, of the weights

    def matrices(self) -> list[Tensor]:
        """Return this rank's shards or replicas of the hidden matrices."""
        groups = (g for optimizer in self.optimizers for g in optimizer.param_groups)
        return [local(p.detach()) for g in groups if g["role"] == "matrix" for p in g["params"]]

    @contextmanager
    def around(self, measured: bool) -> Iterator[None]:
        """Measure the update made in this block, including weight decay, if `measured`."""
        before = [p.clone() for p in self.matrices()] if measured else None
        yield
        if before is not None:  # nothing here waits for the device
            size = squares(before)
            torch._foreach_sub_(before, self.matrices())
            self.moved = torch.stack([squares(before), size])

    def row(self) -> dict[str, float]:
        """Return metrics; every rank must call this.

        neuron_rms_min, _mean, _max: root mean square of a neuron's weights. update_ratio: the norm
        of the last update over that of the weights before it, 0 for a skipped update: the "update
        to data ratio" of Karpathy's makemore lectures, which shows whether the learning rate fits
        the weights. (The update's own norm hardly varies with Muon and NorMuon.)
        """
        matrices, moved = self.matrices(), self.moved
        self.moved = torch.zeros_like(moved)
        sizes = ((torch.linalg.vector_norm(p, dim=-1).flatten(), p.size(-1)) for p in matrices)
        norms = torch.cat([size / width**0.5 for size, width in sizes])
        empty = [-math.inf, -math.inf]  # a shard may be
        extremes = [-float(norms.min()), float(norms.max())] if len(norms) else empty
        low, high = distributed.largest(extremes)
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
