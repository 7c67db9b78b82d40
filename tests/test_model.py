"""The model: causal, its chunked loss equal to the plain cross entropy with every gradient,
generation with a cache equal to full recomputation. test_track3.py compares it with a reference."""

import math
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from support import relative
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from nanonormuon.model import (
    GPT,
    IGNORE,
    Cache,
    GPTConfig,
    HeadLoss,
    RMSNorm,
    attend,
    rope_tables,
    rotate,
)
from nanonormuon.optim import param_groups
from nanonormuon.runtime.activations import checkpoint_activations
from nanonormuon.sample import cache_bytes

SMALL = {"vocab_size": 50, "n_layer": 2, "n_head": 4, "n_kv_head": 2, "n_embd": 32}
TRACK3 = {
    "mlp": "relu2",
    "bias": True,
    "qk_gain": False,
    "rope": "half",
    "attn_scale": 0.12,
    "embed_norm": True,
    "logit_cap": 15.0,
    "norm_eps": 0.0,
}
LATENT = {"attention": "latent", "n_kv_head": 0}
ODD = {**LATENT, "q_rank": 20, "v_head_dim": 10, "rope_head_dim": 6, "rope_interleave": False}
VARIANTS = [{}, {"tied": True}, {"n_kv_head": 4, "head_dim": 12}, TRACK3, {"value_embed": True},
            {"bigram_embed": 251}, {"key_shift": True}, LATENT, ODD]  # fmt: skip


class Watch(TorchDispatchMode):
    """Hands the name of every operation to `see`."""

    def __init__(self, see):
        super().__init__()
        self.see = see

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.see(str(func))
        return func(*args, **(kwargs or {}))


def filled(settings=None, dtype=torch.float32):
    """A model in which no parameter is zero, so that every path matters."""
    model = GPT(GPTConfig(**{**SMALL, **(settings or {})}), dtype).init_weights(0)
    random = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.2 * torch.randn(p.shape, generator=random))
    return model


@pytest.mark.parametrize("settings", VARIANTS)
def test_no_token_sees_a_later_one(settings):
    model = filled(settings)
    tokens = torch.randint(50, (2, 12))
    changed = tokens.clone()
    changed[:, 7] = (changed[:, 7] + 1) % 50
    a, b = model(tokens), model(changed)
    assert torch.equal(a[:, :7], b[:, :7])
    assert ((a - b).abs().amax((0, 2))[7:] > 1e-4).all()


@pytest.mark.parametrize("settings", VARIANTS)
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_loss_and_gradients_equal_plain_cross_entropy(settings, reduction, monkeypatch):
    monkeypatch.setattr("nanonormuon.model.CHUNK", {"cpu": 0})  # at most 512 rows: three chunks
    model = filled(settings)
    torch.manual_seed(0)
    tokens, targets = torch.randint(50, (2, 6, 175))
    targets[1, 3:9] = IGNORE
    loss = model(tokens, targets, reduction=reduction)
    (3 * loss).backward()
    found = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    z = model(tokens).flatten(0, 1)
    plain = F.cross_entropy(z, targets.flatten(), ignore_index=IGNORE, reduction=reduction)
    (3 * plain).backward()
    assert float(loss.detach()) == pytest.approx(float(plain.detach()), rel=1e-6)
    for name, p in model.named_parameters():
        assert (found[name] - p.grad).norm() <= 1e-5 * p.grad.norm(), name
    with torch.no_grad():
        assert float(model(tokens, targets, reduction=reduction)) == pytest.approx(
            float(plain), rel=1e-6
        )


@pytest.mark.parametrize(
    ("rows", "sizes"),
    [(65_536, [4096] * 16), (24_576, [4096] * 6), (5120, [2560] * 2), (8193, [2731] * 3), (9, [9])],
)
def test_a_gpus_chunks_are_equal_and_of_4096_rows_at_most(rows, sizes, monkeypatch):
    found, linear = [], F.linear
    monkeypatch.setattr(F, "linear", lambda x, W, b: (found.append(len(x)), linear(x, W, b))[1])
    with torch.device("meta"):
        h, W, targets = torch.empty(rows, 8), torch.empty(50_304, 8), torch.empty(rows).long()
        HeadLoss.apply(h, W, None, targets, 0.0, False)
    assert found == sizes


@pytest.mark.parametrize("settings", [{}, TRACK3])
def test_a_compiled_loss_is_the_eager_one_and_scatters_nothing(settings, monkeypatch):
    """By the bit. A scatter would write and read each chunk's float32 probabilities."""
    monkeypatch.setattr("nanonormuon.model.CHUNK", {"cpu": 0})  # 512 rows: two chunks
    tokens, targets = torch.randint(50, (2, 12, 50))
    results = []
    for compiling in (False, True):
        monkeypatch.setattr(torch.compiler, "is_compiling", lambda now=compiling: now)
        model, seen = filled(settings, torch.bfloat16), []
        with Watch(seen.append):
            loss = model(tokens, targets)
        loss.backward()
        results.append([loss, *(p.grad for p in model.parameters())])
        assert any("scatter" in name for name in seen) != compiling
    assert all(torch.equal(a, b) for a, b in zip(*results))


@pytest.mark.parametrize("settings", VARIANTS)
def test_a_frozen_head_costs_no_gradient_of_its_own(settings):
    model, (tokens, targets) = filled(settings), torch.randint(50, (2, 3, 25))
    head, found = model.get_output_embeddings(), {}
    for frozen in (False, True):
        model.zero_grad()
        head.requires_grad_(not frozen)
        with FlopCounterMode(display=False) as counter:
            model(tokens, targets).backward()
        found[frozen] = {n: p.grad for n, p in model.named_parameters() if p.requires_grad}, counter
    (all_grads, whole), (grads, less) = found[False], found[True]
    assert len(all_grads) - len(grads) == len(list(head.parameters()))
    for name, grad in grads.items():
        assert torch.equal(grad, all_grads[name]), name
    products = 2 * tokens.numel() * sum(p.numel() for p in head.parameters())
    assert whole.get_total_flops() - less.get_total_flops() == products


def test_compute_in_bfloat16_keeps_float32_weights_and_gradients():
    full, half = filled(), filled(dtype=torch.bfloat16)
    tokens = torch.randint(50, (4, 16))
    assert half.hidden(tokens).dtype == torch.bfloat16 and half(tokens).dtype == torch.float32
    assert (half(tokens) - full(tokens)).norm() < 0.03 * full(tokens).norm()
    half(tokens, tokens).backward()
    assert {p.grad.dtype for p in half.parameters()} == {torch.float32}


@pytest.mark.parametrize("block", [1, 4])
@pytest.mark.parametrize("settings", VARIANTS)
def test_cache_gives_the_logits_of_full_recomputation(settings, block, monkeypatch):
    """Token by token, with one number of keys per block of them (a GPU's blocks are larger)."""
    keys, own = set(), F.scaled_dot_product_attention

    def attend(q, k, *rest, **more):
        keys.add(k.size(2))
        return own(q, k, *rest, **more)

    monkeypatch.setattr(F, "scaled_dot_product_attention", attend)
    model = filled(settings).eval()
    tokens = torch.randint(50, (3, 14))
    with torch.no_grad():
        wanted, cache = model(tokens), Cache(model, 3, 14)
        cache.block = block
        found = [model(tokens[:, :5], cache=cache)]
        keys.clear()
        found += [model(tokens[:, i : i + 1], cache=cache) for i in range(5, 14)]
        assert torch.allclose(torch.cat(found, 1), wanted, atol=1e-5)
        assert keys == (set(range(6, 15)) if block == 1 else {8, 12, 14})
        with pytest.raises(ValueError, match="do not fit"):
            model(tokens[:, :1], cache=cache)


@pytest.mark.parametrize("settings", VARIANTS)
def test_documents_packed_in_a_window_are_computed_as_if_alone(settings):
    model, eot = filled(settings), 49
    tokens = torch.randint(0, 49, (2, 40), generator=torch.Generator().manual_seed(3))
    for row, starts in enumerate(([0, 11, 12, 30], [7, 39])):  # also in the middle of a document
        tokens[row, starts] = eot
    whole = model(tokens)
    model.separator = eot
    packed = model(tokens)
    model.separator = None
    assert torch.equal(model(tokens), whole)
    assert (packed - whole).abs().max() > 0.1
    for row, bounds in enumerate(([0, 11, 12, 30, 40], [0, 7, 39, 40])):
        for a, b in pairwise(bounds):
            alone = model(tokens[row : row + 1, a:b])
            assert torch.allclose(packed[row, a:b], alone[0], atol=2e-5), (row, a, b)


@pytest.mark.parametrize("settings", VARIANTS)
def test_in_bfloat16_loss_and_gradients_stay_close_to_float32(settings):
    """bfloat16 takes ways of its own on a CPU: plain attention, fewer passes in the norms."""
    torch.manual_seed(6)
    tokens, targets = torch.randint(50, (2, 3, 40))
    results = []
    for dtype in (torch.float32, torch.bfloat16):
        model = filled(settings)
        model.compute_dtype = dtype
        loss = model(tokens, targets)
        loss.backward()
        results.append((float(loss.detach()), {n: p.grad for n, p in model.named_parameters()}))
    (exact, wanted), (loss, found) = results
    assert loss == pytest.approx(exact, rel=5e-3)
    for name in wanted:
        error = (found[name] - wanted[name]).norm() / wanted[name].norm()
        assert error < 0.1, (name, float(error))


@pytest.mark.parametrize("gain", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_epsilon_of_zero_is_torchs_in_every_dtype(dtype, gain):
    """float32's: rows this small would shrink to a half under bfloat16's."""
    norm, x = RMSNorm(64, 0.0, gain), 0.05 * torch.randn(3, 5, 64).to(dtype)
    wanted = torch.nn.RMSNorm(64, None, False, dtype=dtype)(x)
    assert torch.allclose(norm(x).float(), wanted.float(), rtol=0.01)


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_plain_attention_equals_torchs(kv_heads):
    torch.manual_seed(7)
    q, k, v = (torch.randn(2, h, 9, 8).bfloat16() for h in (4, kv_heads, kv_heads))
    exact = attend(q.float(), k.float(), v.float(), 0.3, None)
    assert torch.allclose(attend(q, k, v, 0.3, None).float(), exact, atol=0.03)
    (last,) = attend(q[:, :, -1:], k, v, 0.3, None).unbind(2)
    assert torch.allclose(last.float(), exact[:, :, -1], atol=0.03)


@pytest.mark.parametrize("flush", [False, True])
def test_a_hopeless_target_costs_a_finite_loss(flush):
    """The head's softmax is float32: the loss of a target beyond exp(-87) is cut there, also where
    denormal numbers count as zero."""
    model = filled()
    with torch.no_grad():
        model.lm_head.weight.mul_(1e4)
    torch.set_flush_denormal(flush)
    try:
        loss = model(torch.tensor([[1, 2, 3]]), torch.tensor([[4, 5, 6]]))
    finally:
        torch.set_flush_denormal(False)
    assert loss.isfinite() and loss > 50
    loss.backward()
    assert all(p.grad.isfinite().all() for p in model.parameters())


def test_initial_loss_is_that_of_a_uniform_guess_and_weights_depend_on_the_seed_alone():
    a = GPT(GPTConfig(**SMALL)).init_weights(3)
    torch.manual_seed(99)
    b, c = GPT(GPTConfig(**SMALL)).init_weights(3), GPT(GPTConfig(**SMALL)).init_weights(4)
    tokens = torch.randint(50, (2, 8))
    assert a(tokens, tokens).item() == pytest.approx(math.log(50), rel=1e-6)
    same = [torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters())]
    other = [torch.equal(p, q) for p, q in zip(a.parameters(), c.parameters()) if p.std() > 0]
    assert all(same) and not any(other)


@pytest.mark.parametrize("tables", [{}, {"value_embed": True, "bigram_embed": 99}])
def test_flops_per_token_by_hand(tables):
    sizes = {"vocab_size": 100, "n_layer": 1, "n_head": 2, "n_embd": 16, "n_hidden": 64}
    around = 3 * 16 * 64 + 16 * 100
    full = GPT(GPTConfig(**sizes, **tables))
    assert full.flops_per_token(32) == 6 * (4 * 16 * 16 + around) + 6 * 16 * 32
    widths = {"kv_rank": 20, "head_dim": 12, "rope_head_dim": 4, "v_head_dim": 10}
    latent = 16 * 2 * 16 + 16 * (20 + 4) + 20 * 2 * (12 + 10) + 2 * 10 * 16
    model = GPT(GPTConfig(**sizes, attention="latent", **widths))
    assert model.flops_per_token(32) == 6 * (latent + around) + 3 * 2 * (12 + 4 + 10) * 32


@pytest.mark.parametrize("settings", VARIANTS)
def test_the_cache_holds_as_many_bytes_per_token_as_it_says(settings):
    model = filled(settings, torch.bfloat16)
    c, layers = model.config, len(model.layers)
    numbers = 2 * c.n_kv_head * c.head_dim  # a latent: 4 head_dim, and half of it rotates
    if c.attention == "latent":
        numbers = 4 * 8 + (6 if "q_rank" in settings else 8 // 2)
    assert cache_bytes(model) == layers * numbers * 2
    kept = Cache(model, 3, 7).kept
    assert sum(t.nbytes for of in kept.values() for t in of) == 3 * 7 * cache_bytes(model)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"n_embd": 30}, "n_head = 4.*n_head = 3.*head_dim"),
        ({"n_head": 0}, "n_head = 0: expected at least 1"),
        ({"n_kv_head": 3}, "n_kv_head = 3"),
        ({"mlp": "gelu"}, "expected swiglu or relu2 or experts"),
        ({"rope": "none"}, "expected full or half"),
        ({"head_dim": 6}, "expected a multiple of 4"),
        ({"n_hidden": -1}, "expected 0 or more"),
        ({"embed_dtype": "fp16"}, "expected fp32 or bf16"),
        ({"embed_dtype": "bf16", "tied": True}, "expected fp32.*tied"),
        ({"attention": "sparse"}, "attention = sparse: expected full or latent"),
        ({"kv_rank": 8}, "kv_rank = 8: expected 0.*attention = full"),
        ({"rope_interleave": False}, "rope_interleave = False: expected True.*attention = full"),
        ({**LATENT, "n_kv_head": 2}, "n_kv_head = 2: expected 0 or n_head = 4"),
        ({**LATENT, "qk_norm": False}, "qk_norm = False: expected True.*attention = latent"),
        ({**LATENT, "bias": True}, "bias = True: expected False.*attention = latent"),
        ({**LATENT, "rope_head_dim": 3}, "rope_head_dim = 3: expected an even number"),
        ({**LATENT, "key_shift": True}, "key_shift = True: expected False.*attention = latent"),
        ({"key_shift": True, "n_kv_head": 1}, "key_shift = True: expected false.*single key head"),
        ({**LATENT, "kv_rank": -1}, "kv_rank = -1: expected 0 or more"),
    ],
)
def test_impossible_models_are_refused(settings, words):
    with pytest.raises(ValueError, match=words):
        GPTConfig(**{**SMALL, **settings})


def test_a_bigrams_row_is_that_of_a_token_and_the_one_before_it():
    model = filled({"bigram_embed": 251})
    table = model.bigram_embed.weight.detach()
    tokens = torch.tensor([[7, 3, 7, 3]])
    found = model.bigram_embed(tokens, None, None)[0]
    pairs = [(0, 7), (7, 3), (3, 7), (7, 3)]
    rows = [(36_313 * b ^ 27_191 * a) % 251 for a, b in pairs]
    assert len(set(rows)) == 3 and torch.equal(found, table[rows])
    assert torch.equal(model.bigram_embed(tokens, None, 3)[0, 3], table[36_313 * 3 % 251])
    assert [
        g["role"] for g in param_groups(model) if model.bigram_embed.weight in set(g["params"])
    ] == ["value"]


def test_half_of_the_key_heads_show_a_token_the_key_of_the_one_before_it():
    plain, shifted = filled(), filled({"key_shift": True})
    seen = []
    for model in (plain, shifted):
        first = model.layers[0].self_attn
        first.attend = lambda q, k, v, scale, mask: seen.append(k) or attend(q, k, v, scale, mask)
        model(torch.tensor([[7, 3, 9, 3]]))
    k, found = seen
    cos, sin = rope_tables(plain.config, 4, k.device)
    unrotated = rotate(k, cos, -sin)  # rotated back
    wanted = rotate(unrotated[:, 1, [0, 0, 1, 2]], cos, sin)  # the first one has none before it
    assert torch.equal(found[:, 0], k[:, 0])
    torch.testing.assert_close(found[:, 1], wanted)


@pytest.mark.slow
def test_a_shifted_head_survives_compiling_a_recomputed_block():
    """inductor may lay out a tensor of one head like an image, which attention does not read."""
    model = filled({"n_layer": 1, "key_shift": True})
    model.separator, tokens = 0, torch.randint(1, 50, (8, 64))
    checkpoint_activations(model)
    grads = []
    for forward in (model, torch.compile(model, dynamic=False)):
        model.zero_grad()
        forward(tokens, tokens).backward()
        grads.append({name: p.grad.clone() for name, p in model.named_parameters()})
    eager, compiled = grads
    for name, grad in eager.items():
        assert relative(compiled[name], grad) < 1e-4, name
