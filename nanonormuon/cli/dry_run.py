"""What a run will take, from its configuration alone: parameters, FLOPs, memory, disk, time.

Nothing is approximated by a formula that the code could do itself: the model is built without
storage, its parameters, FLOPs and buffers are counted, and what autograd keeps is recorded in a
forward pass on tensors that have a shape and no content.
"""

import json
import statistics
import time
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from nanonormuon import checkpoint as snapshot
from nanonormuon import optim
from nanonormuon.config import Config
from nanonormuon.errors import ConfigError
from nanonormuon.model import GPT
from nanonormuon.runtime import distributed, health, memory
from nanonormuon.runtime.activations import chunk_bytes, here, kept

TRIALS = 5  # timed steps at least, after two that are not
TRIAL_SECONDS = 1.0  # that quick ones are timed for
LONGEST_TRIAL = 2e11  # FLOP of a block and a micro-batch that a CPU is asked to try


@dataclass(frozen=True)
class Estimate:
    """parameters: by role. Memory and disk in bytes, per rank; FLOPs of forward and backward."""

    parameters: dict[str, int]
    flops_per_token: float
    tokens: int
    weights: int
    gradients: int
    optimizer: int
    activations: int  # what the blocks keep for the backward pass of one micro-batch
    logits: int  # of one chunk, and the gradients that are taken with it
    checkpoint: int

    @property
    def total_parameters(self) -> int:
        return sum(self.parameters.values())

    @property
    def flops(self) -> float:
        return self.flops_per_token * self.tokens

    @property
    def memory(self) -> int:
        return self.weights + self.gradients + self.optimizer + self.activations + self.logits


def estimate(config: Config, micro_batch: int, ranks: int = 1, sharded: bool = False) -> Estimate:
    """For a model whose vocab_size is known. sharded: by FSDP2, else replicas.

    Not counted: what libraries and the process itself take, NorMuon's work space (the activations
    are gone by then), DDP's and FSDP2's buckets, fragments.
    """
    T, t = config.data.seq_len, config.train
    dtype = distributed.compute_dtype(t.dtype, here())
    with torch.device("meta"):
        model = GPT(config.model, dtype)
    try:
        optimizers = optim.make_optimizers(model, config.optim)
    except ValueError as error:
        raise ConfigError(f"optim: {error}") from None
    parameters = {g["role"]: sum(p.numel() for p in g["params"]) for g in optim.param_groups(model)}
    weights = 4 * sum(parameters.values())
    saved = snapshot.size_of(model, optimizers)
    activations, head = kept(model.config, T, micro_batch, dtype, t.activation_checkpointing)
    parts, gathered = (ranks, 0) if sharded else (1, 0)
    if sharded:  # two blocks and what is outside of blocks are whole at a time, in compute's dtype
        block = sum(p.numel() for p in model.layers[0].parameters())
        outside = weights // 4 - block * config.model.n_layer
        gathered = (2 * block + outside) * dtype.itemsize
    return Estimate(
        parameters=parameters,
        flops_per_token=model.flops_per_token(T),
        tokens=t.last_step * t.batch_tokens,
        weights=weights // parts + gathered,
        gradients=weights // parts,
        optimizer=(saved - weights) // parts,
        activations=activations,
        logits=head + chunk_bytes(model.config, micro_batch * T, dtype),
        checkpoint=saved,
    )


# ------------------------------------------------------------------------------------------------
# For people


def with_vocabulary(config: Config) -> tuple[Config, int | None]:
    """The configuration with the vocabulary of its data, and their train tokens; without data at
    hand, with that of the tokenizer's name, and None."""
    try:
        manifest = json.loads((Path(config.data.path) / "manifest.json").read_bytes())
        found, tokens = manifest["tokenizer"]["vocab_size"], manifest["train"]["tokens"]
    except (OSError, ValueError, KeyError, TypeError):
        names = {"byte": 257, "gpt2": 50_257, "cl100k_base": 100_277, "o200k_base": 200_019}
        name, _, size = config.data.tokenizer.partition(":")
        found, tokens = names.get(name, int(size) if size.isdigit() else 50_257), None
    vocab_size = config.model.vocab_size or -(-found // 64) * 64
    return replace(config, model=replace(config.model, vocab_size=vocab_size)), tokens


def report(config: Config, ranks: int = 1) -> list[str]:
    """What --dry-run says below the configuration, without data or a process group."""
    config, data_tokens = with_vocabulary(config)
    t, T = config.train, config.data.seq_len
    per_rank = max(1, t.batch_tokens // T // ranks)
    room = max(memory.CPU_TOKENS, T)  # a GPU takes more; what fits there is found by a probe
    fitting = max(n for n in range(1, per_rank + 1) if per_rank % n == 0 and n * T <= room)
    micro = fitting if t.micro_batch == "auto" else t.micro_batch
    found = estimate(config, micro)
    roles = ", ".join(f"{role} {n:,}" for role, n in found.parameters.items())
    lines = [
        f"parameters: {found.total_parameters:,} ({roles})",
        f"work: {t.last_step:,} steps x {t.batch_tokens:,} tokens = {found.tokens:,} tokens; "
        f"{found.flops_per_token / 1e6:.4g} MFLOP per token = {found.flops:.3g} FLOP",
    ]
    if data_tokens:
        lines.append(f"data: {data_tokens:,} train tokens, {found.tokens / data_tokens:.2f} epochs")
    layouts = [(1, False)] + [(ranks, sharded) for sharded in (False, True) if ranks > 1]
    for size, sharded in layouts:
        e = estimate(config, micro, size, sharded)
        kinds = ("weights", "gradients", "optimizer", "activations", "logits")
        where = "1 rank" if size == 1 else f"each of {size} ranks, {'fsdp' if sharded else 'ddp'}"
        lines.append(
            f"memory, {where}, {micro} sequences at a time: {e.memory / 1e9:.3g} GB ("
            + ", ".join(f"{kind} {getattr(e, kind) / 1e9:.3g}" for kind in kinds)
            + ")"
        )
    lines.append(f"checkpoint: {found.checkpoint / 1e9:.3g} GB, train.keep_last = {t.keep_last}")
    if config.train.device in ("auto", here().type):
        lines.append(time_line(config, found, micro, per_rank))
    return lines


def time_line(config: Config, found: Estimate, micro: int, per_rank: int) -> str:
    """From steps of a model of one block and of two, timed here; each block more takes as long."""
    per_token = found.flops_per_token / config.model.n_layer  # not less than one block's
    if here().type == "cpu" and per_token * micro * config.data.seq_len > LONGEST_TRIAL:
        return "time: not tried, one micro-batch is too much for this device"
    (one, update_1), (two, update_2) = (timed(config, layers, micro) for layers in (1, 2))
    more = config.model.n_layer - 1
    passes = (one + more * (two - one)) * (per_rank // micro)
    step = passes + update_1 + more * (update_2 - update_1)
    minutes = step * config.train.last_step / 60
    return (
        f"time: about {minutes:.3g} minutes of training, {step:.3g} s per step "
        f"on this {here().type} (timed just now, not compiled, without evaluations)"
    )


def timed(config: Config, layers: int, micro: int) -> tuple[float, float]:
    """Seconds of a micro-batch's two passes and of an update, with so many blocks; medians."""
    device = here()
    if device.type == "cpu":
        distributed.keep_freed_memory()
    dtype = distributed.compute_dtype(config.train.dtype, device)
    with torch.device(device):
        model = GPT(replace(config.model, n_layer=layers), dtype)
        tokens = torch.randint(config.model.vocab_size, (micro, config.data.seq_len))
    model.init_weights(0)  # a saturated softmax makes denormal numbers, which are slow
    optimizers = optim.make_optimizers(model, config.optim, dtype)

    def passes() -> None:
        model(tokens, tokens).backward()

    def update() -> None:
        weights, buffers = snapshot.named_state(model, optimizers)
        checked = (*weights.values(), *buffers.values(), *(p.grad for p in weights.values()))
        health.norm(t for t in checked if t.is_floating_point())  # before every update
        for optimizer in optimizers:
            optimizer.step()

    times: list[list[float]] = [[], []]
    while len(times[1]) < 2 + TRIALS or (sum(times[0]) < TRIAL_SECONDS and len(times[1]) < 50):
        for work, its_times in zip((passes, update), times):
            start = time.perf_counter()
            work()
            if device.type == "cuda":
                torch.cuda.synchronize()
            its_times.append(time.perf_counter() - start)
        model.zero_grad(set_to_none=True)
    return statistics.median(times[0][2:]), statistics.median(times[1][2:])
