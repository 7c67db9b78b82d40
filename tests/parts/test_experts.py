"""Experts compute what a loop over tokens does, their load is counted once whatever the layout, and
a run with them is as exact as any other."""

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from support import final, relative, run
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from nanonormuon import param_groups
from nanonormuon.config import OptimConfig
from nanonormuon.engine import Engine
from nanonormuon.model import GPT, Cache, GPTConfig
from nanonormuon.optim import make_optimizers
from nanonormuon.parts import experts
from nanonormuon.runtime.activations import checkpoint_activations
from nanonormuon.runtime.distributed import World
from nanonormuon.storage.run import read_rows

SMALL = {"vocab_size": 64, "n_layer": 2, "n_head": 2, "n_embd": 32, "mlp": "experts"}
SMALL |= {"n_expert": 8, "n_expert_used": 2, "expert_hidden": 24}
SOFTMAX = {"router": "softmax", "n_expert_shared": 0, "balance_rate": 0.0}
KINDS = [
    {},
    {**SOFTMAX, "router_norm": False},
    {"n_expert_group": 4, "n_group_used": 2, "router_scale": 2.5},
]
RUN = ["model.mlp=experts", "model.n_expert=5", "model.n_expert_used=2", "model.n_dense=1"]


def filled(**settings):
    """A model in which no parameter and no bias is zero."""
    model = GPT(GPTConfig(**{**SMALL, **settings})).init_weights(0)
    random = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in [*model.parameters(), *model.buffers()]:
            p.add_(0.2 * torch.randn(p.shape, generator=random))
    return model


def engine_of(model):
    def make(model):
        return make_optimizers(model, OptimConfig(), torch.float32)

    return Engine(model, make, World(0, 1, torch.device("cpu")))


def tokens_and_targets(sequences=6):
    return torch.randint(64, (2, sequences, 16), generator=torch.Generator().manual_seed(2))


# ------------------------------------------------------------------------------------------------
# What is computed


@pytest.mark.parametrize("counts", [[3, 0, 4, 1], [0, 0, 8, 0], [2, 2, 2, 2]])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_grouped_product_and_its_gradients_are_a_loops(counts, dtype):
    """Experts that no token visits have the gradient zero, and dy may be a view."""
    torch.manual_seed(0)
    x, W = torch.randn(8, 16, dtype=dtype), torch.randn(4, 24, 16, dtype=dtype)
    ends, starts = torch.tensor(counts).cumsum(0), [0, *torch.tensor(counts).cumsum(0).tolist()]
    results = []
    for product in (
        lambda x, W: experts.Grouped.apply(x, W, ends.to(torch.int32)),
        lambda x, W: torch.cat([x[i:j] @ w.T for w, i, j in zip(W, starts, starts[1:])]),
    ):
        leaves = x.clone().requires_grad_(), W.clone().requires_grad_()
        y = product(*leaves)
        (y * torch.ones(()).expand_as(y)).sum().backward()
        results.append([y, *(leaf.grad for leaf in leaves)])
    for ours, loops in zip(*results):
        assert relative(ours, loops) < (1e-5 if dtype == torch.float32 else 1e-2)
    assert not results[0][2][torch.tensor(counts) == 0].any()


def test_the_gradient_of_an_idle_expert_is_zero_whatever_a_kernel_leaves_there(monkeypatch):
    real = F.grouped_mm

    def careless(a, b, offs):
        out = real(a, b, offs=offs)
        if b.ndim == 2:
            out[offs.diff(prepend=offs.new_zeros(1)) == 0] = torch.nan
        return out

    monkeypatch.setattr(F, "grouped_mm", careless)
    W = torch.randn(3, 8, 8, requires_grad=True)
    ends = torch.tensor([2, 2, 4], dtype=torch.int32)
    experts.Grouped.apply(torch.randn(4, 8), W, ends).square().sum().backward()
    assert W.grad.isfinite().all() and not W.grad[1].any() and W.grad[0].any()


def plain(layer, x):
    """What one token (C,) becomes, by the formulas, and the experts that it visits."""
    c, gate = layer.gate.config, layer.gate
    logits = gate.weight @ x
    scores = logits.sigmoid() if c.router == "sigmoid" else logits.softmax(0)
    bias = gate.e_score_correction_bias
    ranked = scores if bias is None else scores + bias
    size = c.n_expert // c.n_expert_group
    groups = sorted(range(c.n_expert_group), key=lambda g: -sum(
        sorted(ranked[g * size : (g + 1) * size].tolist())[-2:]))  # fmt: skip
    allowed = [e for g in groups[: c.n_group_used] for e in range(g * size, (g + 1) * size)]
    allowed = allowed if c.n_expert_group > 1 else range(c.n_expert)
    chosen = sorted(allowed, key=ranked.tolist().__getitem__, reverse=True)[: c.n_expert_used]
    weights = torch.stack([scores[e] for e in chosen])
    weights = c.router_scale * (weights / weights.sum() if c.router_norm else weights)
    y = 0 if layer.shared_experts is None else layer.shared_experts(x)
    for e, weight in zip(chosen, weights):
        up, down = layer.experts.up_proj[e], layer.experts.down_proj[e]
        y = y + weight * (down @ (F.silu(layer.experts.gate_proj[e] @ x) * (up @ x)))
    return y, chosen


@pytest.mark.parametrize("settings", KINDS)
def test_a_layer_is_its_formulas_token_by_token(settings):
    layer = filled(**settings).layers[1].mlp
    x = torch.randn(2, 5, 32, generator=torch.Generator().manual_seed(3))
    y, routed = layer(x)
    expected = [plain(layer, token) for token in x.flatten(0, 1)]
    assert relative(y, torch.stack([found for found, _ in expected]).view_as(y)) < 1e-5
    visits = torch.tensor([chosen for _, chosen in expected])
    assert torch.equal(routed.load, visits.flatten().bincount(minlength=8))
    parameters = list(layer.parameters())
    ours = torch.autograd.grad(y.square().sum(), parameters)
    theirs = torch.autograd.grad(
        sum(found.square().sum() for found, _ in expected), parameters, allow_unused=True
    )
    for a, b in zip(ours, theirs):
        assert relative(a, b) < 1e-5


@pytest.mark.parametrize("settings", KINDS)
def test_generation_with_a_cache_is_generation_without(settings):
    model, tokens = filled(**settings), tokens_and_targets(2)[0]
    cache = Cache(model, 2, 16)
    with torch.no_grad():
        steps = [model(tokens[:, :4], cache=cache)]
        steps += [model(tokens[:, i : i + 1], cache=cache) for i in range(4, 16)]
        assert relative(torch.cat(steps, 1), model(tokens)) < 1e-5


def test_leading_layers_are_dense_and_only_visited_experts_count():
    model = GPT(GPTConfig(**SMALL, n_dense=1, n_hidden=64))
    assert [type(layer.mlp).__name__ for layer in model.layers] == ["MLP", "Experts"]
    stacks = 3 * 32 * 24  # of one expert
    assert model.unvisited() == 6 * stacks
    products = 8 * 32 * 32 + 3 * 32 * 64 + 8 * 32 + 3 * stacks + 64 * 32
    assert model.flops_per_token(16) == 6 * products + 6 * 2 * 32 * 16
    widths = {GPTConfig(**{**SMALL, "expert_hidden": 0, "n_expert_used": k}).resolved().
              expert_hidden for k in (2, 3, 5)}  # fmt: skip
    assert widths == {48, 32}  # 128 over 3, 4 and 6 visited ones, in sixteens


# ------------------------------------------------------------------------------------------------
# Even load


@pytest.mark.parametrize("count", [1, 2, 6])
@pytest.mark.parametrize("recompute", [False, True])
def test_load_is_counted_once_whatever_the_micro_batch(count, recompute):
    """Also if activations are recomputed in the backward pass; and an abandoned attempt, or an
    evaluation, does not count."""
    model = filled(balance_loss=0.1)
    whole = engine_of(filled(balance_loss=0.1))
    whole.accumulate(iter([tokens_and_targets()]), 1)
    if recompute:
        checkpoint_activations(model)
    engine, (tokens, targets) = engine_of(model), tokens_and_targets()
    size = 6 // count
    batches = [(tokens[i : i + size], targets[i : i + size]) for i in range(0, 6, size)]
    engine.accumulate(iter(batches), count)  # given up
    engine.zero_grad()
    with torch.no_grad():
        model(tokens, targets)
    engine.accumulate(iter(batches), count)
    load = engine.extras[0].visits
    assert torch.equal(load, whole.extras[0].visits) and load.sum() == 2 * tokens.numel() * 2
    for p, q in zip(model.parameters(), whole.model.parameters()):
        assert relative(p.grad, q.grad) < 1e-5
    row, wanted = engine.extras[0].row(), whole.extras[0].row()
    assert row == pytest.approx(wanted, rel=1e-5) and 0 < row["router_entropy"] <= 1
    assert row["expert_load_max"] == pytest.approx(float(load.max() / load[0].double().mean()))


def test_the_bias_rule_is_the_papers():
    """Against a plain twin: after each update, u sign(mean load - load)."""
    model = filled(balance_rate=0.25)
    engine = engine_of(model)
    wanted = [layer.mlp.gate.e_score_correction_bias.clone() for layer in model.layers]
    for _ in range(3):
        with torch.no_grad():
            model(*tokens_and_targets())
        for bias, routed in zip(wanted, model.routed):
            for i, load in enumerate(routed.load.tolist()):
                mean = float(routed.load.sum()) / 8
                bias[i] += 0.25 * ((load < mean) - (load > mean))
        engine.accumulate(iter([tokens_and_targets()]), 1)
        engine.update()
        engine.zero_grad()
    for layer, bias in zip(model.layers, wanted):
        assert torch.equal(layer.mlp.gate.e_score_correction_bias, bias)


def test_the_auxiliary_loss_leaves_the_loss_and_moves_the_router():
    """Its gradient is that of E sum(f p) per sequence, on average."""
    found = {}
    for weight in (0.0, 0.3):
        model = filled(**SOFTMAX, n_layer=1, balance_loss=weight)
        loss = model(*tokens_and_targets())
        loss.backward()
        found[weight] = loss.item(), model.layers[0].mlp.gate.weight.grad
        auxiliary = 0
        (x,) = kept(model.layers[0].mlp, lambda model=model: model(*tokens_and_targets()))
        for sequence in x.detach():
            p = F.linear(sequence, model.layers[0].mlp.gate.weight).softmax(-1)
            f = torch.zeros(8).index_add_(0, p.topk(2).indices.flatten(), torch.ones(32))
            auxiliary = auxiliary + 8 * (f / 32 * p.mean(0)).sum() / len(x)
        (slope,) = torch.autograd.grad(auxiliary, model.layers[0].mlp.gate.weight)
    assert found[0.0][0] == found[0.3][0]
    assert relative(found[0.3][1] - found[0.0][1], 0.3 * slope) < 1e-4


def kept(module, forward):
    """The inputs of a module in a forward pass."""
    inputs = []
    handle = module.register_forward_pre_hook(lambda _, args: inputs.append(args[0]))
    forward()
    handle.remove()
    return inputs


def test_every_weight_of_experts_has_its_optimizer():
    """By what modules state of their own parameters, as any module may."""
    groups = {name: g["role"] for g in param_groups(filled()) for name in g["names"]}
    assert groups["layers.0.mlp.gate.weight"] == "vector"
    for name in ("experts.gate_proj", "experts.down_proj", "shared_experts.up_proj.weight"):
        assert groups[f"layers.1.mlp.{name}"] == "matrix"
    module = nn.Module()
    module.W, module.parameter_roles = nn.Parameter(torch.zeros(4, 4)), {"W": "columns"}
    assert param_groups(module)[0]["role"] == "columns"


# ------------------------------------------------------------------------------------------------
# Settings


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"n_expert": 0}, "n_expert = 0: expected 2 to"),
        ({"n_expert_used": 9}, "n_expert_used = 9: expected 1 to 8"),
        ({"n_dense": 3}, "n_dense = 3: expected 0 to 2"),
        ({"n_expert_used": 1}, "router_norm = True: expected false"),
        ({"n_expert_group": 3, "n_group_used": 2}, "a multiple of n_expert_group = 3"),
        ({"n_expert_group": 4, "n_expert_used": 3}, "n_group_used = 1: expected 2 to 4"),
        ({"expert_hidden": 20}, "expert_hidden = 20: expected a multiple of 8"),
        ({"router": "argmax"}, "router = argmax: expected sigmoid or softmax"),
        ({"balance_rate": -0.1}, "balance_rate = -0.1"),
        ({"bias": True}, "bias = True: expected false"),
        ({"mlp": "swiglu"}, "n_expert = 8: expected 0, unless mlp = experts"),
    ],
)
def test_settings_that_do_not_fit_are_refused(settings, words):
    with pytest.raises(ValueError, match=words):
        GPTConfig(**{**SMALL, **settings})


def test_a_model_is_measured_without_computing():
    """Fake tensors pass through in float32 too, which torch's own operation refuses."""
    for dtype in (torch.float32, torch.bfloat16):
        with FakeTensorMode():
            model, tokens = GPT(GPTConfig(**SMALL), dtype), torch.zeros(2, 16, dtype=torch.int64)
            model(tokens, tokens).backward()
            assert model.layers[0].mlp.experts.up_proj.grad.shape == (8, 24, 32)


# ------------------------------------------------------------------------------------------------
# Runs


@pytest.mark.slow
def test_a_run_with_experts_resumes_bitwise(tiny, tmp_path):
    """Its biases too, which have moved by then; files have a tensor per expert."""
    settings = [*tiny, *RUN, "train.eval_every=0", "train.sample_tokens=0", "train.skip_spikes=9"]
    run(settings, tmp_path / "whole")
    run([*settings, "train.stop_at=5"], tmp_path / "parts")
    run(settings, tmp_path / "parts", resume=True)
    assert final(tmp_path / "whole") == final(tmp_path / "parts")
    whole, parts = (read_rows(tmp_path / n / "metrics.jsonl") for n in ("whole", "parts"))
    assert [r["router_entropy"] for r in whole] == [r["router_entropy"] for r in parts]
    row = whole[-1]
    assert 0 < row["expert_load_min"] <= 1 <= row["expert_load_max"] and row["experts_idle"] == 0
    saved = load_file(max((tmp_path / "whole" / "checkpoints").iterdir()) / "model.safetensors")
    assert saved["model.layers.1.mlp.experts.4.up_proj.weight"].shape == (48, 32)
    bias = saved["model.layers.1.mlp.gate.e_score_correction_bias"]
    assert bias.any() and (bias.abs() <= 8 * 0.001 + 1e-7).all()


FSDP = "train.parallel=fsdp"


@pytest.mark.slow
def test_canonical_runs_with_experts_end_in_the_same_bits(tiny, forks, tmp_path):
    settings = [*tiny, *RUN, "train.canonical=true", "train.micro_batch=1", "train.eval_every=0"]
    settings += ["train.sample_tokens=0", "train.steps=3", "model.balance_loss=0.1"]
    for name, ranks, more in (("one", 1, []), ("ddp", 2, []), ("fsdp", 3, [FSDP])):
        codes, said = forks.run([*settings, *more, "--out", tmp_path / name], ranks)
        assert codes == [0] * ranks, said
        assert final(tmp_path / name) == final(tmp_path / "one"), name


@pytest.mark.slow
def test_what_shards_saved_one_process_goes_on_with(tiny, forks, tmp_path):
    """Stacks that do not divide among three ranks, saved one expert at a time; with activations
    recomputed, whose load counts once."""
    settings = [*tiny, *RUN, "train.eval_every=0", "train.sample_tokens=0", "train.micro_batch=2"]
    run(settings, tmp_path / "one")
    more = [FSDP, "train.stop_at=4", "train.activation_checkpointing=true"]
    codes, said = forks.run([*settings, *more, "--out", tmp_path / "shards"], 3)
    assert codes == [0, 0, 0], said
    run(settings, tmp_path / "shards", resume=True)
    pairs = zip(read_rows(tmp_path / "one" / "metrics.jsonl"),
                read_rows(tmp_path / "shards" / "metrics.jsonl"), strict=True)  # fmt: skip
    for one, other in pairs:
        assert one["loss"] == pytest.approx(other["loss"], abs=1e-4)
        assert one["expert_load_max"] == pytest.approx(other["expert_load_max"], abs=0.02)
    one, other = (load_file(max((tmp_path / n / "checkpoints").iterdir()) / "model.safetensors")
                  for n in ("one", "shards"))  # fmt: skip
    name = "model.layers.1.mlp.gate.e_score_correction_bias"
    assert one.keys() == other.keys() and torch.equal(one[name], other[name])
