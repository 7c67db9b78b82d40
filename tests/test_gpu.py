"""On a CUDA GPU: NorMuon, eager and compiled, and the model are what they are on a CPU; an
optimizer step never waits for the device; a run resumes."""

import pytest
import torch
from support import TINY, final, relative

from nanonormuon import NorMuon
from nanonormuon.config import load
from nanonormuon.model import GPT, GPTConfig
from nanonormuon.runtime import memory
from nanonormuon.runtime.distributed import World
from nanonormuon.train import train

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
]
SHAPES = [(96, 96), (96, 96), (64, 256), (256, 64), (3, 32, 48)]


def stepped(device, compiled=False, **settings):
    torch.manual_seed(1)
    params = [torch.nn.Parameter(torch.randn(s).to(device)) for s in SHAPES]
    rates = {k: torch.tensor(v, device=device) for k, v in (("lr", 0.05), ("momentum", 0.9))}
    optimizer = NorMuon(params, **rates, **settings)
    step = torch.compile(optimizer.step) if compiled else optimizer.step
    for i in range(4):
        optimizer.param_groups[0]["lr"].fill_(0.05 / (1 + i))
        for p, shape in zip(params, SHAPES):
            p.grad = torch.randn(shape).to(device)
        step()
    return [p.detach() for p in params]


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("axis", ["rows", "longest"])
def test_the_step_equals_the_cpus(axis, compiled):
    exact = {"ns_dtype": torch.float32, "neuron_axis": axis}
    torch.backends.cuda.matmul.allow_tf32 = False
    for a, b in zip(stepped("cuda", compiled, **exact), stepped("cpu", **exact)):
        assert relative(a, b) < 1e-4
    for a, b in zip(stepped("cuda", compiled, neuron_axis=axis), stepped("cpu", **exact)):
        assert relative(a, b) < 2e-2


def test_no_step_waits_for_the_device():
    torch.manual_seed(1)
    params = [torch.nn.Parameter(torch.randn(s, device="cuda")) for s in SHAPES]
    for p in params:
        p.grad = torch.randn_like(p)
    optimizer = NorMuon(params)
    optimizer.step()
    torch.cuda.set_sync_debug_mode("error")
    try:
        optimizer.step()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("settings", [{"n_kv_head": 2}, {"attention": "latent", "q_rank": 32}])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_loss_and_gradients_equal_the_cpus(dtype, settings):
    config = GPTConfig(vocab_size=192, n_layer=2, n_head=4, n_embd=64, **settings)
    torch.manual_seed(2)
    tokens, targets = torch.randint(192, (2, 3, 50))
    losses, grads = [], []
    for device, kind in (("cpu", torch.float32), ("cuda", dtype)):
        model = GPT(config, kind).init_weights(0)
        with torch.no_grad():
            for p in model.parameters():
                p.add_(0.1)
        model.to(device)
        loss = model(tokens.to(device), targets.to(device))
        loss.backward()
        losses.append(float(loss.detach()))
        grads.append(torch.cat([p.grad.flatten().cpu() for p in model.parameters()]))
    limit = 1e-4 if dtype == torch.float32 else 5e-2
    assert losses[1] == pytest.approx(losses[0], rel=limit)
    assert relative(grads[1], grads[0]) < limit


@pytest.mark.parametrize("separated", ["true", "false"])
def test_a_canonical_run_repeats_and_resumes_in_the_same_bits(separated, shards, tmp_path):
    """With flash attention, and with a mask, which takes another kernel."""
    common = [*TINY, f"data.path={shards}", "train.device=cuda", "train.dtype=bf16"]
    common += ["train.canonical=true", "train.micro_batch=3", f"data.document_mask={separated}"]
    try:
        for name in ("one", "two"):
            train(load(common)[0], tmp_path / name)
        train(load([*common, "train.stop_at=4"])[0], tmp_path / "parts")
        train(load(common)[0], tmp_path / "parts", resume=True)
    finally:
        torch.use_deterministic_algorithms(False)
    assert final(tmp_path / "one") == final(tmp_path / "two") == final(tmp_path / "parts")


def test_what_the_probe_took_is_not_the_runs_peak():
    def make(device):
        model = GPT(GPTConfig(vocab_size=512, n_layer=2, n_head=2, n_embd=64)).to(device)
        return model, [NorMuon(layer.mlp.up_proj.parameters()) for layer in model.layers]

    world = World(0, 1, torch.device("cuda", 0))
    assert memory.choose(make, load(["data.seq_len=64"])[0], 8, world) == 8
    assert torch.cuda.max_memory_allocated() == torch.cuda.memory_allocated()


def test_a_run_resumes_on_the_gpu_as_if_never_stopped(shards, tmp_path):
    common = [*TINY, f"data.path={shards}", "train.device=cuda", "train.compile=off"]
    whole = train(load(common)[0], tmp_path / "whole")
    train(load([*common, "train.stop_at=4"])[0], tmp_path / "parts")
    parts = train(load(common)[0], tmp_path / "parts", resume=True)
    assert parts["val_loss"] == pytest.approx(whole["val_loss"], rel=1e-4)
