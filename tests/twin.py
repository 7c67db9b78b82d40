"""A plain NorMuon, one matrix at a time, straight from the paper's formulas: the reference that the
fast and distributed one is compared with. It shares no code with the package.

`python tests/twin.py` puts this twin's trajectories into golden/normuon.safetensors, in the place
of those that the authors' published code and the paper's Algorithm 1 gave."""

from pathlib import Path

import torch

MUON = (3.4445, -4.7750, 2.0315)


def orthogonalise(X, triples=(MUON,) * 5, safety=1.0):
    m, n = X.shape
    X = X / (X.norm() * safety + 1e-7)
    if m > n:
        X = X.T
    for a, b, c in triples:
        A = X @ X.T
        X = a * X + (b * A + c * A @ A) @ X
    return X.T if m > n else X


class Twin:
    """lr and the rest as in nanonormuon.NorMuon; `shards` > 0 restores the norm per block of rows,
    as a sharded implementation does that forgets the other ranks (the negative control)."""

    def __init__(self, W, lr, weight_decay=0.1, momentum=0.95, beta2=0.95, nesterov=True,
                 axis="rows", adjust="original", triples=(MUON,) * 5, safety=1.0, cautious=False,
                 ns_dtype=None, shards=0):  # fmt: skip
        self.W, self.M, self.v = W.clone(), torch.zeros_like(W), None
        self.lr, self.weight_decay, self.momentum, self.beta2 = lr, weight_decay, momentum, beta2
        self.nesterov, self.axis, self.adjust, self.cautious = nesterov, axis, adjust, cautious
        self.triples, self.safety, self.ns_dtype, self.shards = triples, safety, ns_dtype, shards

    def step(self, G):
        m, n = self.W.shape
        self.M = self.momentum * self.M + (1 - self.momentum) * G
        X = self.momentum * self.M + (1 - self.momentum) * G if self.nesterov else self.M
        O = orthogonalise(X.to(self.ns_dtype or X.dtype), self.triples, self.safety).to(X.dtype)
        U = O
        if self.beta2 is not None:
            dim = 1 if self.axis == "rows" or m >= n else 0
            mean = (O * O).mean(dim, keepdim=True)
            self.v = (1 - self.beta2) * mean + (0 if self.v is None else self.beta2 * self.v)
            U = O / (self.v.sqrt() + 1e-10)
            if self.shards:
                size = -(-m // self.shards)
                blocks = [(o.norm(), u) for o, u in zip(O.split(size), U.split(size))]
                U = torch.cat([u * o / u.norm().clamp_min(1e-30) for o, u in blocks])
            elif self.adjust == "original":
                U = U * O.norm() / U.norm().clamp_min(1e-30)
        if self.adjust == "original":
            U = U * max(1, m / n) ** 0.5
        elif self.beta2 is None:  # torch.optim.Muon's rule
            U = U * 0.2 * max(m, n) ** 0.5
        else:
            U = U * 0.2 * (m * n) ** 0.5 / U.norm().clamp_min(1e-30)
        decay = self.lr * self.weight_decay
        if self.cautious:
            self.W = torch.where(U * self.W > 0, (1 - decay) * self.W, self.W)
        else:
            self.W = (1 - decay) * self.W
        self.W = self.W - self.lr * U
        return self.W


GOLDEN = Path(__file__).parent / "golden" / "normuon.safetensors"
VARIANTS = {
    "official_fp32": {"lr": 0.02},
    "official_fp32_no_nesterov": {"lr": 0.02, "nesterov": False},
    "official_bf16": {"lr": 0.02, "ns_dtype": torch.bfloat16},
    "paper": {"lr": 0.004, "nesterov": False, "adjust": "match_rms_adamw"},
}


def trajectories(tensors):
    """The golden tensors with the twin's weights after each step, from their own start and
    gradients."""
    found = dict(tensors)
    for start in [name for name in tensors if name.endswith(".weight0")]:
        case = start.removesuffix("weight0")
        for variant, settings in VARIANTS.items():
            twin = Twin(tensors[start].double(), **settings)
            steps = [twin.step(G.double()) for G in tensors[f"{case}grads"]]
            found[case + variant] = torch.stack(steps).float()
    return found


if __name__ == "__main__":
    from safetensors import safe_open
    from safetensors.torch import load_file, save_file

    with safe_open(GOLDEN, "pt") as file:
        metadata = file.metadata()
    save_file(trajectories(load_file(GOLDEN)), GOLDEN, metadata)
