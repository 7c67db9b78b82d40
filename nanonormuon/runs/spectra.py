"""The singular values and row norms of each matrix's momentum, of Muon's update and of NorMuon's,
from a checkpoint (figure 1 of arXiv 2510.05491).

Muon makes the singular values equal, but not the neurons' norms; NorMuon makes both equal. The
updates are those of a step along the momentum, since a checkpoint has no gradient for Nesterov's
look-ahead. A model directory has weights alone.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nanonormuon import optim
from nanonormuon.errors import CheckpointError, UsageError
from nanonormuon.normuon import coefficients, neuron_factors, newton_schulz
from nanonormuon.pretrained import models
from nanonormuon.runs.pictures import picture
from nanonormuon.storage.files import progress
from nanonormuon.storage.run import aligned
from nanonormuon.storage.tensors import read_tensors


@dataclass(frozen=True)
class Profile:
    """Singular values (descending) and row norms of a momentum or update, both divided by their
    root mean square: a perfectly even update has 1 everywhere."""

    singular_values: Tensor
    row_norms: Tensor

    @classmethod
    def of(cls, X: Tensor) -> "Profile":
        X = X.detach().float()
        if not X.isfinite().all():  # though weights and buffers are
            raise CheckpointError("an update is not finite: no run has saved such a momentum")
        s, r = torch.linalg.svdvals(X), torch.linalg.vector_norm(X, dim=1)
        return cls(*(t / t.square().mean().sqrt().clamp_min(1e-30) for t in (s, r)))

    def numbers(self) -> dict[str, float]:
        """stable_rank: sum of the singular values' squares over the largest square and their count.
        row_spread: standard deviation of the row norms over their mean."""
        s, r = self.singular_values, self.row_norms
        stable = float(s.square().sum() / s[0].square().clamp_min(1e-30)) / len(s)
        spread = float(r.std(correction=0) / r.mean().clamp_min(1e-30))
        return {"stable_rank": stable, "row_spread": spread}


def diagnose(path: Path) -> dict[str, dict[str, Profile]]:
    """Profile each hidden matrix of a run's newest checkpoint: "momentum" (of AdamW, the first
    moment), "muon" and, if the run kept second moments, "normuon"; of a model directory's matrices
    the "weights". A stack of experts is profiled as NAME.0 and so on. Raises CheckpointError."""
    found = models.find_checkpoint(path)
    state = models.state_of(found)
    model = models.load_model(found, torch.float32, torch.device("cpu"))
    (group,) = (g for g in optim.param_groups(model) if g["role"] == "matrix")
    if state is None:
        pairs = zip(group["names"], group["params"])
        return {n: {"weights": Profile.of(W)} for name, p in pairs for n, W in unstacked(name, p)}
    if not (found / "optimizer.safetensors").is_file():
        raise CheckpointError(f"{found}: no optimizer.safetensors: expected a run's checkpoint")
    buffers = read_tensors(found / "optimizer.safetensors")
    settings, matrices = state["config"]["optim"], [*zip(group["names"], group["params"])]
    triples = coefficients(settings["ns_coefficients"], settings["ns_steps"])
    profiles = {}
    for name, p in progress("diagnosing", None, "matrix", iterable=matrices):
        M = buffers.get(f"{name}.momentum", buffers.get(f"{name}.exp_avg"))
        if M is None:
            raise CheckpointError(f"{found}: no momentum of {name} in optimizer.safetensors")
        M = checked(found, f"momentum of {name}", M, [tuple(p.shape)])
        X = M.reshape(-1, *M.shape[-2:])
        kinds = {"momentum": X, "muon": newton_schulz(X, triples)}
        if (v := buffers.get(f"{name}.second_moment")) is not None:
            (*stack, m, n), which = p.shape, f"second moment of {name}"
            v = checked(found, which, v, [(*stack, m, 1), (*stack, 1, n)])
            O, v = kinds["muon"], v.reshape(len(X), *v.shape[-2:])
            # beta2 = 1 leaves v as it is
            factors = neuron_factors(O, v, 1.0, "original", (m, n), lambda x: x)
            kinds["normuon"] = factors * O
        for i, (part, _) in enumerate(unstacked(name, M)):
            profiles[part] = {kind: Profile.of(Xs[i]) for kind, Xs in kinds.items()}
    return profiles


def checked(found: Path, name: str, t: Tensor, shapes: list[tuple[int, ...]]) -> Tensor:
    """A copy of a buffer in float32. Raises CheckpointError for one that no run saves."""
    if tuple(t.shape) not in shapes or not t.isfinite().all():
        expected = f"expected finite numbers of shape {' or '.join(map(str, shapes))}"
        raise CheckpointError(f"{found}: {name} has shape {tuple(t.shape)}: {expected}")
    return t.to(torch.float32, copy=True)


def unstacked(name: str, W: Tensor) -> list[tuple[str, Tensor]]:
    """The matrices of a stack, with a name for each; of a matrix itself."""
    return [(name, W)] if W.ndim == 2 else [(f"{name}.{i}", w) for i, w in enumerate(W)]


def as_numbers(profiles: dict[str, dict[str, Profile]]) -> list[dict[str, Any]]:
    return [
        {"matrix": name, **{kind: p.numbers() for kind, p in kinds.items()}}
        for name, kinds in profiles.items()
    ]


def table(profiles: dict[str, dict[str, Profile]]) -> str:
    """A line per matrix: stable rank and spread of row norms, for each kind of update."""
    kinds = list(dict.fromkeys(kind for found in profiles.values() for kind in found))
    lines = [["matrix", *(f"stable rank {k}" for k in kinds), *(f"row spread {k}" for k in kinds)]]
    for row in as_numbers(profiles):
        # optim.beta2_on may leave a matrix without normuon
        ranks = [f"{row[k]['stable_rank']:.2f}" if k in row else "-" for k in kinds]
        spreads = [f"{row[k]['row_spread']:.3f}" if k in row else "-" for k in kinds]
        lines.append([row["matrix"], *ranks, *spreads])
    note = "stable rank: 1 if all singular values are equal; row spread: 0 if all row norms are"
    return f"{aligned(lines)}\n{note}"


def draw(profiles: dict[str, dict[str, Profile]], file: Path, layers: Sequence[int] = ()) -> None:
    """Draw spectrum and sorted row norms of every matrix of some layers (first, middle and last if
    none are given). Raises UsageError for a layer out of range, and what `picture` raises."""
    count = 1 + max(int(name.split(".")[1]) for name in profiles)
    layers = sorted(set(layers or (0, count // 2, count - 1)))
    if not 0 <= layers[0] <= layers[-1] < count:
        raise UsageError(f"--layers {layers}: expected numbers from 0 to {count - 1}")
    shown = {i: [n for n in profiles if n.startswith(f"layers.{i}.")] for i in layers}
    with picture(file, max(map(len, shown.values())), 2 * len(layers), 3.4, 2.2) as axes:
        for column, i in enumerate(layers):
            for row, name in enumerate(shown[i]):
                short = name.removeprefix(f"layers.{i}.").removesuffix(".weight")
                for offset, what in enumerate(("singular_values", "row_norms")):
                    axis = axes[row, 2 * column + offset]
                    for kind, profile in profiles[name].items():
                        values = getattr(profile, what).sort(descending=True).values.tolist()
                        share = torch.linspace(0, 1, len(values)).tolist()
                        axis.plot(share, values, label=kind, linewidth=1.2)
                    axis.set_title(f"{i}: {short}, {what.replace('_', ' ')}", fontsize=8)
                    axis.set(ylim=(0, None), ylabel="over rms", xlabel="share, largest first")
