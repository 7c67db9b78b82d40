"""What NorMuon does, made visible (figure 1 of arXiv 2510.05491): the singular values and the row
norms of each matrix's momentum, of Muon's update and of NorMuon's, from a checkpoint.

Muon makes the singular values alike and leaves the neurons' norms apart; NorMuon makes these alike
as well. Shown is what a step in the direction of the momentum would do: the checkpoint holds no
gradient for Nesterov's look ahead.
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from nanonormuon import optim
from nanonormuon.errors import CheckpointError, UsageError
from nanonormuon.normuon import coefficients, neuron_factors, newton_schulz
from nanonormuon.pretrained import models as pretrained
from nanonormuon.runs.pictures import picture
from nanonormuon.storage.tensors import read_tensors


@dataclass(frozen=True)
class Profile:
    """One matrix's momentum or update: singular values (falling) and row norms, both divided by
    their root mean square, so that 1 everywhere is a perfectly even update."""

    singular_values: Tensor
    row_norms: Tensor

    @classmethod
    def of(cls, X: Tensor) -> "Profile":
        s, r = torch.linalg.svdvals(X.float()), torch.linalg.vector_norm(X.float(), dim=1)
        return cls(*(t / t.square().mean().sqrt().clamp_min(1e-30) for t in (s, r)))

    def numbers(self) -> dict[str, float]:
        """stable_rank: sum of squares over the largest square, as a share of all singular values;
        row_spread: standard deviation over mean of the row norms."""
        s, r = self.singular_values, self.row_norms
        stable = float(s.square().sum() / s[0].square().clamp_min(1e-30)) / len(s)
        spread = float(r.std(correction=0) / r.mean().clamp_min(1e-30))
        return {"stable_rank": stable, "row_spread": spread}


def diagnose(path: Path) -> dict[str, dict[str, Profile]]:
    """For each hidden matrix of a run's newest checkpoint, by name: the profiles of "momentum",
    "muon" and, where the run kept second moments, "normuon". Of a run with AdamW the momentum is
    its first moment. Raises CheckpointError."""
    found = pretrained.find_checkpoint(path)
    state = pretrained.state_of(found)
    if state is None or not (found / "optimizer.safetensors").is_file():
        raise CheckpointError(f"{found}: no optimizer.safetensors: expected a run's checkpoint")
    buffers = read_tensors(found / "optimizer.safetensors")
    settings: dict[str, Any] = state["config"]["optim"]
    model = pretrained.load_model(found, torch.float32, torch.device("cpu"))
    (matrices,) = (g["names"] for g in optim.param_groups(model) if g["role"] == "matrix")
    triples = coefficients(settings["ns_coefficients"], settings["ns_steps"])
    profiles = {}
    for name in tqdm(matrices, unit="matrix", leave=False, disable=not sys.stderr.isatty()):
        M = buffers.get(f"{name}.momentum", buffers.get(f"{name}.exp_avg"))
        if M is None:
            raise CheckpointError(f"{found}: no momentum of {name} in optimizer.safetensors")
        O = newton_schulz(M[None].float(), triples)
        profiles[name] = {"momentum": Profile.of(M), "muon": Profile.of(O[0])}
        if (v := buffers.get(f"{name}.second_moment")) is not None:
            # beta2 = 1 leaves v as it is
            factors = neuron_factors(O, v[None].clone(), 1.0, "original", M.shape, lambda x: x)
            profiles[name]["normuon"] = Profile.of((factors * O)[0])
    return profiles


def as_numbers(profiles: dict[str, dict[str, Profile]]) -> list[dict[str, Any]]:
    return [
        {"matrix": name, **{kind: p.numbers() for kind, p in kinds.items()}}
        for name, kinds in profiles.items()
    ]


def table(profiles: dict[str, dict[str, Profile]]) -> str:
    """One line per matrix: how even spectrum and rows are, before and after."""
    kinds = list(next(iter(profiles.values())))
    head = ["matrix", *(f"stable rank {k}" for k in kinds), *(f"row spread {k}" for k in kinds)]
    lines = [head]
    for row in as_numbers(profiles):
        ranks = [f"{row[k]['stable_rank']:.2f}" for k in kinds]
        lines.append([row["matrix"], *ranks, *(f"{row[k]['row_spread']:.3f}" for k in kinds)])
    widths = [max(map(len, column)) for column in zip(*lines)]
    text = "\n".join("  ".join(c.ljust(w) for c, w in zip(line, widths)) for line in lines)
    return (
        text + "\nstable rank: 1 if all singular values are alike; row spread: 0 if all neurons "
        "move alike"
    )


def draw(profiles: dict[str, dict[str, Profile]], file: Path, layers: Sequence[int] = ()) -> None:
    """Spectrum and sorted row norms of every matrix of some layers (first, middle and last unless
    given), as PNG, SVG or PDF. Raises UsageError for another layer or file name."""
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
                    axis.set_ylim(bottom=0)
                    axis.tick_params(labelsize=7)
