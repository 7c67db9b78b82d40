"""Every parameter has exactly one optimizer, found by role on any module; schedules are functions
of the step that reach every group."""

import ast
import re
from dataclasses import replace

import pytest
import torch
from torch import nn

from nanonormuon import NorMuon, param_groups
from nanonormuon.config import OptimConfig, load
from nanonormuon.errors import ConfigError
from nanonormuon.model import GPT, GPTConfig
from nanonormuon.normuon import CHOICES
from nanonormuon.optim import Schedule, group_rows, make_optimizers
from nanonormuon.storage.run import aligned

SMALL = GPTConfig(vocab_size=40, n_layer=2, n_head=2, n_embd=16)


def roles(model, **more):
    return {name: g["role"] for g in param_groups(model, **more) for name in g["names"]}


def test_roles_of_our_model():
    found = roles(GPT(SMALL))
    assert found.pop("embed_tokens.weight") == "embedding"
    assert found.pop("lm_head.weight") == "head"
    for name, role in found.items():
        assert role == ("vector" if "norm" in name else "matrix"), name
    assert "lm_head.weight" not in roles(
        GPT(GPTConfig(vocab_size=40, n_layer=1, n_head=2, n_embd=16, tied=True))
    )


def test_a_models_own_roles_count_unless_others_are_asked_for():
    model = GPT(replace(SMALL, n_layer=3, value_embed=True))
    tables = {f"layers.{i}.value_embed.weight" for i in (0, 2)}
    assert {name for name, role in roles(model).items() if role == "value"} == tables
    found = roles(model, roles={"layers.2.value_*": "embedding"})
    assert [found[name] for name in sorted(tables)] == ["value", "embedding"]
    same = roles(model, roles={"*.value_embed.weight": "embedding"})
    assert "value" not in same.values()
    rates = {g["role"]: g["lr"] for o in make_optimizers(model, OptimConfig(value_lr=0.7))
             for g in o.param_groups}  # fmt: skip
    assert rates["value"] == 0.7 != rates["embedding"]


def test_roles_of_a_foreign_module_by_type_and_tying():
    class Foreign(nn.Module):
        def __init__(self, tied):
            super().__init__()
            self.words, self.places = nn.Embedding(30, 8), nn.Embedding(5, 8)
            self.body = nn.TransformerEncoderLayer(8, 2, 16)
            self.gate = nn.Linear(8, 1)
            self.out = nn.Linear(8, 30)
            if tied:
                self.out.weight = self.words.weight

    names = {"body.self_attn.in_proj_weight": "matrix"}
    for tied in (True, False):
        found = roles(Foreign(tied), roles=names)
        assert found["words.weight"] == found["places.weight"] == "embedding"
        assert found.get("out.weight") == (None if tied else "head")
        assert found["gate.weight"] == found["body.norm1.weight"] == found["out.bias"] == "vector"
        assert found["body.linear1.weight"] == found["body.self_attn.out_proj.weight"] == "matrix"
    with pytest.raises(ValueError, match=r"in_proj_weight \(24, 8\).*roles="):
        param_groups(Foreign(True))
    with pytest.raises(ValueError, match="match no parameter"):
        param_groups(GPT(SMALL), {"layers.9.*": "matrix"})
    with pytest.raises(ValueError, match="expected one of matrix"):
        param_groups(GPT(SMALL), {"embed*": "table"})


class Conv1D(nn.Module):
    """As transformers has it: y = x weight + bias, weight (inputs, outputs)."""

    def __init__(self, outputs, inputs):
        super().__init__()
        self.nf, self.nx = outputs, inputs
        self.weight = nn.Parameter(torch.randn(inputs, outputs))
        self.bias = nn.Parameter(torch.zeros(outputs))


def test_matrices_stored_by_input_have_their_neurons_in_columns():
    (columns, biases) = param_groups(nn.ModuleList([Conv1D(6, 4)]))
    assert columns["role"] == columns["neuron_axis"] == "columns" and biases["role"] == "vector"
    square = Conv1D(4, 4)
    square.nf = 5  # another class of that name
    with pytest.raises(ValueError, match="roles="):
        param_groups(nn.ModuleList([square]))


def test_all_parameters_without_a_rule_are_named_with_patterns_that_do():
    class Raw(nn.Module):
        def __init__(self):
            super().__init__()
            self.up, self.down = (nn.Parameter(torch.randn(s)) for s in ((4, 8), (8, 4)))

    model = nn.ModuleDict({"h": nn.ModuleList(Raw() for _ in range(3))})
    with pytest.raises(ValueError) as found:
        param_groups(model)
    assert "h.*.up (4, 8), h.*.down (8, 4)" in str(found.value)
    pattern = re.search(r"roles=({.*?})", str(found.value))[1]
    (group,) = param_groups(model, ast.literal_eval(pattern))
    assert group["role"] == "matrix" and len(group["params"]) == 6
    (group,) = param_groups(model, {"h.*": "columns"})
    assert group["role"] == group["neuron_axis"] == "columns"


@pytest.mark.skipif("columns" not in CHOICES["neuron_axis"], reason="NorMuon has no columns")
@pytest.mark.parametrize("settings", [{}, {"beta2": None}, {"adjust_lr_fn": "match_rms_adamw"}])
@pytest.mark.parametrize("shape", [(6, 4), (4, 6), (5, 5)])
def test_a_matrix_stored_by_input_moves_as_its_transpose_does(shape, settings):
    torch.manual_seed(0)
    layer = nn.ModuleList([Conv1D(*shape)])
    twin = nn.Parameter(layer[0].weight.detach().T.clone())
    (group, _) = param_groups(layer)
    exact = {"ns_dtype": torch.float32, **settings}
    for _ in range(2):
        G = torch.randn(shape)
        for p, grad, options in ((group["params"][0], G.T, group), (twin, G, {})):
            p.grad = grad.clone()
            NorMuon([{**options, "params": [p]}], **exact).step()
    assert torch.allclose(group["params"][0].T, twin, rtol=1e-5, atol=1e-6)


def test_a_hidden_layer_as_wide_as_the_vocabulary_is_no_head():
    model = GPT(GPTConfig(vocab_size=64, n_layer=1, n_head=2, n_embd=16, n_hidden=64, tied=True))
    assert roles(model)["layers.0.mlp.up_proj.weight"] == "matrix"
    assert "head" not in roles(model).values()

    class Ambiguous(nn.Module):  # nothing tells which of the two is the head
        def __init__(self):
            super().__init__()
            self.words, self.up, self.out = nn.Embedding(30, 8), nn.Linear(8, 30), nn.Linear(8, 30)

    with pytest.raises(ValueError, match=r"one head, found up, out"):
        param_groups(Ambiguous())


def test_frozen_parameters_are_left_out():
    model = GPT(SMALL)
    model.embed_tokens.weight.requires_grad_(False)
    assert "embed_tokens.weight" not in roles(model)


@pytest.mark.parametrize("name", ["normuon", "muon", "adamw"])
def test_every_parameter_once_with_its_own_rate(name):
    model = GPT(SMALL)
    settings = OptimConfig(name=name, lr=0.5, embed_lr=0.1, head_lr=0.2, vector_lr=0.3,
                           weight_decay=0.4, adam_weight_decay=0.05)  # fmt: skip
    optimizers = make_optimizers(model, settings)
    held = [p for o in optimizers for g in o.param_groups for p in g["params"]]
    assert len(held) == len({id(p) for p in held}) == len(list(model.parameters()))
    rates = {g["role"]: (g["lr"], g["weight_decay"]) for o in optimizers for g in o.param_groups}
    assert rates == {
        "matrix": (0.5, 0.4),
        "embedding": (0.1, 0.05),
        "head": (0.2, 0.05),
        "vector": (0.3, 0.05),
    }
    kinds = {type(o) for o in optimizers}
    assert kinds == ({torch.optim.AdamW} if name == "adamw" else {NorMuon, torch.optim.AdamW})
    kind = {"normuon": "NorMuon", "muon": "Muon", "adamw": "AdamW"}[name]
    head, *table = group_rows(optimizers)
    assert head == ("parameter", "shape", "role", "optimizer", "lr", "weight_decay")
    assert len(table) == len(held) and {len(row) for row in table} == {len(head)}
    assert ("layers.1.self_attn.q_proj.weight", "16 x 16", "matrix", kind, "0.5", "0.4") in table
    assert ("lm_head.weight", "40 x 16", "head", "AdamW", "0.2", "0.05") in table
    head, *folded = group_rows(optimizers, fold=True)
    assert head[:2] == ("n", "parameter")
    counts = {row[1]: int(row[0]) for row in folded}
    assert counts["*.mlp.up_proj"] == 2 and sum(counts.values()) == len(held)


@pytest.mark.parametrize("name", ["track3-normuon", "moe-a100m", "latent-demo"])
def test_the_table_at_a_runs_start_fits_a_terminal(name):
    config = load([name])[0]
    with torch.device("meta"):
        model = GPT(replace(config.model, vocab_size=100_352).resolved())
    table = aligned(group_rows(make_optimizers(model, config.optim), fold=True))
    assert max(map(len, table.splitlines())) <= 80


def test_coefficients_by_name_and_number():
    def made(**settings):
        return make_optimizers(GPT(SMALL), OptimConfig(**settings))[0].ns_coefficients

    assert made(ns_coefficients="2, -1.5, 0.5", ns_steps=12) == ((2.0, -1.5, 0.5),) * 12
    polar = made(ns_coefficients="polar_express", ns_steps=7)
    assert len(polar) == 7 and polar[4] == polar[6] != polar[3]
    with pytest.raises(ValueError, match=r'"2, -1\.5".*three numbers'):
        made(ns_coefficients="2, -1.5")


def test_schedule_values():
    s = Schedule(100, OptimConfig(warmup=10, decay=0.5, final_lr=0.1, momentum_warmup=20))
    assert [s.lr(0), s.lr(9), s.lr(30), s.lr(50)] == pytest.approx([0.1, 1.0, 1.0, 1.0])
    assert s.lr(75) == pytest.approx(0.55) and s.lr(100) == pytest.approx(0.1)
    assert [s.momentum_at(k) for k in (0, 10, 20, 90)] == pytest.approx([0.85, 0.9, 0.95, 0.95])
    plain = Schedule(10, OptimConfig(decay=0.0, momentum_warmup=0))
    assert {plain.lr(k) for k in range(10)} == {1.0} and plain.momentum_at(0) == 0.95
    track3 = Schedule(3300, OptimConfig())
    assert track3.lr(989) == 1 and track3.lr(3299) == pytest.approx(1 / (0.7 * 3300))


def test_schedule_reaches_every_group_of_every_optimizer():
    optimizers = make_optimizers(GPT(SMALL), OptimConfig())
    s = Schedule(100, OptimConfig())
    s.set(optimizers, 80)
    for o in optimizers:
        for g in o.param_groups:
            assert g["lr"] == pytest.approx(g["initial_lr"] * s.lr(80)) and s.lr(80) < 1
    assert optimizers[0].param_groups[0]["momentum"] == s.momentum_at(80)
    assert "momentum" not in optimizers[1].param_groups[0]


def test_a_matrix_that_the_optimizer_cannot_update_is_named():
    class Forked(nn.Module):
        parameter_roles = {"w": "matrix"}  # noqa: RUF012

        def __init__(self):
            super().__init__()
            self.w = nn.Parameter(torch.zeros(2, 2, 2, 2))

    with pytest.raises(ConfigError, match=r"NorMuon.*\(2, 2, 2, 2\)"):
        make_optimizers(Forked(), OptimConfig(), torch.float32)
