"""Activation memory: its size, measured on fake tensors without computing, and checkpointing."""

from collections.abc import Callable
from dataclasses import replace
from functools import cache
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.checkpoint import checkpoint

from nanonormuon.model import GPT, chunk_rows
from nanonormuon.parts.config import GPTConfig


def here() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def kept(
    m: GPTConfig, seq_len: int, micro_batch: int, dtype: torch.dtype, recompute: bool
) -> tuple[int, int]:
    """Return the activation memory in bytes of the blocks and of the rest of the model.

    Both are linear in layers L and sequences B, so four small cases determine them. Dense first
    layers count as layers with experts.
    """
    m = replace(m, n_dense=0)
    f = {(L, B): recorded(replace(m, n_layer=L), seq_len, B, dtype) for L in (1, 2) for B in (1, 2)}
    f |= {(L, micro_batch): f[L, 1] + (micro_batch - 1) * (f[L, 2] - f[L, 1]) for L in (1, 2)}
    block = f[2, micro_batch] - f[1, micro_batch]
    rest = f[1, micro_batch] - block
    if recompute:  # the inputs of all blocks, and all activations of one block
        inputs = m.n_layer * micro_batch * seq_len * m.n_embd * dtype.itemsize
        return inputs + block, rest
    return m.n_layer * block, rest


@cache
def recorded(m: GPTConfig, seq_len: int, batch: int, dtype: torch.dtype) -> int:
    """Return the bytes that autograd keeps after a forward pass, without the weights."""
    with FakeTensorMode(), torch.device(here().type):
        model = GPT(m, dtype)
        tokens = torch.zeros(batch, seq_len, dtype=torch.int64)
        own = {p.untyped_storage()._cdata for p in model.parameters()}
        storages = {}

        def pack(t: torch.Tensor) -> torch.Tensor:
            storage = t.untyped_storage()
            storages[storage._cdata] = storage  # keeps its address from being reused
            return t

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            loss = model(tokens, tokens)  # noqa: F841, its graph keeps the tensors
        return sum(s.nbytes() for key, s in storages.items() if key not in own)


def chunk_bytes(m: GPTConfig, tokens: int, dtype: torch.dtype) -> int:
    """Return the bytes that HeadLoss needs for a chunk (logits, their float32 copy, probabilities,
    gradient) and for its weight in the compute dtype."""
    rows = chunk_rows(tokens, m.vocab_size, here().type)
    cast = 0 if dtype == torch.float32 else m.vocab_size * m.n_embd * dtype.itemsize
    return rows * m.vocab_size * (4 + 4 + 2 * dtype.itemsize) + cast


def checkpoint_activations(model: GPT) -> None:
    """Make each block keep only its input and recompute the rest in its backward pass, bitwise
    equally, in a third more time. Call this before an Engine distributes the model."""

    def recomputed(forward: Callable) -> Callable:
        def call(*args: Any) -> Any:
            if not torch.is_grad_enabled():
                return forward(*args)
            return checkpoint(forward, *args, use_reentrant=False, preserve_rng_state=True)

        return call

    for layer in model.layers:
        layer.forward = recomputed(layer.forward)
