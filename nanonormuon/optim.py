"""Which parameter goes to which optimizer, and the schedule of learning rates and momentum.

role        parameters                                          optimizer
matrix      weights of hidden linear layers, stacks of them     NorMuon, Muon, AdamW or a Class
columns     such weights stored (inputs, outputs)               as matrix, with neurons as columns
embedding   weights of nn.Embedding, including a tied head's    AdamW
value       value embeddings (see parameter_roles)              AdamW
head        the linear layer whose outputs are the vocabulary   AdamW
vector      gains, biases, matrices of one row or one column,   AdamW
            routers of experts

The low-rank projections of latent attention are matrices too: NorMuon makes an update's shorter
side orthonormal, so it uses a projection's full rank.
"""

import re
import shlex
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import nn
from torch.optim import AdamW, Optimizer

from nanonormuon.config import FromFile, OptimConfig
from nanonormuon.errors import ConfigError
from nanonormuon.normuon import NorMuon

ROLES = ("matrix", "columns", "embedding", "value", "head", "vector")
HIDDEN = ROLES[:2]
# arguments of NorMuon that OptimConfig has
OWN = ("momentum", "nesterov", "neuron_axis", "adjust_lr_fn", "ns_coefficients", "ns_steps",
       "cautious")  # fmt: skip


def param_groups(model: nn.Module, roles: Mapping[str, str] | None = None) -> list[dict]:
    """Group a module's trainable parameters by role: one dict {role, names, params} per role in
    use, with NorMuon's neuron_axis for "columns".

    Works on any module. The head is what get_output_embeddings() returns (our model and
    transformers' have it), else the only linear layer with as many outputs as an embedding has
    rows, unless tied. transformers' Conv1D (GPT-2's) has "columns". A module may state the roles of
    its parameters as parameter_roles = {name: role}. roles = {name pattern: role} overrides all
    other rules.

    Raises ConfigError, a ValueError, for parameters without a role and for patterns that match
    nothing.
    """
    roles, known = roles or {}, known_roles(model)
    unknown: dict[str, str] = {}  # pattern of parameters without a role -> shape of the first
    found: dict[str, dict] = {role: {"role": role, "names": [], "params": []} for role in ROLES}
    unused = set(roles)
    for name, p in model.named_parameters():  # a tied weight comes once
        if not p.requires_grad:
            continue
        pattern = next((k for k in roles if fnmatchcase(name, k)), "")
        unused.discard(pattern)
        role = roles[pattern] if pattern else known.get(id(p))
        if role is None:
            unknown.setdefault(re.sub(r"(?<![^.])\d+(?![^.])", "*", name), str(tuple(p.shape)))
        elif role not in ROLES:
            raise ConfigError(f'role "{role}" for {name}: expected one of {", ".join(ROLES)}')
        else:
            found[role]["names"].append(name)
            found[role]["params"].append(p)
    if unknown:
        raise ConfigError(
            f"{', '.join(f'{name} {shape}' for name, shape in unknown.items())}: in no nn.Linear, "
            f"Conv1D or nn.Embedding. Give their roles, roles={dict.fromkeys(unknown, 'matrix')}: "
            '"matrix" if rows are output neurons, "columns" if stored (inputs, outputs), '
            '"embedding" or "vector" for AdamW (roles: an argument of param_groups; for '
            "normuon-train change its default in nanonormuon/optim.py)"
        )
    if unused:
        raise ConfigError(f"roles: {', '.join(sorted(unused))} match no parameter of the model")
    if found["columns"]["params"]:
        found["columns"]["neuron_axis"] = "columns"
    return [group for group in found.values() if group["params"]]


def known_roles(model: nn.Module) -> dict[int, str]:
    """Return the roles that the modules give to parameters, by id. A later rule prevails."""
    known: dict[int, str] = {}
    for m in model.modules():
        if isinstance(m, nn.Linear):
            known |= {id(p): "matrix" for p in m.parameters(recurse=False)}
        elif type(m).__name__ == "Conv1D" and hasattr(m, "nf") and m.weight.shape[1:] == (m.nf,):
            known[id(m.weight)] = "columns"
    known |= dict.fromkeys(find_heads(model), "head")
    for p in model.parameters():
        if p.ndim < 2 or (p.ndim == 2 and min(p.shape) < 2):
            known[id(p)] = "vector"
    known |= {id(m.weight): "embedding" for m in model.modules() if isinstance(m, nn.Embedding)}
    for m in model.modules():
        stated = getattr(m, "parameter_roles", {})
        known |= {id(m.get_parameter(name)): role for name, role in stated.items()}
    return known


def find_heads(model: nn.Module) -> set[int]:
    """Return the id of the head's weight, if any."""
    if hasattr(model, "get_output_embeddings"):
        head = model.get_output_embeddings()
        return set() if head is None else {id(head.weight)}
    rows = {id(m.weight): m.num_embeddings for m in model.modules() if isinstance(m, nn.Embedding)}
    layers = {name: m for name, m in model.named_modules() if isinstance(m, nn.Linear)}
    wide = {name: m for name, m in layers.items() if m.out_features in rows.values()}
    untied = {name: id(m.weight) for name, m in wide.items() if id(m.weight) not in rows}
    if len(untied) > 1:
        raise ConfigError(
            f"expected one head, found {', '.join(untied)}, with as many outputs as an embedding "
            'has rows: define get_output_embeddings(), or pass roles={"NAME.weight": ...}'
        )
    return set(untied.values())


def make_optimizers(
    model: nn.Module, settings: OptimConfig, ns_dtype: torch.dtype = torch.bfloat16
) -> list[Optimizer]:
    """Make the optimizers, which together hold every trainable parameter exactly once.

    Each group has `role`, `names` and `initial_lr` beside its optimizer's settings. Raises
    ConfigError for settings that do not fit the optimizer or the model.
    """
    s, matrices, others = settings, [], []
    lrs = {"embedding": s.embed_lr, "value": s.value_lr, "head": s.head_lr, "vector": s.vector_lr}
    for group in param_groups(model):
        is_matrix = group["role"] in HIDDEN
        group["lr"] = group["initial_lr"] = s.lr if is_matrix else lrs[group["role"]]
        group["weight_decay"] = s.weight_decay if is_matrix else s.adam_weight_decay
        (matrices if is_matrix and s.name != "adamw" else others).append(group)
    optimizers: list[Optimizer] = []
    if matrices and ":" in s.name:
        from nanonormuon.lab import external  # most runs use this package's own

        optimizers.append(external.make(s, matrices, ns_dtype))
    elif matrices:
        own: dict[str, Any] = {key: getattr(s, key) for key in OWN}
        own["beta2"] = s.beta2 if s.name == "normuon" else None
        parts = [part for group in matrices for part in split_group(group, s.beta2_on)]
        try:
            optimizers.append(NorMuon(parts, ns_dtype=ns_dtype, **own))
        except ValueError as error:
            raise ConfigError(f"optim: NorMuon: {error}") from None
    if others:
        fused = all(p.device.type in ("cpu", "cuda") for g in others for p in g["params"])
        betas = (s.adam_beta1, s.adam_beta2)
        optimizers.append(AdamW(others, betas=betas, eps=s.adam_eps, fused=fused))
    held = sorted(id(p) for o in optimizers for g in o.param_groups for p in g["params"])
    assert held == sorted(id(p) for p in model.parameters() if p.requires_grad)
    return optimizers


def split_group(group: dict, pattern: str) -> list[dict]:
    """Split a group of matrices by a name pattern; those that do not match get no second moment.
    Raises ConfigError if none matches."""
    parts: dict[bool, dict] = {}
    for name, p in zip(group["names"], group["params"]):
        matches = fnmatchcase(name, pattern)
        part = parts.setdefault(matches, group | {"names": [], "params": []})
        part["names"].append(name)
        part["params"].append(p)
    if True not in parts:
        raise ConfigError(f'optim.beta2_on = "{pattern}": matches no matrix, such as {name}')
    if False in parts:
        parts[False]["beta2"] = None
    return list(parts.values())


def check_trusted(name: str) -> None:
    """Raise ConfigError for another package's optimizer that only a file names."""
    if isinstance(name, FromFile):
        raise ConfigError(
            f"{name.file}: optim.name = {name} would run that module's code: if you trust it, add "
            f"{shlex.quote(f'optim.name={name}')} to the command"
        )


def by_parameter(cls: type[Optimizer]) -> bool:
    """Whether each buffer belongs to one parameter and is placed like it, so that it can be saved
    by name and resharded. Other optimizers are saved as one tree and need whole matrices."""
    return issubclass(cls, NorMuon | AdamW) or getattr(cls, "state_by_parameter", False)


def group_rows(optimizers: Sequence[Optimizer], fold: bool = False) -> list[tuple[str, ...]]:
    """Tabulate the parameters, with a header row: shape, role, optimizer, lr, weight decay. fold:
    within a terminal's 80 columns, with one row and the number "n" for all layers; without role."""
    counts: Counter[tuple[str, ...]] = Counter()
    for optimizer in optimizers:
        for g in optimizer.param_groups:
            is_muon = isinstance(optimizer, NorMuon) and g["beta2"] is None
            kind = "Muon" if is_muon else type(optimizer).__name__
            rates = f"{g['initial_lr']:.4g}", f"{g['weight_decay']:.4g}"
            for name, p in zip(g["names"], g["params"]):
                short = re.sub(r"^layers\.\d+\.", "*.", name).removesuffix(".weight")
                shape = " x ".join(map(str, p.shape))
                row = [short, shape] if fold else [name, shape, g["role"]]
                counts[*row, kind, *rates] += 1
    if fold:
        head = "n", "parameter", "shape", "optimizer", "lr", "decay"
        return [head, *((str(n), *row) for row, n in counts.items())]
    return [("parameter", "shape", "role", "optimizer", "lr", "weight_decay"), *counts]


@dataclass(frozen=True)
class Schedule:
    """Learning rates and momentum as pure functions of the step (0 to steps - 1)."""

    steps: int
    settings: OptimConfig

    def lr(self, step: int) -> float:
        """Return the factor on every initial_lr, which rises, stays at 1 and falls to final_lr."""
        s = self.settings
        up = (step + 1) / s.warmup if step < s.warmup else 1.0
        falling = s.decay * self.steps
        down = (self.steps - step) / falling if self.steps - step < falling else 1.0
        return min(up, s.final_lr + (1 - s.final_lr) * down)

    def momentum_at(self, step: int) -> float:
        """Return the momentum, which rises from momentum_start over momentum_warmup steps."""
        s = self.settings
        part = min(1.0, step / s.momentum_warmup) if s.momentum_warmup else 1.0
        return s.momentum_start + part * (s.momentum - s.momentum_start)

    def set(self, optimizers: Sequence[Optimizer], step: int) -> None:
        """Set the step's values in every group of every optimizer."""
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = group["initial_lr"] * self.lr(step)
                if "momentum" in group and by_parameter(type(optimizer)):  # others keep theirs
                    group["momentum"] = self.momentum_at(step)
