"""Which parameter goes to which optimizer, and what the schedule makes of the learning rates.

role        parameters                                          optimizer
matrix      weights of hidden linear layers, stacks of them     NorMuon, Muon, AdamW or module:Class
embedding   weights of nn.Embedding, also when the head is tied AdamW
head        the linear layer that ends in the vocabulary        AdamW
vector      gains, biases, matrices of one row or one column    AdamW
"""

import ast
import importlib
import inspect
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

import torch
from torch import nn

from nanonormuon.normuon import MUON, NorMuon

ROLES = ("matrix", "embedding", "head", "vector")
# arXiv 2505.16932: each triple the best for what the one before leaves. It divides by 1.02 times
# the norm, which is in the first triple here
POLAR_EXPRESS = (
    (8.156554524902461 / 1.02, -22.48329292557795 / 1.02**3, 15.878769915207462 / 1.02**5),
    (4.042929935166739, -2.808917465908714, 0.5000178451051316),
    (3.8916678022926607, -2.772484153217685, 0.5060648178503393),
    (3.285753657755655, -2.3681294933425376, 0.46449024233003106),
    (2.3465413258596377, -1.7097828382687081, 0.42323551169305323),
)
COEFFICIENTS = {"muon": MUON, "polar_express": POLAR_EXPRESS}


def param_groups(model: nn.Module, roles: Mapping[str, str] | None = None) -> list[dict]:
    """Sort a module's trainable parameters by role: one dict {role, names, params} per role in use.

    Works on any module: an embedding is known by its type; the head is what get_output_embeddings()
    returns (our model and transformers' have it), else the only linear layer with as many outputs
    as an embedding has rows, unless it is tied to that. roles = {name pattern: role} decides where
    this is not enough, as for a raw 2-D parameter, whose neurons may lie on either side.

    Raises ValueError for a parameter it cannot place and for a pattern that matches none.
    """
    roles = dict(roles or {})
    tables = {
        id(m.weight): m.num_embeddings for m in model.modules() if isinstance(m, nn.Embedding)
    }
    heads = find_heads(model, tables)
    owners = {
        id(p): module
        for module in model.modules()
        for p in module.parameters(recurse=False)
        if isinstance(module, nn.Embedding | nn.Linear)
    }
    found: dict[str, dict] = {role: {"role": role, "names": [], "params": []} for role in ROLES}
    unused = set(roles)
    for name, p in model.named_parameters():  # a tied weight comes once
        if not p.requires_grad:
            continue
        owner, pattern = owners.get(id(p)), next((k for k in roles if fnmatchcase(name, k)), None)
        if pattern is not None:
            unused.discard(pattern)
            role = roles[pattern]
            if role not in ROLES:
                raise ValueError(f'role "{role}" for {name}: expected one of {", ".join(ROLES)}')
        elif id(p) in tables:
            role = "embedding"
        elif p.ndim < 2 or (p.ndim == 2 and min(p.shape) < 2):
            role = "vector"
        elif isinstance(owner, nn.Linear):
            role = "head" if id(p) in heads else "matrix"
        else:
            raise ValueError(
                f"{name}, shape {tuple(p.shape)}, is of no nn.Linear or nn.Embedding: say what "
                f'it is with roles={{"{name}": "matrix"}} (rows = output neurons) or another role'
            )
        found[role]["names"].append(name)
        found[role]["params"].append(p)
    if unused:
        raise ValueError(f"roles: {', '.join(sorted(unused))} match no parameter of the model")
    return [group for group in found.values() if group["params"]]


def find_heads(model: nn.Module, tables: Mapping[int, int]) -> set[int]:
    """Ids of the head's weight, from the model itself or by its width; see param_groups."""
    if hasattr(model, "get_output_embeddings"):
        head = model.get_output_embeddings()
        return set() if head is None else {id(head.weight)}
    wide = {
        name: id(m.weight)
        for name, m in model.named_modules()
        if isinstance(m, nn.Linear) and m.out_features in tables.values()
    }
    untied = {name: i for name, i in wide.items() if i not in tables}
    if len(untied) > 1:
        raise ValueError(
            f"which is the head? {', '.join(untied)} all have as many outputs as an embedding has "
            'rows: give the model get_output_embeddings(), or say roles={"NAME.weight": ...}'
        )
    return set(untied.values())


def make_optimizers(
    model: nn.Module,
    *,
    name: str = "normuon",
    options: str = "",
    lr: float = 0.02,
    weight_decay: float = 0.1,
    momentum: float = 0.95,
    beta2: float = 0.95,
    beta2_on: str = "*",
    nesterov: bool = True,
    neuron_axis: str = "rows",
    adjust_lr_fn: str = "original",
    ns_coefficients: str = "muon",
    ns_steps: int = 5,
    ns_dtype: torch.dtype = torch.bfloat16,
    cautious: bool = False,
    embed_lr: float = 0.3,
    head_lr: float = 0.003,
    vector_lr: float = 0.01,
    adam_beta1: float = 0.8,
    adam_beta2: float = 0.95,
    adam_eps: float = 1e-10,
    adam_weight_decay: float = 0.0,
) -> list[torch.optim.Optimizer]:
    """Optimizers that between them hold every trainable parameter exactly once.

    Each group carries `role`, `names` and `initial_lr` beside its optimizer's own settings.
    Raises ValueError for settings that an optimizer does not have.
    """
    lrs = {"matrix": lr, "embedding": embed_lr, "head": head_lr, "vector": vector_lr}
    matrices, others = [], []
    for group in param_groups(model):
        is_matrix = group["role"] == "matrix"
        group["lr"] = group["initial_lr"] = lrs[group["role"]]
        group["weight_decay"] = weight_decay if is_matrix else adam_weight_decay
        (matrices if is_matrix and name != "adamw" else others).append(group)
    optimizers: list[torch.optim.Optimizer] = []
    if matrices and ":" in name:
        optimizers.append(foreign(name, options, matrices))
    elif matrices:
        matrices = [part for group in matrices for part in divided(group, beta2_on)]
        triples = COEFFICIENTS.get(ns_coefficients) or parse_triple(ns_coefficients)
        optimizers.append(
            NorMuon(
                matrices,
                momentum=momentum,
                beta2=beta2 if name == "normuon" else None,
                nesterov=nesterov,
                neuron_axis=neuron_axis,
                adjust_lr_fn=adjust_lr_fn,
                ns_coefficients=triples,
                ns_steps=ns_steps,
                ns_dtype=ns_dtype,
                cautious=cautious,
            )
        )
    if others:
        fused = all(p.device.type in ("cpu", "cuda") for g in others for p in g["params"])
        betas = (adam_beta1, adam_beta2)
        optimizers.append(torch.optim.AdamW(others, betas=betas, eps=adam_eps, fused=fused))
    held = sorted(id(p) for o in optimizers for g in o.param_groups for p in g["params"])
    assert held == sorted(id(p) for p in model.parameters() if p.requires_grad)
    return optimizers


def divided(group: dict, pattern: str) -> list[dict]:
    """A group of matrices as two: those whose names match, and those that go without a second
    moment. Raises ValueError if none matches."""
    parts: dict[bool, dict] = {}
    for name, p in zip(group["names"], group["params"]):
        matches = fnmatchcase(name, pattern)
        part = parts.setdefault(matches, group | {"names": [], "params": []})
        part["names"].append(name)
        part["params"].append(p)
    if True not in parts:
        raise ValueError(f'beta2_on = "{pattern}": matches no matrix; the first is {name}')
    if False in parts:
        parts[False]["beta2"] = None
    return list(parts.values())


def foreign(name: str, options: str, groups: list[dict]) -> torch.optim.Optimizer:
    """An optimizer of an installed package, by its import path "module:Class".

    options: its arguments as in a call, with literal values. Raises ValueError for what cannot be
    imported or is no optimizer, and for arguments that it does not have.
    """
    module, _, attribute = name.partition(":")
    try:
        cls = getattr(importlib.import_module(module), attribute)
        if not issubclass(cls, torch.optim.Optimizer):
            raise TypeError(f"{attribute} is no torch.optim.Optimizer")
    except (ImportError, AttributeError, TypeError, ValueError) as error:
        raise ValueError(
            f'name = "{name}": expected module:Class of an optimizer ({error})'
        ) from None
    try:
        call = ast.parse(f"f({options})", mode="eval").body
        if not isinstance(call, ast.Call) or call.args:
            raise SyntaxError("positional")
        arguments = {k.arg: ast.literal_eval(k.value) for k in call.keywords}
    except (SyntaxError, ValueError):
        raise ValueError(f'options = "{options}": expected KEY=VALUE, KEY=VALUE, ...') from None
    known = inspect.signature(cls).parameters  # a **kwargs would swallow a misspelt name
    if unknown := arguments.keys() - known.keys():
        raise ValueError(f"options: {name} has no {min(unknown)}; it has {', '.join(known)}")
    for group in groups:
        group["use_muon"] = True  # some packages' Muons ask for it; to all others it is a name
    try:
        optimizer = cls(groups, lr=groups[0]["lr"], **arguments)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{name}({options}): {error}") from None
    if "weight_decay" not in known and groups[0]["weight_decay"]:
        raise ValueError(f"{name} has no weight decay: expected optim.weight_decay=0")
    return optimizer


def parse_triple(text: str) -> tuple[float, float, float]:
    """ "2, -1.5, 0.5" -> (2.0, -1.5, 0.5), a Newton-Schulz iteration's coefficients."""
    try:
        a, b, c = (float(x) for x in text.split(","))
    except ValueError:
        raise ValueError(
            f'ns_coefficients = "{text}": expected {", ".join(COEFFICIENTS)} or three numbers: '
            '"a, b, c"'
        ) from None
    return a, b, c


def kind(optimizer: torch.optim.Optimizer, group: dict) -> str:
    muon = isinstance(optimizer, NorMuon) and group["beta2"] is None
    return "Muon" if muon else type(optimizer).__name__


def describe(optimizers: Sequence[torch.optim.Optimizer], fold: bool = False) -> str:
    """The table of groups: each parameter's shape, role, optimizer, learning rate and decay.

    fold: one line for all layers' parameters of one name, with their number.
    """
    rows: dict[tuple[str, ...], int] = {}
    for optimizer in optimizers:
        for g in optimizer.param_groups:
            rates = f"{g['initial_lr']:.4g}", f"{g['weight_decay']:.4g}"
            for name, p in zip(g["names"], g["params"]):
                name = re.sub(r"\.\d+\.", ".*.", name) if fold else name
                shape = " x ".join(map(str, p.shape))
                row = (name, shape, g["role"], kind(optimizer, g), *rates)
                rows[row] = rows.get(row, 0) + 1
    head = ("parameter", "shape", "role", "optimizer", "lr", "weight_decay")
    lines = [head, *rows]
    if fold:
        lines = [(*head[:1], "n", *head[1:]), *((r[0], str(n), *r[1:]) for r, n in rows.items())]
    widths = [max(map(len, column)) for column in zip(*lines)]
    return "\n".join("  ".join(c.ljust(w) for c, w in zip(row, widths)).rstrip() for row in lines)


@dataclass(frozen=True)
class Schedule:
    """Learning rates and momentum as pure functions of the step (0 .. steps - 1)."""

    steps: int
    warmup: int = 0  # steps of linear warm-up
    decay: float = 0.7  # the last part of the run, in which the rates fall linearly ...
    final_lr: float = 0.0  # ... to this share of their height
    momentum: float = 0.95
    momentum_start: float = 0.85
    momentum_warmup: int = 300  # steps from momentum_start to momentum

    OWN = ("warmup", "decay", "final_lr", "momentum_start", "momentum_warmup")  # not an optimizer's

    def lr(self, step: int) -> float:
        """The factor on every group's initial_lr: up, constant, and down to final_lr."""
        up = (step + 1) / self.warmup if step < self.warmup else 1.0
        falling = self.decay * self.steps
        down = (self.steps - step) / falling if self.steps - step < falling else 1.0
        return min(up, self.final_lr + (1 - self.final_lr) * down)

    def momentum_at(self, step: int) -> float:
        part = min(1.0, step / self.momentum_warmup) if self.momentum_warmup else 1.0
        return self.momentum_start + part * (self.momentum - self.momentum_start)

    def set(self, optimizers: Sequence[torch.optim.Optimizer], step: int) -> None:
        """Write the step's values into every group of every optimizer."""
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = group["initial_lr"] * self.lr(step)
                if isinstance(optimizer, NorMuon):  # others' momentum is their own matter
                    group["momentum"] = self.momentum_at(step)


def make_optimizers_(model, settings, ns_dtype):
    from dataclasses import asdict

    s = asdict(settings)
    for key in ("grad_clip", *Schedule.OWN):
        del s[key]
    return make_optimizers(model, ns_dtype=ns_dtype, **s)


def schedule_(steps, s):
    return Schedule(steps, momentum=s.momentum, **{k: getattr(s, k) for k in Schedule.OWN})
