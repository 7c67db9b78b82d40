"""Whether what a run computes with is sound: finite on every rank, equal on all replicas.

Every function that reads other ranks' tensors must be called by all of them, and tells all the
same.
"""

import math
import shlex
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.utils import get_total_norm

from nanonormuon.checkpoint import named_state
from nanonormuon.errors import Diverged, NonFinite
from nanonormuon.runtime import distributed
from nanonormuon.storage.tensors import local

SPIKE_MEMORY = 50  # steps over which the gradient's usual norm is averaged
SPIKE_WARMUP = 20  # steps before anything counts as unusual
SPIKE_ROW = 10  # updates in a row that may be left out


@dataclass(frozen=True)
class Verdict:
    """What all ranks conclude before an update. `rank` is the first one with something amiss."""

    amiss: str  # "", "loss", "gradient" or "state" (a weight or an optimizer's buffer)
    rank: int
    stop: int  # the signal that any rank has had
    grad_norm: float


def norm(tensors: Iterable[Tensor | None]) -> Tensor:
    """The norm over whole tensors, wherever their shards are; 0-d, on the device."""
    total = get_total_norm([t for t in tensors if t is not None])
    return total.full_tensor() if isinstance(total, DTensor) else total


def judge(
    loss: Tensor, grad_norm: Tensor, state: Iterable[Tensor], stop: int, world: distributed.World
) -> Verdict:
    """One reduction and one read of the device per step, whatever there is to find.

    A sum of squares is finite if all values are (and below 1e19); it costs a memory read.
    """
    values = torch.stack(
        [loss, grad_norm, get_total_norm([local(t) for t in state if t.is_floating_point()])]
    ).float()
    flags = torch.isfinite(values).logical_not() * (world.size - world.rank)
    told = torch.stack([values[1].nan_to_num(nan=math.inf), torch.full_like(loss, stop)])
    *flags, size, signal = distributed.largest(torch.cat([flags, told]), world.device)
    for what, flag in zip(("state", "loss", "gradient"), (flags[2], flags[0], flags[1])):
        if flag:
            return Verdict(what, world.size - int(flag), int(signal), size)
    return Verdict("", 0, int(signal), size)


def not_finite(tensors: Mapping[str, Tensor | None], device: torch.device) -> list[str]:
    """The names of those with a NaN or an infinity on any rank."""
    flags = [
        0.0 if t is None or bool(torch.isfinite(local(t)).all()) else 1.0 for t in tensors.values()
    ]
    return [name for name, flag in zip(tensors, distributed.largest(flags, device)) if flag]


def group_norms(
    optimizers: Iterable[torch.optim.Optimizer], weights: Mapping[str, Tensor]
) -> dict[str, dict[str, float]]:
    """Per role, the norms of the named weights and of their gradients."""
    return {
        group["role"]: {
            "weights": float(norm(weights[name] for name in group["names"])),
            "gradients": float(norm(weights[name].grad for name in group["names"])),
        }
        for optimizer in optimizers
        for group in optimizer.param_groups
    }


def crash_report(
    verdict: Verdict,
    loss: Tensor,
    model: nn.Module,
    optimizers: Sequence[torch.optim.Optimizer],
    world: distributed.World,
) -> dict[str, Any]:
    """What there is to know of a step that was refused, before its gradients are gone."""
    weights, buffers = named_state(model, optimizers)
    grads = {name: p.grad for name, p in weights.items()}
    of_state = verdict.amiss == "state"
    losses = torch.zeros(world.size, device=world.device)
    losses[world.rank] = loss
    return {
        "amiss": verdict.amiss,
        "rank": verdict.rank,
        "ranks": world.size,
        "not_finite": not_finite(weights | buffers if of_state else grads, world.device),
        "loss_by_rank": [repr(x) for x in distributed.total(losses).tolist()],
        "groups": group_norms(optimizers, weights),
    }


def explain(
    report: Mapping[str, Any], weights: Iterable[str], per_rank: int, saved: int, run: Path
) -> str:
    """A crash report as one line, with what to do. weights: their names; saved: the step of the
    last checkpoint."""
    step, bad = report["step"], report["not_finite"]
    of_state = report["amiss"] == "state"
    what = f"the {report['amiss']} of step {step}"
    if of_state:
        kind = "weight" if bad and bad[0] in set(weights) else "buffer"
        what = f"a {kind} before step {step}"
    where = f"first in {bad[0]} of {len(bad)} tensors" if bad else "in no gradient"
    first = per_rank * report["rank"]
    advice = (
        f"go on from the last checkpoint ({saved})"
        if of_state
        else "repeat just this step with: normuon-train run --resume --out "
        f"{shlex.quote(str(run))} train.stop_at={step + 1}; go past it with train.skip_spikes, or "
        "start anew with a lower optim.lr and auxiliary rates, or optim.grad_clip"
    )
    return (
        f"not finite: {what} (rank {report['rank']}, sequences {first} to {first + per_rank - 1} "
        f"of the batch), {where}. No update was made; see crash-{step:06d}.json; {advice}"
    )


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
