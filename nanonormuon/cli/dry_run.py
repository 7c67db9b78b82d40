"""The cost of a run, from its configuration alone: parameters, FLOPs, memory, disk, time. Counted
on a model without storage and on fake tensors; timed on models of one and two blocks."""

from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from torch.utils.benchmark import Timer

from nanonormuon import checkpoint, optim
from nanonormuon.build import split_batch
from nanonormuon.config import Config, our_optimizers
from nanonormuon.model import GPT
from nanonormuon.pretrained import models
from nanonormuon.runtime import distributed, health, memory
from nanonormuon.runtime.activations import chunk_bytes, here, kept
from nanonormuon.sample import cache_bytes
from nanonormuon.storage.shards import MANIFEST, read_manifest
from nanonormuon.text.tokenizer import trained_size

TRIAL_SECONDS = 0.5  # least time per measurement
LONGEST_TRIAL = 2e11  # most FLOP of a block and a micro-batch that a CPU tries
VOCABULARIES = {"byte": 257, "gpt2": 50_257, "cl100k_base": 100_258, "o200k_base": 200_000}


@dataclass(frozen=True)
class Estimate:
    """Cost of a run; memory and checkpoint in bytes."""

    parameters: dict[str, int]  # by role
    active: int  # parameters that take part in a token's forward pass
    flops_per_token: float  # forward and backward
    tokens: int  # of the whole run
    parts: dict[str, int]  # of a rank's memory
    checkpoint: int
    cache: int  # of generation, bytes per token

    @property
    def flops(self) -> float:
        return self.flops_per_token * self.tokens

    @property
    def memory(self) -> int:
        return sum(self.parts.values())


def build(config: Config, device: torch.device) -> tuple[GPT, list[torch.optim.Optimizer]]:
    """Make the model and its optimizers on `device`, in the dtype of this machine."""
    dtype = distributed.compute_dtype(config.train.dtype, here())
    with device:
        model = GPT(config.model, dtype)
    settings = config.optim
    if settings.name not in our_optimizers():  # counted as AdamW: an import runs code
        settings = replace(settings, name="adamw", options="")
    return model, optim.make_optimizers(model, settings, dtype)


def estimate(config: Config, micro_batch: int, ranks: int = 1, shards: int = 1) -> Estimate:
    """Count the cost of a run whose vocab_size is known; `shards` of `ranks` share the weights.

    Left out: libraries and the process itself, NorMuon's workspace (the activations are gone by
    then), buckets of DDP and FSDP2, fragmentation.
    """
    T, t = config.data.seq_len, config.train
    model, optimizers = build(config, torch.device("meta"))
    dtype = model.compute_dtype
    parameters = {g["role"]: sum(p.numel() for p in g["params"]) for g in optim.param_groups(model)}
    weights = 4 * sum(parameters.values())
    saved = checkpoint.size_of(model, optimizers)
    activations, head = kept(model.config, T, micro_batch, dtype, t.activation_checkpointing)
    gathered = added_up = 0
    if shards > 1:  # two blocks and everything outside them are whole at a time, in compute's dtype
        blocks = sorted(sum(p.numel() for p in layer.parameters()) for layer in model.layers)
        gathered = (weights // 4 - sum(blocks[:-2]) * t.reshard) * dtype.itemsize
        if micro_batch * T * ranks < t.batch_tokens:  # micro-batches' gradients add up whole
            added_up = weights
    parts = {
        "weights": weights // shards + gathered,
        "gradients": weights // shards + added_up,
        "optimizer": (saved - weights) // shards,
        "activations": activations,  # which the blocks keep for the backward pass
        "logits": head + chunk_bytes(model.config, micro_batch * T, dtype),  # and their gradients
    }
    tokens = t.last_step * t.batch_tokens
    active, cache = sum(parameters.values()) - model.unvisited(), cache_bytes(model)
    return Estimate(parameters, active, model.flops_per_token(T), tokens, parts, saved, cache)


def with_model(config: Config, origin: dict[str, str]) -> tuple[Config, dict[str, str]]:
    """Fill in the model that --init-from names, and where each setting comes from."""
    source = config.train.init_from
    if not source or config.model.vocab_size:
        return config, origin
    model = models.model_config(models.find_checkpoint(Path(source)))
    return replace(config, model=model), origin | {f"model.{key}": source for key in asdict(model)}


def with_vocabulary(config: Config) -> tuple[Config, int | None]:
    """Fill in the data's vocabulary; also returns the number of training tokens. Without prepared
    data the vocabulary follows from the tokenizer's name, and the number is None. Raises
    TokenizerError, and DataError for a damaged manifest."""
    path = Path(config.data.path)
    if config.data.format == "shards" and (path / MANIFEST).exists():
        manifest = read_manifest(path)
        found, tokens = manifest["tokenizer"]["vocab_size"], manifest["train"]["tokens"]
    else:
        name, tokens = config.data.tokenizer, None
        found = VOCABULARIES.get(name) or trained_size(name) or 50_257
    vocab_size = config.model.vocab_size or -(-found // 64) * 64
    return replace(config, model=replace(config.model, vocab_size=vocab_size)), tokens


def report(config: Config) -> list[str]:
    """The lines of --dry-run below the configuration; needs no data and starts no ranks."""
    given = config.model.vocab_size
    config, data_tokens = with_vocabulary(config)
    t, T, ranks = config.train, config.data.seq_len, distributed.size()
    per_rank, micro = split_batch(config, ranks), t.micro_batch
    if micro == "auto":  # a GPU takes more, which only a probe can find
        fitting = (n for n in memory.divisors(per_rank) if n * T <= memory.CPU_TOKENS)
        micro = max(fitting, default=1)
    found = estimate(config, micro)
    assumed = f"; {config.optim.name} is not imported, and counted as AdamW"
    roles = ", ".join(f"{role} {n:,}" for role, n in found.parameters.items())
    lines = [
        f"parameters: {sum(found.parameters.values()):,} ({roles})"
        + (f", {found.active:,} of them active for a token" if config.model.n_expert else "")
        + ("" if config.optim.name in our_optimizers() else assumed),
        f"work: {t.last_step:,} steps x {t.batch_tokens:,} tokens = {found.tokens:,} tokens; "
        f"{found.flops_per_token / 1e6:.4g} MFLOP per token = {found.flops:.3g} FLOP",
    ]
    if not (data_tokens or given or config.data.path.startswith("builtin:")):
        ids = f"{config.model.vocab_size:,} token ids assumed, by data.tokenizer"
        lines.insert(0, f"{config.data.path}: nothing prepared there, {ids}")
    if data_tokens:
        lines.append(f"data: {data_tokens:,} train tokens, {found.tokens / data_tokens:.2f} epochs")
    layouts = {"1 rank": found}
    for kind in ("ddp", "fsdp", "hsdp") if ranks > 1 else ():
        if kind != "hsdp" or distributed.local_size() < ranks:  # hsdp needs several nodes
            share = distributed.shards(kind)
            layouts[f"each of {ranks} ranks, {kind}"] = estimate(config, micro, ranks, share)
    for where, e in layouts.items():
        parts = ", ".join(f"{part} {size / 1e9:.3g}" for part, size in e.parts.items())
        size = f"{e.memory / 1e9:.3g} GB ({parts})"
        lines.append(f"memory, {where}, {micro} sequences at a time: {size}")
    lines.append(f"checkpoint: {found.checkpoint / 1e9:.3g} GB, train.keep_last = {t.keep_last}")
    lines.append(f"generation: {found.cache:,} bytes of cache per token")
    if t.device in ("auto", here().type):
        lines.append(time_line(config, found, micro, per_rank))
    return lines


def time_line(config: Config, found: Estimate, micro: int, per_rank: int) -> str:
    """Time models of one and two blocks (pairs with value_embed); each further one adds as much."""
    per_block = found.flops_per_token / config.model.n_layer  # an upper bound: all outside counts
    too_long = here().type == "cpu" and per_block * micro * config.data.seq_len > LONGEST_TRIAL
    if too_long or found.memory > memory.memory_of(here()):
        return "time: not measured, one micro-batch is too large for this device"
    period = 1 + config.model.value_embed
    (passes, update), (passes_2, update_2) = (timed(config, n * period, micro) for n in (1, 2))
    more = config.model.n_layer / period - 1
    step = (passes + more * max(0.0, passes_2 - passes)) * (per_rank // micro)
    step += update + more * max(0.0, update_2 - update)
    whole = f"about {step * config.train.last_step / 60:.3g} minutes of training"
    how = f"on this {here().type} (timed just now, not compiled, without evaluations)"
    return f"time: {whole}, {step:.3g} s per step {how}"


def timed(config: Config, layers: int, micro: int) -> list[float]:
    """Median seconds of forward and backward of a micro-batch, and of an update, with `layers`."""
    if here().type == "cpu":
        distributed.keep_freed_memory()
    small = replace(config.model, n_layer=layers, n_dense=0)
    model, optimizers = build(replace(config, model=small), here())
    model.init_weights(0)  # a saturated softmax makes denormal numbers, which are slow
    shape = (micro, config.data.seq_len)
    tokens = torch.randint(config.model.vocab_size, shape, device=here())

    def passes() -> None:
        model.zero_grad(set_to_none=True)
        model(tokens, tokens).backward()

    def update() -> None:
        weights, buffers = checkpoint.named_state(model, optimizers)
        checked = (*weights.values(), *buffers.values(), *(p.grad for p in weights.values()))
        health.norm(t for t in checked if t.is_floating_point())  # before every update
        for optimizer in optimizers:
            optimizer.step()

    def seconds(work: Callable[[], None]) -> float:
        timer = Timer("work()", globals={"work": work}, num_threads=torch.get_num_threads())
        return timer.blocked_autorange(min_run_time=TRIAL_SECONDS).median

    return [seconds(passes), seconds(update)]
