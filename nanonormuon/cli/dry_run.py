"""The cost of a run, from its configuration alone: parameters, FLOPs, memory, disk, time. Counted
on a model without storage and on fake tensors; timed on the model itself, unless it is large."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch.optim import Optimizer
from torch.utils.benchmark import Timer

from nanonormuon import checkpoint, optim
from nanonormuon.build import split_batch
from nanonormuon.config import Config, our_optimizers
from nanonormuon.model import GPT
from nanonormuon.runtime import distributed, health, memory
from nanonormuon.runtime.activations import chunk_bytes, here, kept
from nanonormuon.sample import cache_bytes
from nanonormuon.storage.shards import MANIFEST, read_manifest
from nanonormuon.text.tokenizer import trained_size

TRIAL_SECONDS = 0.5  # least time per measurement
LONGEST_TRIAL = 1e12  # most FLOP of a micro-batch that a CPU tries
VOCABULARIES = {"byte": 257, "gpt2": 50_257, "cl100k_base": 100_258, "o200k_base": 200_000}


def build(config: Config, device: torch.device) -> tuple[GPT, list[Optimizer]]:
    """Make the model and its optimizers on `device`, in the dtype of this machine."""
    dtype = distributed.compute_dtype(config.train.dtype, here())
    with device:
        model = GPT(config.model, dtype)
    settings = config.optim
    if settings.name not in our_optimizers():  # counted as AdamW: an import runs code
        settings = replace(settings, name="adamw", options="")
    return model, optim.make_optimizers(model, settings, dtype)


def memory_parts(
    config: Config, model: GPT, optimizers: Sequence[Optimizer], micro_batch: int,
    ranks: int = 1, shards: int = 1,
) -> dict[str, int]:  # fmt: skip
    """Count the bytes that a rank holds at once; `shards` of `ranks` share the weights.

    Left out: libraries and the process itself, NorMuon's workspace (the activations are gone by
    then), buckets of DDP and FSDP2, fragmentation.
    """
    T, t, dtype = config.data.seq_len, config.train, model.compute_dtype
    weights = 4 * sum(p.numel() for p in model.parameters())
    activations, head = kept(model.config, T, micro_batch, dtype, t.activation_checkpointing)
    gathered = added_up = 0
    if shards > 1:  # two blocks and everything outside them are whole at a time, in compute's dtype
        blocks = sorted(sum(p.numel() for p in layer.parameters()) for layer in model.layers)
        gathered = (weights // 4 - sum(blocks[:-2]) * t.reshard) * dtype.itemsize
        if micro_batch * T * ranks < t.batch_tokens:  # micro-batches' gradients add up whole
            added_up = weights
    return {
        "weights": weights // shards + gathered,
        "gradients": weights // shards + added_up,
        "optimizer": (checkpoint.size_of(model, optimizers) - weights) // shards,
        "activations": activations,  # which the blocks keep for the backward pass
        "logits": head + chunk_bytes(model.config, micro_batch * T, dtype),  # and their gradients
    }


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
    model, optimizers = build(config, torch.device("meta"))
    roles = {g["role"]: sum(p.numel() for p in g["params"]) for g in optim.param_groups(model)}
    parameters, tokens = sum(roles.values()), t.last_step * t.batch_tokens
    of_token, saved = model.flops_per_token(T), checkpoint.size_of(model, optimizers)
    counts = f"parameters: {parameters:,} ({', '.join(f'{r} {n:,}' for r, n in roles.items())})"
    if config.model.n_expert:
        counts += f", {parameters - model.unvisited():,} of them active for a token"
    if config.optim.name not in our_optimizers():
        counts += f"; {config.optim.name} is not imported, and counted as AdamW"
    lines = [
        counts,
        f"work: {t.last_step:,} steps x {t.batch_tokens:,} tokens = {tokens:,} tokens; "
        f"{of_token / 1e6:.4g} MFLOP per token = {of_token * tokens:.3g} FLOP",
    ]
    if not (data_tokens or given or config.data.path.startswith("builtin:")):
        ids = f"assuming {config.model.vocab_size:,} token ids, from data.tokenizer"
        lines.insert(0, f"{config.data.path}: nothing is prepared there; {ids}")
    if data_tokens:
        lines.append(f"data: {data_tokens:,} train tokens, {tokens / data_tokens:.2f} epochs")
    alone = memory_parts(config, model, optimizers, micro)
    layouts = {"1 rank": alone}
    for kind in ("ddp", "fsdp", "hsdp") if ranks > 1 else ():
        if kind != "hsdp" or distributed.local_size() < ranks:  # hsdp needs several nodes
            parts = memory_parts(config, model, optimizers, micro, ranks, distributed.shards(kind))
            layouts[f"each of {ranks} ranks, {kind}"] = parts
    for where, parts in layouts.items():
        each = ", ".join(f"{part} {size / 1e9:.3g}" for part, size in parts.items())
        size = f"{sum(parts.values()) / 1e9:.3g} GB ({each})"
        lines.append(f"memory, {where}, {micro} sequences at a time: {size}")
    lines.append(f"checkpoint: {saved / 1e9:.3g} GB, train.keep_last = {t.keep_last}")
    lines.append(f"generation: {cache_bytes(model):,} bytes of cache per token")
    if t.device in ("auto", here().type):
        too_long = here().type == "cpu" and of_token * micro * T > LONGEST_TRIAL
        if too_long or sum(alone.values()) > memory.memory_of(here()):
            lines.append("time: not measured, one micro-batch is too large for this device")
            return lines
        passes, update = timed(config, micro)
        step = passes * (per_rank // micro) + update
        whole = f"about {step * t.last_step / 60:.3g} minutes of training, {step:.3g} s per step"
        how = f"on this {here().type} (timed just now, not compiled, without evaluations)"
        lines.append(f"time: {whole} {how}")
    return lines


def timed(config: Config, micro: int) -> list[float]:
    """Median seconds of forward and backward of a micro-batch, and of an update."""
    if here().type == "cpu":
        distributed.keep_freed_memory()
    model, optimizers = build(config, here())
    model.init_weights(0)  # a saturated softmax makes denormal numbers, which are slow
    shape = (micro, config.data.seq_len)
    tokens = torch.randint(config.model.vocab_size, shape, device=here())

    def passes() -> None:
        model.zero_grad(set_to_none=True)
        model(tokens, tokens).backward()

    def update() -> None:
        weights, buffers = checkpoint.named_state(model, optimizers)
        checked = (*weights.values(), *buffers.values(), *(p.grad for p in weights.values()))
        # before every update; a buffer of the model has no gradient
        health.norm(t for t in checked if t is not None and t.is_floating_point())
        for optimizer in optimizers:
            optimizer.step()

    def seconds(work: Callable[[], None]) -> float:
        timer = Timer("work()", globals={"work": work}, num_threads=torch.get_num_threads())
        return timer.blocked_autorange(min_run_time=TRIAL_SECONDS).median

    return [seconds(passes), seconds(update)]
