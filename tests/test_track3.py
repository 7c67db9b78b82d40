"""The track3 recipes are modded-nanogpt's benchmark: model, data order, schedule and update, each
beside a plain version of the reference that shares no code with the package."""

import math
import os
import shlex
import subprocess
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import worker
from safetensors.torch import load_file
from support import ROOT, agree, relative, write_shard
from twin import Twin

from nanonormuon import build as plan
from nanonormuon import config
from nanonormuon.config import load
from nanonormuon.data import Batches, validation_batches
from nanonormuon.model import GPT, rope_tables, rotate
from nanonormuon.optim import Schedule, make_optimizers
from nanonormuon.runtime.distributed import World
from nanonormuon.storage.shards import open_data
from nanonormuon.train import train

RECIPES = [n for n in config.recipes() if n.startswith("track3-") and not n.endswith("-mini")]
# lr and weight decay of the matrices, steps scheduled; auxiliary rates (embedding, head, vectors)
# and decay
PUBLISHED = {
    "track3-muon": ((0.025, 0.05, 3250), (0.7, 0.004, 0.015), 0.001),
    "track3-normuon": ((0.035, 0.025, 3300), (0.3, 1 / 320, 0.01), 0.0),
    "track3-normuon-tuned-aux": ((0.035, 0.025, 3300), (0.7, 0.004, 0.015), 0.001),
    "track3-adamw": ((0.001, 1.0, 4950), (0.7, 0.004, 0.015), 0.002),
}
BATCH = 8 * 64 * 1024


# -------------------------------------------------------------------------------------- the model


@pytest.mark.parametrize("name", RECIPES)
def test_recipes_share_model_data_and_batch(name):
    found, first = load([name])[0], load(["track3-muon"])[0]
    assert found.model == first.model and found.data == first.data
    assert (found.train.batch_tokens, found.data.seq_len) == (BATCH, 1024)
    assert (found.data.order, found.data.val_tokens) == ("sequential", 20 * 524_288)
    with torch.device("meta"):
        model = GPT(found.model)
    assert sum(p.numel() for p in model.parameters()) == 162_354_816
    dtypes = {n: p.dtype for n, p in model.named_parameters()}
    assert dtypes.pop("embed_tokens.weight") == torch.bfloat16
    assert set(dtypes.values()) == {torch.float32}


def test_model_equals_the_reference():
    path = Path(__file__).parents[2] / "shared" / "golden" / "track3_gpt.safetensors"
    if not path.exists():
        pytest.skip("needs track3_gpt.safetensors (13 MB), which is not kept here")
    golden = load_file(path)
    small = {"vocab_size": 96, "n_layer": 2, "n_head": 2, "n_embd": 256, "embed_dtype": "fp32"}
    model = GPT(replace(load(["track3-muon"])[0].model, **small))

    def ours(name):
        for theirs, here in (
            ("blocks.", "layers."),
            ("attn.proj", "self_attn.o_proj"),
            ("attn.q.", "self_attn.q_proj."),
            ("attn.k.", "self_attn.k_proj."),
            ("attn.v.", "self_attn.v_proj."),
            ("mlp.fc", "mlp.up_proj"),
            ("mlp.proj", "mlp.down_proj"),
        ):
            name = name.replace(theirs, here)
        if name.startswith("layers."):
            name = name.replace("norm1.gains", "input_layernorm.weight")
            return name.replace("norm2.gains", "post_attention_layernorm.weight")
        start, _, end = name.partition(".")
        start = {"embed": "embed_tokens", "proj": "lm_head", "norm1": "embed_norm"}.get(
            start, start
        )
        return "norm.weight" if start == "norm2" else f"{start}.{end.replace('gains', 'weight')}"

    model.load_state_dict({ours(k[6:]): v for k, v in golden.items() if k.startswith("param.")})
    assert relative(model(golden["inputs"]), golden["logits"]) < 1e-5
    loss = model(golden["inputs"], golden["targets"], reduction="sum")
    assert float(loss.detach()) == pytest.approx(float(golden["loss_sum"]), rel=1e-5)
    loss.backward()
    grads = {k[5:]: v for k, v in golden.items() if k.startswith("grad.")}
    parameters = dict(model.named_parameters())
    assert len(grads) == len(parameters)
    for name, wanted in grads.items():
        assert (parameters[ours(name)].grad - wanted).norm() <= 1e-5 * wanted.norm(), name


def test_initial_weights_are_the_references():
    """Zero outputs and biases, gains of one, an embedding of N(0, 1), the rest N(0, .33 / fan_in):
    each in its mean and spread, to five standard errors."""
    model = GPT(small_model("track3-muon", n_embd=128)).init_weights(5)
    for name, p in model.named_parameters():
        kind = name.split(".")[-2]
        if name.endswith("bias") or kind in ("o_proj", "down_proj", "lm_head"):
            assert not p.any(), name
        elif p.ndim == 1:
            assert (p == 1).all(), name
        else:
            std = 1 if kind == "embed_tokens" else math.sqrt(0.33 / p.size(1))
            values, n = p.detach().float() / std, p.numel()
            assert abs(float(values.mean())) < 5 / n**0.5, name
            assert abs(float(values.std()) - 1) < 5 / (2 * n) ** 0.5 + 1e-3, name


def test_bfloat16_is_rotated_in_float32():
    """The reference's rotation of queries and keys in bfloat16, but for the last bit of a few in a
    million (here a product and a sum are rounded as one); in bfloat16 it would be 2e-3 away."""
    settings = load(["track3-muon"])[0].model.resolved()
    torch.manual_seed(3)
    x = torch.randn(2, 2, 1024, 128).bfloat16()
    angular = torch.cat([(1 / 1024) ** torch.linspace(0, 1, 32), torch.zeros(32)])
    theta = torch.outer(torch.arange(1024.0), angular)
    x1, x2 = x.float().chunk(2, -1)
    y1 = x1 * theta.cos() + x2 * theta.sin()
    y2 = x1 * -theta.sin() + x2 * theta.cos()
    found = rotate(x, *rope_tables(settings, 1024, x.device))
    assert found.dtype == torch.bfloat16
    assert relative(found, torch.cat([y1, y2], -1).bfloat16()) < 1e-5
    model = GPT(replace(settings, n_layer=1, vocab_size=64), torch.bfloat16)
    seen = []
    model.layers[0].forward = lambda x, cos, sin, *_: seen.append((cos.dtype, sin.dtype)) or x
    model.hidden(torch.zeros(1, 4, dtype=torch.int64))
    assert seen == [(torch.float32, torch.float32)]


# ---------------------------------------------------------------------------------------- the data


def reference_stream(files, batch_tokens, seq_len, rank, ranks):
    """What the reference's loader gives one rank: inputs and targets of each step, until the files
    end."""
    local = batch_tokens // ranks
    for file in sorted(files):
        raw = np.fromfile(file, dtype="<u2")[512:].astype(np.int64)
        position = 0
        while not position + batch_tokens + 1 >= len(raw):
            own = raw[position + rank * local :][: local + 1]
            yield own[:-1].reshape(-1, seq_len), own[1:].reshape(-1, seq_len)
            position += batch_tokens


@pytest.fixture(scope="module")
def fineweb(tmp_path_factory):
    """Shards named as FineWeb's, some of which end where a batch does, or one or two tokens later,
    and a validation shard."""
    folder, random = tmp_path_factory.mktemp("fineweb"), np.random.default_rng(0)
    lengths = [5 * 256 + 40, 4 * 256, 4 * 256 + 1, 4 * 256 + 2, 3 * 256 + 100]
    for i, n in enumerate(lengths, 1):
        file = folder / f"fineweb_train_{i:06d}.bin"
        write_shard(file, random.integers(0, 50_257, n), 50_257)
    write_shard(folder / "fineweb_val_000000.bin", random.integers(0, 50_257, 3000), 50_257)
    return folder


@pytest.mark.parametrize("ranks", [1, 2, 4, 8])
def test_the_stream_is_the_references(fineweb, ranks):
    """Every rank's tokens and targets of every step, in micro-batches of any size that divides."""
    settings = ["data.seq_len=16", "train.batch_tokens=256", f"data.path={fineweb}"]
    recipe = load(["track3-normuon", *settings])[0]
    per_rank = plan.split_batch(recipe, ranks)
    split = open_data(fineweb, recipe.model.vocab_size).train
    batches = Batches(split, 16, per_rank * ranks, recipe.train.seed, recipe.data.order)
    for rank in range(ranks):
        wanted = list(reference_stream(fineweb.glob("*_train_*"), 256, 16, rank, ranks))
        assert len(wanted) == 5 + 3 + 3 + 4 + 3
        for micro in (n for n in (1, 2, per_rank) if per_rank % n == 0):
            for step, pair in enumerate(wanted):
                starts = range(rank * per_rank, (rank + 1) * per_rank, micro)
                parts = [batches.batch(step, i, i + micro) for i in starts]
                for found, expected in zip(zip(*parts), pair):
                    assert np.array_equal(torch.cat(found).numpy(), expected), (rank, micro, step)


@pytest.mark.parametrize("ranks", [1, 2, 8])
def test_validation_is_the_references(fineweb, ranks):
    """The first val_tokens targets of the shard, in windows from its first token."""
    raw = np.fromfile(fineweb / "fineweb_val_000000.bin", dtype="<u2")[512:].astype(np.int64)
    wanted = {tuple(raw[i : i + 16]): tuple(raw[i + 1 : i + 17]) for i in range(0, 2048, 16)}
    split, found = open_data(fineweb, 50_304).val, {}
    for rank in range(ranks):
        here = World(rank, ranks, torch.device("cpu"))
        for tokens, targets in validation_batches(split, 16, 4, here, max_tokens=2048):
            for x, y in zip(tokens.tolist(), targets.tolist()):
                if max(y) >= 0:
                    assert tuple(x) not in found
                    found[tuple(x)] = tuple(y)
    assert found == wanted


# -------------------------------------------------------------------------------------- the update


def small_model(name, **sizes):
    small = {"vocab_size": 96, "n_layer": 2, "n_head": 2, "n_embd": 64} | sizes
    return replace(load([name])[0].model, **small)


def plain_eta(step, steps):
    progress = step / steps
    return 1.0 if progress < 1 - 0.7 else (1 - progress) / 0.7


@pytest.mark.parametrize("name", PUBLISHED)
def test_schedule_is_the_references(name):
    recipe = load([name])[0]
    schedule = Schedule(recipe.train.steps, recipe.optim)
    (_, _, steps), _, _ = PUBLISHED[name]
    assert recipe.train.steps == steps
    assert (recipe.train.stop_at or steps) == (4950 if name == "track3-adamw" else 3250)
    for step in range(steps):
        eta = plain_eta(step, steps)
        if name == "track3-adamw":  # published: step / 100, and 1e-7 for the first
            eta = min(eta, (step + 1) / 100)
        assert schedule.lr(step) == pytest.approx(eta, rel=1e-12)
        if name != "track3-adamw":
            assert schedule.momentum_at(step) == 0.95


class PlainAdamW:
    """AdamW with its averages kept in the parameter's own dtype, the arithmetic in float32."""

    def __init__(self, W, lr, weight_decay, eps=1e-10, betas=(0.8, 0.95)):
        self.W, self.lr, self.weight_decay, self.eps, self.betas = W, lr, weight_decay, eps, betas
        self.m, self.v, self.t = torch.zeros_like(W), torch.zeros_like(W), 0

    def step(self, G, eta):
        (b1, b2), lr, g, self.t = self.betas, self.lr * eta, G.float(), self.t + 1
        m = b1 * self.m.float() + (1 - b1) * g
        v = b2 * self.v.float() + (1 - b2) * g * g
        W = self.W.float() * (1 - lr * self.weight_decay)
        root = (v / (1 - b2**self.t)).sqrt()
        W = W - lr * (m / (1 - b1**self.t)) / (root + self.eps)
        self.W, self.m, self.v = (x.to(self.W.dtype) for x in (W, m, v))


@pytest.mark.parametrize("name", PUBLISHED)
def test_three_steps_equal_the_plain_update(name):
    """The recipe's own optimizers, at three places of its schedule, given mean gradients; beside
    them the published update with the published numbers, given the sums over the batch."""
    recipe, ((lr, decay, steps), aux, aux_decay) = load([name])[0], PUBLISHED[name]
    model = worker.filled(GPT(small_model(name)))
    optimizers = make_optimizers(model, recipe.optim, torch.float32)
    schedule, plain = Schedule(recipe.train.steps, recipe.optim), {}
    for key, p in model.named_parameters():
        W, kind = p.detach().clone(), key.split(".")[0]
        if p.ndim == 2 and kind == "layers" and name == "track3-adamw":
            plain[key] = PlainAdamW(W, lr, decay, 1e-8, (0.9, 0.9))
        elif p.ndim == 2 and kind == "layers":
            beta2, triples = 0.95 if "normuon" in name else None, ((2, -1.5, 0.5),) * 12
            plain[key] = Twin(W, lr, decay, 0.95, beta2, axis="longest", triples=triples)
        else:
            rate = aux[2 if p.ndim == 1 else 0 if kind == "embed_tokens" else 1]
            plain[key] = PlainAdamW(W, rate, aux_decay)
    torch.manual_seed(4)
    for step in (400, 1500, 3249):
        tokens, targets = torch.randint(96, (2, 4, 24))
        loss = model(tokens, targets)
        loss.backward()
        schedule.set(optimizers, step)
        for key, p in model.named_parameters():
            G, one, eta = BATCH * p.grad, plain[key], plain_eta(step, steps)
            if isinstance(one, Twin):
                one.lr = lr * eta
                one.step(G)
            else:
                one.step(G, eta)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        for key, p in model.named_parameters():
            assert p.dtype == plain[key].W.dtype
            agree(p, plain[key].W, 1e-5, (step, key))


def test_eps_of_means_and_of_sums_give_the_same_bits():
    """AdamW on gradients summed over 524,288 tokens with eps 1e-10 = on their means with the
    recipes' eps, also where eps decides: scaling by a power of two rounds nothing."""
    random = torch.Generator().manual_seed(2)
    scales = 10 ** torch.linspace(-20, 0, 400)[:, None]  # mean gradients around eps and far above
    for dtype in (torch.float32, torch.bfloat16):
        W = torch.randn(400, 8, generator=random).to(dtype)
        pair = [torch.nn.Parameter(W.clone()) for _ in range(2)]
        mean, summed = (
            torch.optim.AdamW([p], lr=0.3, betas=(0.8, 0.95), eps=eps, fused=True)
            for p, eps in zip(pair, (load(["track3-normuon"])[0].optim.adam_eps, 1e-10))
        )
        for _ in range(3):
            grad = (scales * torch.randn(400, 8, generator=random)).to(dtype)
            pair[0].grad, pair[1].grad = grad, grad * BATCH
            mean.step()
            summed.step()
        assert torch.equal(*pair)
        assert (pair[0] - W).abs().median() > 0.1  # and it did move


def test_a_run_resumes_with_its_embedding_in_bfloat16(shards, tmp_path):
    """Weights and averages rest in bfloat16 in a checkpoint too, and go on from it bit by bit."""
    small = ["model.n_layer=1", "model.n_head=2", "model.n_embd=32", "model.vocab_size=320"]
    recipe = ["track3-normuon", *small, f"data.path={shards}", "data.seq_len=32",
              "train.batch_tokens=256", "train.steps=4", "train.save_every=2", "train.eval_every=2",
              "train.keep_last=0", "train.device=cpu", "data.val_tokens=512"]  # fmt: skip
    train(load([*recipe, "train.stop_at=0"])[0], tmp_path / "whole")
    train(load([*recipe, "train.stop_at=2"])[0], tmp_path / "parts")
    train(load([*recipe, "train.stop_at=0"])[0], tmp_path / "parts", resume=True)
    for name in ("model", "optimizer"):
        one, other = (
            tmp_path / run / "checkpoints" / "step-000004" / f"{name}.safetensors"
            for run in ("whole", "parts")
        )
        assert one.read_bytes() == other.read_bytes(), name
        dtypes = {k: t.dtype for k, t in load_file(one).items() if "embed_tokens" in k}
        assert {k: d for k, d in dtypes.items() if not k.endswith("step")} == {
            k: torch.bfloat16 for k in dtypes if not k.endswith("step")
        }


# ----------------------------------------------------------------------------------- the speedrun


def speedrun(*arguments, **env):
    script = ROOT / "scripts" / "speedrun_track3.sh"
    done = subprocess.run(
        ["bash", str(script), *arguments],
        env={**os.environ, "DRY": "1", **env}, capture_output=True, text=True, timeout=900,
    )  # fmt: skip
    return done.returncode, [shlex.split(line) for line in done.stdout.splitlines()], done.stderr


def test_the_speedrun_script_says_what_it_would_do():
    code, lines, _ = speedrun(GPUS="8")
    assert code == 0 and [line[0] for line in lines[-3:]] == ["python", *["normuon-train"] * 2]
    assert lines[-3][1:] == ["data/fineweb.py", "--out", "data/fineweb10B", "--shards", "18"]
    assert lines[-1] == [
        "normuon-train", "trials", "track3-normuon", "--n", "10", "--target", "3.28",
        "--ranks", "8", "--out", "runs/track3-normuon",
    ]  # fmt: skip
    code, dry, said = speedrun(GPUS="", PATH="/usr/bin:/bin")  # a machine without any
    assert code == 0 and [x[0] for x in dry[-3:]] == [x[0] for x in lines[-3:]]
    assert "about 11.2 GPU-hours" in said and "11.2 h on 1 GPU, 1.4 h on 8" in said
    for gpus, ranks in zip("1234567", "1224444"):
        code, lines, said = speedrun("track3-muon", "3", GPUS=gpus, FROM="/a b", OUT="x")
        assert code == 0 and lines[-1][3:] == ["--n", "3", "--target", "3.28", "--ranks", ranks,
                                               "--out", "x"]  # fmt: skip
        assert lines[-3][-2:] == ["--from", "/a b"]
        assert (f"using {ranks} of {gpus} GPUs" in said) == (gpus != ranks)
        plan.split_batch(load(["track3-muon"])[0], int(ranks))


@pytest.mark.parametrize(
    ("arguments", "gpus", "words"),
    [
        (["track3-mouon"], "8", "no recipe track3-mouon: expected one of track3-"),
        (["demo"], "8", "no recipe demo"),
        (["track3-normuon-mini"], "8", "no recipe track3-normuon-mini: expected one of track3-"),
        (["track3-muon", "0"], "8", "0 trials: expected a number"),
        ([], "none", "none GPUs: expected 1 to 8"),
    ],
)
def test_the_speedrun_script_names_mistakes(arguments, gpus, words):
    code, lines, said = speedrun(*arguments, GPUS=gpus)
    assert code == 2 and not lines and words in said and said.count("\n") == 1


@pytest.mark.parametrize("name", RECIPES)
def test_the_shards_to_download_last_for_one_epoch(name):
    """Of 100M tokens each, as published: no recipe sees any twice, none is downloaded in vain."""
    _, lines, _ = speedrun(name, GPUS="1")
    recipe, number = load([name])[0], int(lines[-3][-1])
    steps = (100_000_000 - 2) // BATCH
    assert steps * (number - 1) < recipe.train.steps <= steps * number
    assert f"--shards {number}\n" in config.recipes()[name].read_text()
