"""The largest micro-batch that fits is found; activation checkpointing saves memory and changes no
bit; a rank that runs out of memory during a run costs a repeated step, or ends the run with a
message that says how to go on."""

import re
from types import SimpleNamespace

import pytest
import torch
from support import final, losses

from nanonormuon import build, errors, optim
from nanonormuon.config import OptimConfig, load
from nanonormuon.model import GPT, GPTConfig
from nanonormuon.runtime import activations, memory
from nanonormuon.runtime.distributed import World


class Small(GPT):
    """A model on a device with room for six sequences of a training step, five of an evaluation."""

    room = 6

    def forward(self, tokens, targets=None, **more):
        self.tried.append(len(tokens))
        if len(tokens) > self.room - (not torch.is_grad_enabled()):
            raise torch.OutOfMemoryError("no room")
        return super().forward(tokens, targets, **more)


def plan(seq_len, *settings):
    return load([f"data.seq_len={seq_len}", "train.batch_tokens=1_048_576", *settings])[0]


def small():
    model = Small(GPTConfig(vocab_size=64, n_layer=1, n_head=2, n_embd=16)).init_weights(3)
    model.tried = []
    return model, optim.make_optimizers(model, OptimConfig())


def test_the_probe_finds_the_largest():
    model, optimizers = small()
    assert memory.probe(model, optimizers, 8, [1, 2, 3, 4, 6, 8, 12, 24]) == 4
    assert max(model.tried) <= 8  # sizes far above the limit are not tried


def test_not_even_one():
    model, optimizers = small()
    model.room = 0
    with pytest.raises(errors.OutOfMemory, match=r"1 sequence of 8 tokens and an update do not"):
        memory.probe(model, optimizers, 8, [1, 2])


@pytest.mark.parametrize("recompute", [False, True])
def test_under_fsdp_activations_may_take_60_percent_of_the_memory(monkeypatch, recompute):
    model = GPT(GPTConfig(vocab_size=64, n_layer=3, n_head=2, n_embd=16))
    own = (12 // 2 + 4) * sum(p.numel() for p in model.parameters())  # whole gradients add up

    def make(device):
        with device:
            return GPT(model.config), []

    m, dtype, world = model.config, model.compute_dtype, World(0, 2, torch.device("cuda"))
    kept = [sum(activations.kept(m, 8, n, dtype, recompute)) for n in (0, 4)]
    room = (kept[1] - kept[0] + activations.chunk_bytes(m, 4 * 8, dtype)) / 0.6
    monkeypatch.setattr(memory.distributed, "largest", lambda values: values)
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda _: None)
    monkeypatch.setattr(memory.distributed, "size", lambda: 2)
    config = plan(8, "train.parallel=fsdp", f"train.activation_checkpointing={recompute}".lower())
    for spare, fits in ((16, 4), (-16, 2)):
        free = own + int(room) + spare, 0
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _, free=free: free)
        assert memory.choose(make, config, 8, world) == fits
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (own, 0))
    assert memory.choose(make, config, 8, world) == 1


def test_under_fsdp_the_estimate_makes_no_weights(monkeypatch):
    """A rank may not have room for the whole model."""
    found = []

    def estimate(model, *_):
        found.append(model.embed_tokens.weight.device.type)
        raise RuntimeError("enough")

    monkeypatch.setattr(memory, "estimate", estimate)
    monkeypatch.setattr(memory.distributed, "size", lambda: 2)
    config = load(["model.vocab_size=64", "train.parallel=fsdp", "train.dtype=fp32"])[0]
    with pytest.raises(RuntimeError, match="enough"):
        build.make_engine(config, None, World(0, 2, torch.device("cuda")), 4, None)
    assert found == ["meta"]


def test_all_ranks_take_the_smallest_that_a_probe_found(monkeypatch):
    monkeypatch.setattr(memory.distributed, "largest", lambda values: [max(values[0], -3)])
    monkeypatch.setattr(memory, "probe", lambda *_: 6)
    world, reset = World(0, 1, torch.device("cuda")), []
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", reset.append)
    assert memory.choose(lambda _: (), plan(8), 12, world) == 3
    assert reset == [world.device]  # the probe's peak is not the run's


@pytest.mark.parametrize(("tokens", "rows"), [(100, 100), (512, 512), (600, 300), (1025, 342)])
def test_the_estimate_of_the_logits_is_of_the_chunks_that_are_used(tokens, rows, monkeypatch):
    monkeypatch.setattr(activations, "here", lambda: torch.device("cpu"))
    m = GPTConfig(vocab_size=4096, n_layer=1, n_head=2, n_embd=16)
    assert activations.chunk_bytes(m, tokens, torch.float32) == rows * 4096 * 16
    assert activations.chunk_bytes(m, tokens, torch.bfloat16) == rows * 4096 * 12 + 4096 * 16 * 2


def test_micro_batches_that_add_up_leave_room_for_whole_gradients(monkeypatch):
    """All sequences at once fit where two micro-batches do not: FSDP2 shards a step's gradients,
    but not those of a part of it."""
    model = GPT(GPTConfig(vocab_size=4096, n_layer=1, n_head=2, n_embd=16))
    parameters = sum(p.numel() for p in model.parameters())
    free = [12 * parameters // 8 + 6 * parameters]
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: free)
    monkeypatch.setattr(activations, "chunk_bytes", lambda *_: 2 * parameters)
    monkeypatch.setattr(activations, "kept", lambda *_: (0, 0))
    assert memory.estimate(model, plan(8), [1, 2], None, 8) == 2
    assert (
        memory.estimate(model, plan(8, "train.reshard=false"), [1, 2], None, 8) == 1
    )  # whole weights
    free[0] -= 3 * parameters
    assert memory.estimate(model, plan(8), [1, 2], None, 8) == 1


@pytest.mark.parametrize(
    ("message", "kind"),
    [
        ("CUDA error: out of memory\nCUDA kernel errors might be reported later", RuntimeError),
        ("CUDA out of memory. Tried to allocate 2.00 GiB", RuntimeError),
        ("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate`", RuntimeError),
        ("cuDNN error: CUDNN_STATUS_ALLOC_FAILED", RuntimeError),
        (
            "NCCL error in: ProcessGroupNCCL.cpp:3690, unhandled cuda error, NCCL version 2.27.5\n"
            "ncclUnhandledCudaError: Call to CUDA function failed.\nLast error:\n"
            "Cuda failure 2 'out of memory'",
            torch.distributed.DistBackendError,
        ),
        ("alloc_cpu.cpp:124] DefaultCPUAllocator: can't allocate memory", RuntimeError),
        ("MPS backend out of memory (MPS allocated: 9.06 GB)", RuntimeError),
    ],
)  # fmt: skip
def test_every_librarys_words_for_no_memory_are_known(message, kind):
    assert errors.exit_code(kind(message)) == 6
    assert not errors.out_of_memory(errors.PeerError(f"rank 0: {message}", 6))  # its own, not ours


def test_other_errors_of_a_device_are_not_for_want_of_memory():
    for message in (
        "CUDA error: an illegal memory access was encountered",
        "CUDA error: CUBLAS_STATUS_EXECUTION_FAILED",
        "g++: fatal error: cc1plus: out of memory allocating 65536 bytes",
        "out of resource: shared memory, Required: 262144, Hardware limit: 232448",
    ):
        assert not errors.out_of_memory(RuntimeError(message)), message


def test_divisors():
    assert memory.divisors(1) == [1] and memory.divisors(12) == [1, 2, 3, 4, 6, 12]


@pytest.mark.parametrize(("per_rank", "wanted"), [(12, [6, 3, 1]), (7, [1]), (9, [3, 1])])
def test_a_smaller_micro_batch_divides(per_rank, wanted):
    model, _ = small()
    engine = SimpleNamespace(world=World(0, 1, torch.device("cpu")), model=model, dealt=False)
    micro = memory.MicroBatch(per_rank, per_rank, engine, SimpleNamespace(step=0), "again")
    for size in wanted:
        micro.shrink(True, "")
        assert micro.size == size and micro.count * size == per_rank
    with pytest.raises(errors.OutOfMemory, match="one sequence already"):
        micro.shrink(True, "")


def test_on_a_cpu_it_is_arithmetic():
    world = World(0, 1, torch.device("cpu"))
    assert memory.choose(small, plan(1024), 12, world) == 6
    assert memory.choose(small, plan(16384), 12, world) == 1


def test_activation_checkpointing_keeps_a_fraction_and_the_same_bits():
    torch.manual_seed(4)
    tokens = torch.randint(64, (4, 64))
    grads, kept = [], []
    for again in (False, True):
        torch.manual_seed(5)
        model = GPT(GPTConfig(vocab_size=64, n_layer=6, n_head=2, n_embd=32)).init_weights(3)
        for p in model.parameters():  # also the projections that begin at zero
            torch.nn.init.normal_(p, std=0.1)
        if again:
            activations.checkpoint_activations(model)
        seen = {}

        def pack(t, seen=seen):
            seen[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
            return t

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            loss = model(tokens, tokens)
        loss.backward()
        kept.append(sum(seen.values()))
        grads.append([loss, *(p.grad for p in model.parameters())])
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))
    assert kept[1] < kept[0] / 4


def test_activation_checkpointing_repeats_what_is_random():
    """With dropout in a block, the recomputed forward pass uses the same mask."""
    tokens, grads = torch.arange(48).view(2, 24), []
    for again in (False, True):
        model = GPT(GPTConfig(vocab_size=64, n_layer=2, n_head=2, n_embd=16)).init_weights(3)
        torch.manual_seed(5)
        for p in model.parameters():  # also the projections that begin at zero
            torch.nn.init.normal_(p, std=0.1)
        for layer in model.layers:
            layer.mlp = torch.nn.Sequential(layer.mlp, torch.nn.Dropout(0.5))
        if again:
            activations.checkpoint_activations(model)
        loss = model(tokens, tokens)
        loss.backward()
        grads.append([loss, *(p.grad for p in model.parameters())])
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("ranks", "more"),
    [
        (1, []),
        (2, ["train.micro_batch=3"]),
        (2, ["train.parallel=fsdp", "train.micro_batch=3"]),
    ],
)
def test_a_run_with_activation_checkpointing_ends_in_the_same_bytes(
    ranks, more, tiny, forks, tmp_path
):
    runs = {"plain": [], "checkpointed": ["train.activation_checkpointing=true"]}
    for name, wish in runs.items():
        codes, said = forks.run([*tiny, *more, *wish, "--out", tmp_path / name], ranks)
        assert codes == [0] * ranks, said
    assert final(tmp_path / "plain", 8) == final(tmp_path / "checkpointed", 8)


@pytest.mark.slow
def test_activation_checkpointing_is_no_break_in_a_compiled_graph():
    model = GPT(GPTConfig(vocab_size=64, n_layer=2, n_head=2, n_embd=16)).init_weights(3)
    tokens = torch.arange(24).view(2, 12)
    wanted = model(tokens, tokens)
    activations.checkpoint_activations(model)
    loss = torch.compile(model, backend="aot_eager", fullgraph=True)(tokens, tokens)
    loss.backward()
    assert float(loss.detach()) == pytest.approx(float(wanted.detach()), abs=1e-6)


# ------------------------------------------------------------------------------------------------
# During a run


@pytest.fixture(scope="module")
def undisturbed(tiny, forks, tmp_path_factory):
    folder = tmp_path_factory.mktemp("undisturbed")
    for name, more in (("large", []), ("small", ["train.micro_batch=3"])):
        codes, said = forks.run([*tiny, *more, "--out", folder / name], ranks=2)
        assert codes == [0, 0], said
    return losses(folder / "large"), losses(folder / "small")


@pytest.mark.parametrize(
    ("ranks", "fault", "micro", "fewer"),
    [
        (2, "oom@forward:3:1", "auto", 3),  # in the step's last forward pass
        # before it, when the other rank has finished its own
        pytest.param(2, "oom@forward:3:0", "2", 1, marks=pytest.mark.slow),
        pytest.param(2, "oom@backward:3:1", "2", 1, marks=pytest.mark.slow),
        (1, "oom@backward:3", "auto", 6),  # a single rank may run out anywhere
        (1, "oom@trial:0", "auto", 6),  # and before the first step, in the compiler's trial
        (2, "oom@trial:0:1", "auto", 3),
    ],
)
def test_a_rank_without_memory_costs_a_repeated_step(
    ranks, fault, micro, fewer, tiny, forks, tmp_path, undisturbed
):
    arguments = [*tiny, f"train.micro_batch={micro}", "--out", tmp_path / "run"]
    arguments += ["train.compile=on"] if "trial" in fault else []
    codes, said = forks.run(arguments, ranks, fault)
    assert codes == [0] * ranks, said
    step = 0 if "trial" in fault else 3
    tried = 12 // ranks if micro == "auto" else micro
    assert re.search(rf"step {step}: out of memory.* {tried};.* {fewer};", said[0])
    large, small = undisturbed
    assert len(large) == 8 and losses(tmp_path / "run") == pytest.approx(large, abs=1e-5)
    if micro == "auto" and ranks == 2:
        assert losses(tmp_path / "run")[:step] == large[:step]
        assert losses(tmp_path / "run")[step:] == pytest.approx(small[step:], abs=1e-6)


@pytest.mark.parametrize(
    ("fault", "more", "codes", "words"),
    [
        ("oom@forward:3:1", ["train.micro_batch=1"], [6, 6], "one sequence already"),
        # the other rank waits for gradients that never come
        ("oom@backward:3:1", [], [7, 6], "train.micro_batch=3"),
        pytest.param(
            "oom@forward:3:1",
            ["train.parallel=fsdp"],
            [7, 6],
            "train.micro_batch=3",
            marks=pytest.mark.slow,
        ),
    ],
)
def test_an_end_for_want_of_memory(fault, more, codes, words, tiny, forks, tmp_path):
    out = tmp_path / "run"
    found, said = forks.run([*tiny, "train.save_every=2", *more, "--out", out], 2, fault)
    assert found == codes, said
    (line,) = [line for line in said[1].splitlines() if "error: " in line]
    assert "step 3" in line and words in line and f"--resume --out {out}" in line
    steps = sorted(path.name for path in (out / "checkpoints").iterdir())
    assert steps == (["step-000002"] if 7 in codes else ["step-000002", "step-000003"])
