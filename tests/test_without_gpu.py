"""What can be known of a GPU without one. On fake CUDA tensors, which have a device, a dtype and a
shape but no content: a step of every recipe at its true size, and how often it waits for the
device. By a compiler that only traces: graphs and recompilations of the model and of the step."""

import ctypes
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from support import ROOT, TINY
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from nanonormuon.config import load, recipes
from nanonormuon.engine import Engine
from nanonormuon.model import GPT, HeadLoss
from nanonormuon.optim import make_optimizers
from nanonormuon.runtime.activations import checkpoint_activations
from nanonormuon.runtime.distributed import World
from nanonormuon.runtime.faults import Stopping
from nanonormuon.runtime.health import Spikes, WeightStats, judge

GUARD = """
#include <c10/core/impl/DeviceGuardImplInterface.h>
namespace c10::impl { C10_REGISTER_GUARD_IMPL(CUDA, NoOpDeviceGuardImpl<DeviceType::CUDA>) }
"""  # to enter a fake device; a build of torch without CUDA refuses to


@pytest.fixture(scope="module")
def fake_cuda(tmp_path_factory):
    if torch.version.cuda:
        return
    if not shutil.which("g++"):
        pytest.skip("needs g++")
    source = tmp_path_factory.mktemp("guard") / "guard.cpp"
    source.write_text(GUARD)
    root = Path(torch.__file__).parent
    options = ["-std=c++20", "-O0", "-shared", "-fPIC", f"-I{root / 'include'}"]
    library = source.with_suffix(".so")
    link = [f"-L{root / 'lib'}", "-lc10", "-o", str(library)]
    subprocess.run(["g++", *options, str(source), *link], check=True)
    ctypes.CDLL(str(library))


class Waits(TorchDispatchMode):
    """Collects what makes the host wait for the device: tensors whose numbers it reads, or that it
    copies."""

    def __init__(self):
        super().__init__()
        self.storages = {}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function is torch.ops.aten._local_scalar_dense.default:
            storage = args[0].untyped_storage()  # tolist() reads a real tensor all at once
            self.storages[storage._cdata] = storage
            return 0.0
        result = function(*args, **(kwargs or {}))
        moved = [t for t in args if isinstance(t, torch.Tensor) and t.device.type == "cuda"]
        if moved and isinstance(result, torch.Tensor) and result.device.type == "cpu":
            self.storages[id(result)] = result
        return result


def fake_engine(config, compute=torch.bfloat16):
    """An engine on a fake GPU, in an active FakeTensorMode. Its backward pass makes gradients out
    of nothing: torch's autograd does not run for a device that is not there."""
    model_config = replace(config.model, vocab_size=config.model.vocab_size or 4096)
    with torch.device("meta"):
        model = GPT(model_config, compute)
    for module in model.modules():
        for name, p in list(module._parameters.items()):
            if p is not None:
                there = torch.empty(p.shape, dtype=p.dtype, device="cuda")
                module._parameters[name] = torch.nn.Parameter(there)
        for name, bias in module._buffers.items():
            module._buffers[name] = None if bias is None else torch.empty_like(bias, device="cuda")

    def backward(part):
        for p in model.parameters():
            p.grad = torch.empty_like(p)

    def make(model):
        return make_optimizers(model, config.optim, compute)

    engine = Engine(model, make, World(0, 1, torch.device("cuda")), grad_clip=1.0)
    engine.backward = backward
    return engine


def step(engine, sequences, seq_len, count=2):
    """A training step as Trainer.take_step makes it, and what a row of metrics measures."""
    stats = WeightStats(engine.optimizers, engine.world.device)
    spikes = Spikes(10.0)
    with Waits() as waits:
        tokens = torch.zeros(sequences, seq_len, dtype=torch.int64, device="cuda")
        loss = engine.accumulate(iter([(tokens, tokens)] * count), count)
        verdict = judge(loss, engine, spikes, Stopping())
        engine.clip(verdict.grad_norm)
        with stats.around(True):
            engine.update()
        engine.zero_grad()
    return loss, len(waits.storages), stats


ALIKE = ("track3-muon", "track3-adamw", "track3-normuon-tuned-aux")  # but for their optimizers


@pytest.mark.slow
@pytest.mark.parametrize("recipe", sorted(recipes().keys() - ALIKE))
def test_a_step_of_every_recipe_stays_on_its_device(recipe, fake_cuda, monkeypatch):
    """At its true size. Fake tensors of two devices do not mix, nor do their wrong dtypes."""
    heads, forward = [], HeadLoss.forward

    def seen(ctx, h, *more):
        heads.append((h.device.type, h.dtype))
        return forward(ctx, h, *more)

    monkeypatch.setattr(HeadLoss, "forward", staticmethod(seen))
    config = load([recipe])[0]
    with FakeTensorMode():
        engine = fake_engine(config)
        loss, waits, stats = step(engine, 1, config.data.seq_len, count=1)
        assert (loss.device.type, loss.dtype) == ("cuda", torch.float32)
        assert heads == [("cuda", torch.bfloat16)]
        assert {t.device.type for t in engine.state() if t.ndim} == {"cuda"}
        assert {t.device.type for t in (stats.moved, *stats.matrices())} == {"cuda"}
    assert waits == 1


@pytest.mark.slow
def test_a_step_waits_for_the_device_once(fake_cuda):
    """For the verdict, whatever the number of layers and micro-batches."""
    with FakeTensorMode():
        for layers, count in ((1, 1), (3, 4)):
            config = load([*TINY, f"model.n_layer={layers}", "optim.cautious=true"])[0]
            _, waits, _ = step(fake_engine(config), 2, 32, count)
            assert waits == 1


@pytest.mark.slow
@pytest.mark.parametrize(
    "settings",
    [["demo", "model.key_shift=false"], ["track3-normuon"],
     ["train.activation_checkpointing=true"], ["masked"],
     ["latent-demo"],
     ["model.mlp=experts", "model.n_expert=4", "model.n_expert_used=2", "model.balance_loss=0.1",
      "train.activation_checkpointing=true"]],
)  # fmt: skip
def test_the_model_is_one_graph_for_training_and_one_for_evaluation(settings):
    """In the branches that a GPU takes: float32 takes them on a CPU too. Nothing breaks a graph,
    and another batch compiles nothing; another number of sequences does, as dynamic=False says."""
    masked = settings == ["masked"]
    config = load([] if masked else settings)[0]
    sizes = {"n_layer": 2, "n_head": 2, "n_embd": 32, "head_dim": 16}
    sizes["n_kv_head"] = 2 if config.model.attention == "latent" else 1
    model = GPT(replace(config.model, vocab_size=64, **sizes)).init_weights(1)
    model.separator = 3 if masked else None
    if config.train.activation_checkpointing:
        checkpoint_activations(model)
    torch._dynamo.reset()
    graphs = CompileCounterWithBackend("eager")
    compiled, made = torch.compile(model, backend=graphs, dynamic=False), []
    for size in (4, 4, 2):
        compiled(*torch.randint(64, (2, size, 24))).backward()
        made.append(graphs.frame_count)
    with torch.no_grad():
        for _ in range(2):
            compiled(*torch.randint(64, (2, 4, 24)), reduction="sum")
            made.append(graphs.frame_count)
    assert made == [1, 1, 2, 3, 3]


@pytest.fixture
def python(tmp_path_factory):
    """A folder with a `python` whose processes begin with everything imported."""
    folder = tmp_path_factory.mktemp("python")
    command = [sys.executable, str(ROOT / "tests" / "quick_python.py"), str(folder)]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen(command, text=True, **pipes) as server:
        assert server.stdout.readline() == "ready\n"
        yield folder
        server.stdin.close()


@pytest.mark.slow
def test_the_check_for_a_gpu_runs_in_small_and_does_only_what_is_missing(python, tmp_path):
    def check(seconds=900):
        env = {**os.environ, "GPU_CHECK_SMALL": "1", "GPU_CHECK_SECONDS": str(seconds)}
        env |= {"PATH": f"{python}:{env['PATH']}", "PYTHON_EXEC": str(python / "python")}
        command = ["bash", "scripts/gpu_check.sh", str(tmp_path)]
        done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
        return done.returncode, done.stdout

    code, printed = check()
    rows = (tmp_path / "table.txt").read_text()
    assert code == 0, printed
    assert printed.endswith(rows) and rows.count(" passed ") == len(rows.splitlines()) == 12
    assert "tokens/s" in rows.splitlines()[-1] and '"losses-compiled": 0' in rows
    (tmp_path / "done" / "sampling").unlink()
    assert check()[1].count("== ") == 1
    (tmp_path / "done" / "sampling").unlink()
    code, printed = check(seconds=0)  # a part for which no time is left is not passed
    assert code == 1 and "FAILED" in printed.splitlines()[-1] and "repeat the command" in printed
