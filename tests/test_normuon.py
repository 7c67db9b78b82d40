"""NorMuon in one process: equal to the authors' published code, to the paper's Algorithm 1 and to a
plain twin after every step; Muon equal to torch's; no harm from zero, missing or rank-deficient
gradients."""

import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from support import agree, relative
from torch._dynamo.utils import counters
from torch._inductor.utils import run_and_get_code
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from twin import Twin, orthogonalise, trajectories

from nanonormuon import NorMuon, normuon
from nanonormuon.normuon import MUON, POLAR_EXPRESS, newton_schulz
from nanonormuon.runtime.compilation import compiled_step

GOLDEN = load_file(Path(__file__).parent / "golden" / "normuon.safetensors")
FP32 = {"ns_dtype": torch.float32}
PAPER = {"lr": 0.004, "nesterov": False, "adjust_lr_fn": "match_rms_adamw", **FP32}
VARIANTS = {
    "official_fp32": ({"lr": 0.02, **FP32}, 1e-5),
    "official_fp32_no_nesterov": ({"lr": 0.02, "nesterov": False, **FP32}, 1e-5),
    "official_bf16": ({"lr": 0.02}, 2e-2),
    "paper": (PAPER, 1e-5),
}


def train(W, grads, optimizer=NorMuon, **settings):
    """The weights after each step."""
    p = torch.nn.Parameter(W.clone())
    optimizer = optimizer([p], **settings)
    for G in grads:
        p.grad = G.clone()
        optimizer.step()
        assert torch.equal(p.grad, G), "the gradient was written to"
        yield p.detach().clone()


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("case", range(6))
def test_golden_trajectories(case, variant):
    settings, tolerance = VARIANTS[variant]
    W, grads = GOLDEN[f"case{case}.weight0"], GOLDEN[f"case{case}.grads"]
    wanted = GOLDEN[f"case{case}.{variant}"]
    found = list(train(W, grads, weight_decay=0.1, **settings))
    assert len(found) == len(wanted) == 6
    for step, (a, b) in enumerate(zip(found, wanted)):
        agree(a, b, tolerance, f"case {case}, {variant}, step {step}")


def test_the_golden_numbers_can_be_made_anew():
    """As twin.py does when an update is changed on purpose; a failure says how."""
    made = trajectories(GOLDEN)
    assert made.keys() == GOLDEN.keys()
    for name, wanted in GOLDEN.items():
        agree(made[name], wanted, 2e-3 if "bf16" in name else 1e-6, name)
    with pytest.raises(
        AssertionError, match=r"(?s)off by .*authors' published code.*tests/twin\.py"
    ):
        agree(made["case0.paper"] + 1, GOLDEN["case0.paper"], 1e-6, "case 0")


@pytest.mark.parametrize("shape", [(8, 8), (24, 10), (10, 24), (2, 40)])
@pytest.mark.parametrize("axis", ["rows", "longest"])
@pytest.mark.parametrize("adjust", ["original", "match_rms_adamw"])
@pytest.mark.parametrize("nesterov", [True, False])
@pytest.mark.parametrize("cautious", [True, False])
def test_equals_the_plain_twin(shape, axis, adjust, nesterov, cautious):
    torch.manual_seed(1)
    W, grads = torch.randn(shape).double(), torch.randn(6, *shape).double()
    shared = {"lr": 0.03, "weight_decay": 0.2, "nesterov": nesterov, "cautious": cautious}
    twin = Twin(W, axis=axis, adjust=adjust, **shared)
    ours = train(W, grads, neuron_axis=axis, adjust_lr_fn=adjust, ns_dtype=torch.float64, **shared)
    for G, found in zip(grads, ours):
        agree(found, twin.step(G), 1e-6, "twin")  # the second moment is float32


@pytest.mark.parametrize("adjust", ["original", "match_rms_adamw"])
@pytest.mark.parametrize("shape", [(16, 16), (48, 16), (16, 48)])
def test_without_beta2_it_is_torchs_muon(shape, adjust):
    torch.manual_seed(2)
    W, grads = torch.randn(shape), torch.randn(5, *shape)
    settings = {"lr": 0.02, "weight_decay": 0.1, "adjust_lr_fn": adjust}
    ours = train(W, grads, beta2=None, **settings)
    for a, b in zip(ours, train(W, grads, torch.optim.Muon, **settings)):
        # both iterate in bfloat16, in another order of operations
        assert (error := relative(a, b)) < 5e-3, (
            f"off by {error:.2g} from torch.optim.Muon, which NorMuon without beta2 is: if the "
            "momentum or the iteration was changed on purpose, this test can go"
        )


def test_newton_schulz_serves_a_stack_as_it_serves_each_matrix():
    torch.manual_seed(3)
    polar = [(8.156554524902461, -22.48329292557795, 15.878769915207462), *POLAR_EXPRESS[1:]]
    for shape in [(5, 12, 12), (3, 20, 6), (4, 6, 20), (2, 521, 530), (1, 516, 1040)]:
        X = torch.randn(shape).double()
        for triples, plain, safety in ((MUON, MUON, 1.0), (POLAR_EXPRESS, polar, 1.02)):
            for found, x in zip(newton_schulz(X, triples), X):
                assert relative(found, orthogonalise(x, plain, safety)) < 1e-8


@pytest.mark.parametrize(
    ("settings", "limits"),
    [
        ({}, (0.6, 1.25)),  # Muon's coefficients leave the singular values in this band
        ({"ns_coefficients": POLAR_EXPRESS}, (0.85, 1.15)),
        ({"ns_coefficients": (2.0, -1.5, 0.5), "ns_steps": 12}, (0.99, 1.01)),
    ],
)
def test_coefficients_bring_the_singular_values_near_one(settings, limits):
    torch.manual_seed(4)
    p = torch.nn.Parameter(torch.zeros(24, 64))
    optimizer = NorMuon([p], **settings)
    assert len(optimizer.ns_coefficients) == settings.get("ns_steps", 5)
    values = torch.linalg.svdvals(newton_schulz(torch.randn(1, 24, 64), optimizer.ns_coefficients))
    assert limits[0] < values.min() and values.max() < limits[1]


def test_every_neuron_moves_at_the_same_rate_and_the_norm_is_the_adjusted_one():
    torch.manual_seed(5)
    m, n = 32, 12
    G = torch.randn(m, n) * torch.logspace(-2, 1, m)[:, None]
    (W,) = train(torch.zeros(m, n), [G], lr=1.0, weight_decay=0.0, adjust_lr_fn="match_rms_adamw")
    rates = W.square().mean(1).sqrt()
    assert torch.allclose(rates, torch.full((m,), 0.2), rtol=1e-2)
    (W,) = train(torch.zeros(n, m), [G.T], lr=1.0, weight_decay=0.0, adjust_lr_fn="match_rms_adamw",
                 neuron_axis="longest")  # fmt: skip
    assert torch.allclose(W.square().mean(0).sqrt(), torch.full((m,), 0.2), rtol=1e-2)


@pytest.mark.parametrize("scale", ["original", "match_rms_adamw"])
def test_zero_missing_and_rank_deficient_gradients_stay_finite(scale):
    torch.manual_seed(6)
    W = torch.randn(12, 8)
    for G in (
        torch.zeros(12, 8),
        torch.outer(torch.randn(12), torch.randn(8)),
        torch.eye(12, 8) * 1e-30,
    ):
        for found in train(W, [G] * 3, adjust_lr_fn=scale):
            assert found.isfinite().all()
    zero = torch.zeros(12, 8)
    (found,) = train(W, [zero], lr=0.1, weight_decay=0.5, adjust_lr_fn=scale)
    assert torch.allclose(found, W * 0.95)
    p, q = torch.nn.Parameter(W.clone()), torch.nn.Parameter(W.clone())
    optimizer = NorMuon([p, q], lr=0.1, adjust_lr_fn=scale)
    p.grad = torch.randn(12, 8)
    optimizer.step()  # q has none: it counts as zero
    assert torch.allclose(q.detach(), W * 0.99) and not torch.allclose(p.detach(), W * 0.99)


def test_a_stack_is_updated_matrix_by_matrix():
    torch.manual_seed(7)
    W, grads = torch.randn(3, 10, 6), torch.randn(4, 3, 10, 6)
    *_, stacked = train(W, grads, **FP32)
    for i in range(3):
        *_, single = train(W[i], grads[:, i], **FP32)
        assert relative(stacked[i], single) < 1e-6


def test_state_exists_from_construction_and_survives_a_state_dict():
    torch.manual_seed(8)
    W, grads = torch.randn(6, 9), torch.randn(6, 6, 9)
    p = torch.nn.Parameter(W.clone())
    optimizer = NorMuon([p], lr=0.02)
    assert {k: v.shape for k, v in optimizer.state[p].items()} == {
        "momentum": (6, 9),
        "second_moment": (6, 1),
    }
    *_, wanted = train(W, grads, lr=0.02)
    for G in grads[:3]:
        p.grad = G
        optimizer.step()
    q = torch.nn.Parameter(p.detach().clone())
    second = NorMuon([q], lr=0.5)
    second.load_state_dict(optimizer.state_dict())
    for G in grads[3:]:
        q.grad = G
        second.step()
    assert torch.equal(q.detach(), wanted)


def test_the_second_moment_of_bfloat16_weights_stays_float32_through_a_state_dict():
    torch.manual_seed(8)
    p = torch.nn.Parameter(torch.randn(6, 9).bfloat16())
    optimizer, second = NorMuon([p]), NorMuon([p])
    p.grad = torch.randn(6, 9).bfloat16()
    optimizer.step()
    second.load_state_dict(optimizer.state_dict())
    a, b = optimizer.state[p]["second_moment"], second.state[p]["second_moment"]
    assert b.dtype == torch.float32 and torch.equal(a, b) and a is not b


class Launches(TorchDispatchMode):
    """Counts the kernels that a GPU would launch: one per operation that is no view; for lists one
    too if what belongs together has one shape, dtype and order in memory, else one per entry."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        lists = [a for a in args if isinstance(a, list | tuple) and "_foreach" in func.__name__]
        kinds = [{(t.shape, t.dtype, t.stride()) for t in ts} for ts in zip(*lists)]
        alike = all(len(kind) == 1 for kind in kinds)
        view = any(a.alias_info and not a.alias_info.is_write for a in func._schema.arguments)
        free = view or any(name in func.__name__ for name in ("empty", "record_function", "_view"))
        self.count += 0 if free else 1 if alike else len(lists[0])
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(("settings", "launches"), [({}, 134), ({"cautious": True}, 152)])
@pytest.mark.parametrize("layers", [1, 12])
def test_a_steps_launches_do_not_grow_with_the_layers(layers, settings, launches):
    """The shapes of gpt2-124m's matrices, on a device that only notes what it is given."""
    C, hidden = 768, 2048
    shapes = ([(C, C)] * 4 + [(hidden, C)] * 2 + [(C, hidden)]) * layers
    params = [torch.nn.Parameter(torch.empty(shape, device="meta")) for shape in shapes]
    for p in params:
        p.grad = torch.empty_like(p)
    optimizer = NorMuon(params, **settings)
    with Launches() as seen:
        optimizer.step()
    assert seen.count <= launches, (
        f"{seen.count} launches a step, {launches} before: if the update was changed on purpose, "
        "write the new number here; what must not happen is that it grows with the layers"
    )


@pytest.mark.slow
def test_a_compiled_step_is_one_graph_that_schedules_do_not_recompile():
    """Every kind of matrix; equal to the eager step; launches as inductor fuses on a CPU."""
    torch.manual_seed(8)
    W = [torch.randn(s) for s in ((12, 12), (12, 12), (12, 40), (40, 12), (3, 8, 12))]
    plain, fused = ([torch.nn.Parameter(w.clone()) for w in W] for _ in range(2))
    settings = {**FP32, "neuron_axis": "longest"}
    eager, compiled = NorMuon(plain, **settings), NorMuon(fused, **settings)
    torch._dynamo.reset()
    counters.clear()
    step = compiled_step(compiled, "aot_eager")
    for i in range(4):
        rates = {"lr": 0.1 / (1 + i), "momentum": 0.85 + 0.03 * i}
        for optimizer in (eager, compiled):
            optimizer.param_groups[0] |= rates
        for p, q in zip(plain, fused):
            p.grad = torch.randn(p.shape)
            q.grad = p.grad.clone()
        eager.step()
        step()
        assert rates.items() <= compiled.param_groups[0].items()
    assert counters["stats"]["unique_graphs"] == 1 and not counters["graph_break"]
    for p, q in zip(plain, fused):
        assert relative(q.detach(), p.detach()) < 1e-5


@pytest.mark.slow
def test_a_compiled_step_takes_at_most_80_launches():
    """The kinds of matrices of gpt2-124m. Counts what inductor calls: products, fused loops."""
    shapes = ([(32, 32)] * 4 + [(96, 32)] * 2 + [(32, 96)]) * 2
    optimizer = NorMuon([torch.nn.Parameter(torch.randn(shape)) for shape in shapes])
    for p in optimizer.param_groups[0]["params"]:
        p.grad = torch.randn(p.shape)
    torch._dynamo.reset()
    (code,) = run_and_get_code(compiled_step(optimizer, "inductor"))[1]
    body = code.partition("def call(")[2]
    calls = re.findall(r"^ +(?:extern_kernels\.|aten\.|cpp_fused)\w*", body, re.M)
    assert 40 < len(calls) <= 80


# singular values of hard cases, as functions of the position i in 0..1
SPECTRA = {
    "random": None,
    "flat": lambda i: 1 + 0 * i,
    "one over k": lambda i: 1 / (1 + i * len(i)),
    "condition 1e3": lambda i: 10 ** (-3 * i),
    "condition 1e6": lambda i: 10 ** (-6 * i),
    "half the rank": lambda i: (i < 0.5).double(),
    "rank 8": lambda i: (i * len(i) < 8).double(),
    "rank 1 and noise": lambda i: torch.where(i == 0, 1.0, 1e-3),
}


@pytest.mark.parametrize(
    ("spectrum", "shape"),
    [(s, shape) for s in SPECTRA for shape in ((64, 64), (64, 172), (64, 256))]
    + [("one over k", (520, 1040))],
)
def test_in_bfloat16_it_errs_at_most_twice_as_much_as_the_plain_iteration(spectrum, shape):
    """Two iterations at a time on oblong matrices, where bfloat16's rounding of X X^T could grow:
    error against float64, beside the plain iteration's in bfloat16."""
    torch.manual_seed(11)
    X = torch.randn(shape).double()
    if SPECTRA[spectrum]:
        U, S, V = torch.linalg.svd(X, full_matrices=False)
        X = U * SPECTRA[spectrum](torch.arange(len(S)).double() / len(S)) @ V
    exact = orthogonalise(X)
    plain = relative(orthogonalise(X.bfloat16()), exact)
    assert relative(newton_schulz(X.bfloat16()[None])[0], exact) < 2 * plain


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_other_parameter_dtypes(dtype):
    torch.manual_seed(9)
    W, grads = torch.randn(6, 9, dtype=dtype), torch.randn(3, 6, 9, dtype=dtype)
    *_, found = train(W, grads)
    *_, wanted = train(W.float(), grads.float())
    assert found.dtype == dtype and relative(found, wanted) < (
        2e-2 if dtype == torch.bfloat16 else 5e-3
    )


def test_torchs_schedulers_drive_it():
    p = torch.nn.Parameter(torch.randn(4, 4))
    optimizer = NorMuon([p], lr=0.1)
    scheduler = torch.optim.lr_scheduler.LinearLR(optimizer, 0.5, total_iters=2)
    before, p.grad = p.detach().clone(), torch.zeros(4, 4)
    optimizer.step()
    assert torch.allclose(p.detach(), before * (1 - 0.05 * 0.1))
    scheduler.step()
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.075)


@pytest.mark.parametrize(
    ("shape", "settings", "words"),
    [
        ((5,), {}, "AdamW"),
        ((1, 8), {}, "at least 2 x 2"),
        ((2, 3, 4, 5), {}, "stack of them"),
        ((4, 4), {"neuron_axis": "column"}, "rows or longest"),
        ((4, 4), {"adjust_lr_fn": "rms"}, "match_rms_adamw"),
        ((4, 4), {"momentum": 1.0}, "below 1"),
    ],
)
def test_refusals_say_what_is_expected(shape, settings, words):
    with pytest.raises(ValueError, match=words):
        NorMuon([torch.nn.Parameter(torch.zeros(shape))], **settings)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_the_products_by_bands_read_no_memory_that_they_have_not_written(dtype):
    """The same bits when new tensors are full of NaN, which 0 times NaN would be too."""
    random = torch.Generator().manual_seed(8)
    X = [torch.randn(shape, generator=random).to(dtype) for shape in ((2, 512, 512), (1, 520, 800))]
    wanted = [newton_schulz(x) for x in X]
    torch.use_deterministic_algorithms(True)  # with it fresh memory is filled
    try:
        assert torch.utils.deterministic.fill_uninitialized_memory and torch.empty(9).isnan().all()
        assert all(torch.equal(newton_schulz(x), want) for x, want in zip(X, wanted))
    finally:
        torch.use_deterministic_algorithms(False)


class Late:
    """A collective's handle that needs the input's memory as late as when it is waited on."""

    def __init__(self, sent):
        self.memory = StorageWeakRef(sent.untyped_storage())

    def wait(self):  # None, as of some backends
        assert not self.memory.expired(), "what is being sent was freed"


@pytest.mark.parametrize("kind", ["Replicated", "RowSharded"])
def test_the_input_of_a_collective_lives_until_it_is_waited_on(kind, monkeypatch):
    started = []

    def collective(received, sent, *more, async_op):
        received.copy_(sent)
        started.append(Late(sent))
        return started[-1]

    monkeypatch.setattr(normuon.dist, "get_rank", lambda group: 0)
    monkeypatch.setattr(normuon.dist, "get_world_size", lambda group: 1)
    monkeypatch.setattr(normuon.dist, "all_to_all_single", collective)
    monkeypatch.setattr(normuon, "all_gather", collective)
    replicated = kind == "Replicated"
    layout = normuon.Replicated(3, None) if replicated else normuon.RowSharded(3, 4, None)
    X = torch.randn(3, 4, 5)
    arriving = layout.to_parts(layout.to_whole(X)())
    assert torch.equal(arriving(), X) and len(started) == (1 if replicated else 2)
