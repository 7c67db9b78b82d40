"""The zoo: every neighbour equals a plain twin written from the formula in its docstring, on one
process, under DDP and under FSDP2; a run of it resumes bitwise; each file fits one screen."""

import ast
import json
import math
import sys
from pathlib import Path

import pytest
import torch
import zoo_worker as worker
from safetensors.torch import load_file
from support import ROOT, final, relative, run

from nanonormuon import checkpoint, config
from nanonormuon.config import load
from nanonormuon.errors import CheckpointError
from nanonormuon.lab.external import default_lr, optimizer_class
from nanonormuon.lab.zoo import muon8bit
from nanonormuon.lab.zoo.lipschitz import LARGEST, Lipschitz
from nanonormuon.model import GPT, GPTConfig
from nanonormuon.normuon import NorMuon
from nanonormuon.optim import Schedule, make_optimizers
from nanonormuon.runs import spectra
from nanonormuon.storage.tensors import read_tensors

NAMES = [name.partition(":")[2] for name in config.our_optimizers()[3:]]
LR, DECAY, MU = worker.LR, worker.DECAY, worker.MU


def orthogonal(X, steps=5):
    """Muon's iteration as its author writes it, for one matrix."""
    X = X / (X.norm() + 1e-7)
    for _ in range(steps):
        A = X @ X.T
        X = 3.4445 * X + (-4.7750 * A + 2.0315 * A @ A) @ X
    return X


def muon_scale(W):
    return math.sqrt(max(1, W.size(0) / W.size(1)))


class Twin:
    """One matrix, its momentum and Nesterov's look ahead; a rule per neighbour."""

    nesterov = True

    def __init__(self, W, **options):
        self.W, self.M, self.t = W.double().clone(), torch.zeros_like(W, dtype=torch.double), 0
        self.v = self.basis = None
        self.__dict__ |= options

    def step(self, G, U=None):
        self.t += 1
        G = G.double()
        self.M = MU * self.M + (1 - MU) * G
        X = MU * self.M + (1 - MU) * G if self.nesterov else self.M
        U = self.update(X, G)
        self.W = (1 - LR * DECAY) * self.W - LR * U


class AdaMuon(Twin):
    sign = True

    def update(self, X, G):
        O = orthogonal(X.sign() if self.sign else X)
        self.v = 0.05 * O**2 + (0.95 * self.v if self.t > 1 else 0)
        U = O / (self.v.sqrt() + 1e-8)
        return 0.2 * math.sqrt(U.numel()) * U / U.norm()


class AuON(Twin):
    hybrid = False

    def update(self, X, G):
        H = orthogonal(X, 1) if self.hybrid else X / X.norm()
        return muon_scale(X) * H / (H.cosh() ** 2).mean().sqrt()


class Muon8bit(Twin):
    """In float32, since which integer a weight rounds to is part of the state."""

    beta2 = None

    def __init__(self, W):
        super().__init__(W)
        self.W, self.M = W.clone(), torch.zeros_like(W)

    def step(self, G):
        self.t += 1
        self.M.lerp_(G, 1 - MU)
        O = orthogonal(G.lerp(self.M, MU))
        U = muon_scale(O) * O
        if self.beta2:
            mean = (O**2).mean(1, keepdim=True)
            self.v = (1 - self.beta2) * mean + (self.beta2 * self.v if self.t > 1 else 0)
            U = O / self.v.sqrt()
            U = muon_scale(O) * U * O.norm() / U.norm()
        for row in self.M:
            for start in range(0, len(row), 2048):
                block = row[start : start + 2048]
                unit = block.abs().max() / 127
                block.copy_((block / unit).round() * unit)
        self.W = (1 - LR * DECAY) * self.W - LR * U


class NorMuon8bit(Muon8bit):
    beta2 = 0.95


class REG(Twin):
    def update(self, X, G):
        R = X / X.norm(dim=1, keepdim=True)
        R = R / R.norm(dim=0, keepdim=True)
        return 0.2 * math.sqrt(R.numel()) * R / R.norm()


class Lipschitzed(Twin):
    """On singular values, where the class iterates on matrices."""

    def step(self, G):
        s = math.sqrt(G.size(0) / G.size(1))
        if self.t == 0:
            self.W = self.W / max(1, torch.linalg.matrix_norm(self.W / s, 2).item())
        super().step(G)
        U, S, V = torch.linalg.svd(self.W / s, full_matrices=False)
        k = (1 - LR * DECAY) + LR * LARGEST
        roots = torch.linalg.eigvals(companion([-(k**9), 3 * k**7, -3 * k**5, 0, k - 1]))
        a = min(r.real.item() for r in roots if abs(r.imag) < 1e-9 and r.real >= 0)
        S = S - a * S**3
        self.W = s * U @ torch.diag(S + a * S**3) @ V

    def update(self, X, G):
        return math.sqrt(G.size(0) / G.size(1)) * orthogonal(X)


def companion(coefficients):
    """The matrix whose eigenvalues are the polynomial's roots."""
    lead, *rest = torch.tensor(coefficients, dtype=torch.double)
    matrix = torch.diag(torch.ones(len(rest) - 1, dtype=torch.double), -1)
    matrix[0] = -torch.stack(rest) / lead
    return matrix


class OSP(Twin):
    nesterov = False

    def update(self, X, G):
        return 0.2 * math.sqrt(max(X.shape)) * orthogonal(X)


class LANTON(Twin):
    """All matrices at once: `field` has the others."""

    noise, before = 0.0, 0.0

    def listen(self, G):
        D, (m, n) = G.double() - self.before, G.shape
        nuclear = math.sqrt(m / n) * (D * orthogonal(D)).sum().item()
        self.noise = 0.9 * self.noise + 0.1 * nuclear**2
        self.before = G.double()
        self.a = 1 / math.sqrt(1 + self.noise)

    def update(self, X, G):
        rate = math.sqrt(self.a / max(twin.a for twin in self.field))
        return rate * muon_scale(X) * orthogonal(X)


class DropMuon(Twin):
    def step(self, G):
        random = torch.Generator().manual_seed(self.drawn)
        self.drawn += 1
        if int(torch.randint(self.layers, (), generator=random)) <= self.layer:
            super().step(G)

    def update(self, X, G):
        return muon_scale(X) * orthogonal(X)


class COSMOS(Twin):
    nesterov = False

    def update(self, M, G):
        r, scale = min(worker.RANK, min(G.shape) // 2), 0.1 * math.sqrt(G.numel())
        if self.t == 1:
            self.P = torch.linalg.eigh(G.T @ G)[1][:, -r:]
            self.S = 0.04 * self.P.T @ G.T @ G @ self.P
            self.v = torch.zeros(len(G), r, dtype=torch.double)
        else:
            P = torch.linalg.qr(0.96 * self.P @ self.S + 0.04 * G.T @ G @ self.P)[0]
            old = self.P @ self.S @ self.P.T  # the second moment, in all n dimensions
            self.S, self.P = P.T @ (0.96 * old + 0.04 * G.T @ G) @ P, P
        self.v = 0.96 * self.v + 0.04 * (G @ self.P) ** 2
        A = M @ self.P / (1 - MU**self.t)
        A = A / ((self.v / (1 - 0.96**self.t)).sqrt() + 1e-8) @ self.P.T
        B = orthogonal(M - M @ self.P @ self.P.T)
        X = A + scale * B / B.norm()
        return scale * X / X.norm()


TWINS = {"adamuon": AdaMuon, "auon": AuON, "cosmos": COSMOS, "dropmuon": DropMuon,
         "lanton": LANTON, "lipschitz": Lipschitzed, "muon8bit": Muon8bit,
         "normuon8bit": NorMuon8bit, "osp": OSP, "reg": REG}  # fmt: skip


def expected(name, **options):
    """The weights after the workers' steps, from twins: name of the matrix -> W."""
    weights, grads = worker.problem()
    twins = {key: TWINS[name](W, **options) for key, W in weights.items()}
    for i, twin in enumerate(twins.values()):
        twin.field, twin.layer, twin.layers, twin.drawn = twins.values(), i, len(twins), 0
    for G in grads:
        for key, twin in twins.items() if name == "lanton" else ():
            twin.listen(G[key])
        for key, twin in twins.items():
            twin.step(G[key])
    return {key: twin.W for key, twin in twins.items()}


def agree(found, wanted, where):
    for key, W in wanted.items():
        assert relative(found[key], W) < 1e-5, f"{where}: {key}"


@pytest.mark.parametrize("name", NAMES)
def test_each_equals_a_plain_twin(name):
    assert sorted(TWINS) == NAMES
    agree(worker.train(name, None), expected(name), name)


@pytest.mark.parametrize("options", [{"hybrid": True}], ids=["hybrid"])
def test_the_hybrid_of_auon_equals_its_twin(options):
    agree(worker.train("auon", None, **options), expected("auon", **options), "hybrid")


@pytest.mark.slow
def test_adamuon_without_signs_is_pytorch_optimizers():
    other = pytest.importorskip("pytorch_optimizer")
    weights, grads = worker.problem()
    params = {key: torch.nn.Parameter(W.clone()) for key, W in weights.items()}
    group = {"params": list(params.values()), "use_muon": True, "weight_decay": DECAY, "lr": LR}
    theirs = other.AdaMuon([group], betas=(MU, MU))
    for step in grads:
        for key, p in params.items():
            p.grad = step[key].clone()
        theirs.step()
    found = worker.train("adamuon", None, sign=False, nesterov=False, beta2=MU)
    for key, p in params.items():  # theirs iterates in bfloat16
        assert relative(found[key], p) < 1e-3, key


@pytest.mark.parametrize("name", ["dropmuon", "lanton"])
def test_muons_step_is_the_one_that_is_built_in(name):
    """Bit by bit, while every layer moves and all are equally quiet."""
    weights, grads = worker.problem()
    ours, theirs = (torch.nn.Parameter(weights["square0"].clone()) for _ in range(2))
    own = optimizer_class(f"zoo:{name}")([ours], lr=LR, weight_decay=DECAY)
    muon = NorMuon([theirs], lr=LR, weight_decay=DECAY, beta2=None)
    for step in grads:
        for p, optimizer in ((ours, own), (theirs, muon)):
            p.grad = step["square0"].clone()
            optimizer.step()
    assert torch.equal(ours, theirs)


def test_no_weight_leaves_the_ball():
    torch.manual_seed(0)
    W = torch.nn.Parameter(5 * torch.randn(20, 12))
    optimizer, s = Lipschitz([W], lr=0.1, w_max=0.8), math.sqrt(20 / 12)
    G = torch.randn(20, 12)
    for _ in range(30):
        W.grad = G + 0.1 * torch.randn(20, 12)
        optimizer.step()
        assert torch.linalg.matrix_norm(W.detach(), 2) <= 0.8 * s * (1 + 1e-5)
    assert torch.linalg.matrix_norm(W.detach(), 2) > 0.7 * s  # and the ball is used
    with pytest.raises(ValueError, match=r"w_max = 0\.1"):
        Lipschitz([W], lr=0.1, w_max=0.1)


def test_rounding_to_int8_is_off_by_half_a_unit_at_most():
    torch.manual_seed(0)
    M = torch.randn(2, 3, 5000) * torch.logspace(-3, 3, 3)[:, None]
    Z, scale = torch.zeros(M.shape, dtype=torch.int8), torch.zeros(2, 3, 3)
    muon8bit.quantise(M, Z, scale)
    units = scale.repeat_interleave(2048, -1)[..., :5000]
    assert ((muon8bit.restore(Z, scale) - M).abs() <= 0.501 * units).all() and Z.abs().max() == 127
    muon8bit.quantise(0 * M, Z, scale)
    assert not muon8bit.restore(Z, scale).any()


def test_zero_gradients_do_not_move_weights():
    for name in NAMES:
        W = torch.nn.Parameter(0.01 * torch.eye(6))
        optimizer = optimizer_class(f"zoo:{name}")([W], lr=0.1, weight_decay=0.0)
        for _ in range(2):
            optimizer.step()  # without a gradient, which counts as zero
        moved = 1e-3 if name == "lipschitz" else 0.0  # whose cap contracts by the step's bound
        assert relative(W, 0.01 * torch.eye(6)) <= moved, name


# -------------------------------------------------------------------------------------- settings


def test_they_have_normuons_settings_and_rates_of_their_own(tiny):
    assert default_lr("zoo:auon") == 0.24 and default_lr("torch.optim:SGD") is None
    chosen = ["optim.name=zoo:auon", "optim.options=hybrid=True", "optim.ns_steps=3"]
    settings = load([*tiny, *chosen, "optim.momentum=0.9", "optim.nesterov=false"])[0].optim
    model = GPT(GPTConfig(n_layer=1, n_head=2, n_embd=32, vocab_size=64))
    optimizer = make_optimizers(model, settings, torch.float32)[0]
    (group,) = optimizer.param_groups
    assert group["hybrid"] and group["ns_steps"] == 3 and group["ns_dtype"] == torch.float32
    assert (group["momentum"], group["nesterov"]) == (0.9, False)
    Schedule(8, settings).set([optimizer], 0)
    assert group["momentum"] == settings.momentum_start
    with pytest.raises(config.ConfigError, match=r"has no gamma; it has .*hybrid"):
        make_optimizers(model, load([*tiny, *chosen[:1], "optim.options=gamma=2"])[0].optim)
    with pytest.raises(config.ConfigError, match='did you mean "zoo:lanton"'):
        load([*tiny, "optim.name=zoo:lantom"])
    with pytest.raises(ValueError, match=r"AuON.*\(8,\)"):
        optimizer_class("zoo:auon")([torch.nn.Parameter(torch.zeros(8))])


def test_a_file_may_name_them(tiny, tmp_path):
    """They belong to the package, as other packages' optimizers do not."""
    (tmp_path / "a.toml").write_text('[optim]\nname = "zoo:reg"\n')
    (tmp_path / "b.toml").write_text('[optim]\nname = "x/reg.py:REG"\n')
    for name, trusted in (("a", True), ("b", False)):
        found = load([*tiny, str(tmp_path / f"{name}.toml")])[0].optim.name
        assert isinstance(found, config.FromFile) is not trusted


# ----------------------------------------------------------------------------------- checkpoints


@pytest.mark.parametrize("name", NAMES)
def test_state_moves_to_another_optimizer_bitwise(name):
    found, again = worker.train(name, None), worker.train(name, None, again=True)
    assert all(torch.equal(again[key], W) for key, W in found.items())


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_a_run_resumes_bitwise(name, tiny, tmp_path):
    rate = default_lr(f"zoo:{name}")
    quiet = ["train.sample_tokens=0", "train.eval_every=0", "train.steps=4", "model.n_layer=1"]
    arguments = [*tiny, *quiet, f"optim.name=zoo:{name}", f"optim.lr={rate}"]
    run(arguments, tmp_path / "a")
    run([*arguments, "train.stop_at=2"], tmp_path / "b")
    run([str(tmp_path / "b/config.toml"), "train.stop_at=0"], tmp_path / "b", True)
    assert final(tmp_path / "a") == final(tmp_path / "b")


@pytest.mark.parametrize("name", NAMES)
def test_names_of_buffers_mean_what_they_mean_in_normuon(name):
    """`diagnose` takes a run's momentum and second moment by their names."""
    W = torch.nn.Parameter(torch.randn(8, 6))
    state = optimizer_class(f"zoo:{name}")([W]).state[W]
    theirs = NorMuon([W]).state[W]
    for key in state.keys() & theirs.keys():
        assert (state[key].shape, state[key].dtype) == (theirs[key].shape, theirs[key].dtype), key


def test_the_estimate_of_a_checkpoint_counts_bytes_not_numbers():
    model = GPT(GPTConfig(n_layer=1, n_head=2, n_embd=32, vocab_size=64))
    for name in NAMES:
        optimizers = make_optimizers(model, config.OptimConfig(name=f"zoo:{name}"))[:1]
        weights, buffers = checkpoint.named_state(model, optimizers)
        exact = sum(t.nbytes for t in (*weights.values(), *buffers.values()))
        assert checkpoint.size_of(model, optimizers) == exact, name


@pytest.mark.slow
def test_int8_momentum_is_a_quarter_on_disk(tiny, tmp_path):
    sizes = {}
    quiet = ["train.sample_tokens=0", "train.eval_every=0", "train.steps=1"]
    for name in ("normuon", "zoo:normuon8bit"):
        out = tmp_path / name[:3]
        run([*tiny, *quiet, f"optim.name={name}"], out)
        (file,) = out.glob("checkpoints/*/optimizer.safetensors")
        state = read_tensors(file)
        keys = (".momentum", ".momentum_int8", ".momentum_scale", ".second_moment")
        own = {k: t for k, t in state.items() if k.endswith(keys)}
        weights = sum(t.numel() for k, t in own.items() if k.endswith(keys[:2]))
        sizes[name] = sum(t.nbytes for t in own.values()) / weights
        kinds = {t.dtype for k, t in own.items() if k.endswith(keys[:2])}
        assert kinds == {torch.float32 if name == "normuon" else torch.int8}
    assert sizes["normuon"] == pytest.approx(4 + 4 / 40, abs=0.1)  # rows of 32 to 85 weights
    with pytest.raises(CheckpointError, match="no momentum of"):  # in float32, which it reads
        spectra.diagnose(tmp_path / "zoo")
    assert sizes["zoo:normuon8bit"] == pytest.approx(1 + 8 / 40, abs=0.1)


# --------------------------------------------------------------------------------- several ranks


@pytest.fixture(scope="module")
def ranks(forks, tmp_path_factory):
    """What two processes make of every neighbour, on each layout."""
    folder = tmp_path_factory.mktemp("zoo")
    codes, said = forks.run([folder], 2, program="zoo_worker.py")
    assert codes == [0, 0], said
    return load_file(folder / "tensors.safetensors"), json.loads(
        (folder / "facts.json").read_text()
    )


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_two_ranks_equal_one_process(kind, ranks):
    for name in NAMES:
        found = {k.split("/")[2]: t for k, t in ranks[0].items() if k.startswith(f"{kind}/{name}/")}
        agree(found, worker.train(name, None), f"{name}, {kind}")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["normuon8bit", "dropmuon", "cosmos"])
def test_a_canonical_run_is_the_same_sharded_and_resumed_elsewhere(name, tiny, forks, tmp_path):
    """State of every shape goes through the bitwise mode, FSDP2's checkpoint and one process."""
    quiet = ["train.sample_tokens=0", "train.eval_every=0", "train.steps=4", "model.n_layer=1"]
    own = ["train.canonical=true", "train.micro_batch=6", f"optim.name=zoo:{name}"]
    run([*tiny, *quiet, *own], tmp_path / "a")
    more = ["train.parallel=fsdp", "train.stop_at=2", "--out", tmp_path / "b"]
    codes, said = forks.run([*tiny, *quiet, *own, *more], ranks=2)
    assert codes == [0, 0], said
    run([*tiny, *quiet, *own], tmp_path / "b", True)
    assert final(tmp_path / "a") == final(tmp_path / "b")


@pytest.mark.slow
def test_state_is_resharded_and_what_cannot_be_exact_is_refused(ranks):
    facts = ranks[1]
    assert facts["resharded"] == dict.fromkeys(NAMES, True)
    assert "LANTON" in facts["refused"] and "expected" in facts["refused"]


# ---------------------------------------------------------------------------------------- the files


@pytest.mark.parametrize("file", sorted((ROOT / "nanonormuon/lab/zoo").glob("*.py")), ids=Path)
def test_a_file_fits_one_screen_and_imports_the_optimizer_alone(file):
    text = file.read_text()
    assert len(text.splitlines()) <= 90
    for node in ast.walk(ast.parse(text)):
        names = [node.module] if isinstance(node, ast.ImportFrom) else []
        names += [a.name for a in node.names] if isinstance(node, ast.Import) else []
        for name in names:
            own = name == "nanonormuon.normuon" or name.startswith("nanonormuon.lab.zoo.")
            assert own or name.partition(".")[0] in {"torch", *sys.stdlib_module_names}, name
