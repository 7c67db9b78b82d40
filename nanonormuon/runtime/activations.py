"""Activation memory: what a forward pass keeps for its backward pass, and how to keep less.

Measured without running either, on tensors that have a shape and no content.
"""

from collections.abc import Callable
from dataclasses import replace
from functools import cache
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.checkpoint import checkpoint

from nanonormuon.model import CHUNK, GPT, GPTConfig


def here() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def kept(
    m: GPTConfig, seq_len: int, micro_batch: int, dtype: torch.dtype, recompute: bool
) -> tuple[int, int]:
    """Bytes kept for the backward pass: by the blocks, and by what is around them.

    Both grow linearly in blocks and in sequences, so four small cases tell all others.
    """
    f = {(L, B): recorded(replace(m, n_layer=L), seq_len, B, dtype) for L in (1, 2) for B in (1, 2)}
    block_1, block_2 = f[2, 1] - f[1, 1], f[2, 2] - f[1, 2]
    block = block_1 + (micro_batch - 1) * (block_2 - block_1)
    around_1, around_2 = f[1, 1] - block_1, f[1, 2] - block_2
    around = around_1 + (micro_batch - 1) * (around_2 - around_1)
    if recompute:  # the inputs of all, and all of one
        inputs = m.n_layer * micro_batch * seq_len * m.n_embd * dtype.itemsize
        return inputs + block, around
    return m.n_layer * block, around


@cache
def recorded(m: GPTConfig, seq_len: int, batch: int, dtype: torch.dtype) -> int:
    """Bytes that autograd keeps of one forward pass, beside the weights."""
    with FakeTensorMode(), torch.device(here().type):
        model = GPT(m, dtype)
        tokens = torch.zeros(batch, seq_len, dtype=torch.int64)
        own = {p.untyped_storage()._cdata for p in model.parameters()}
        storages = {}

        def pack(t: torch.Tensor) -> torch.Tensor:
            storage = t.untyped_storage()
            storages[storage._cdata] = storage  # kept alive, so that no other gets its number
            return t

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            loss = model(tokens, tokens)  # noqa: F841, whose graph is what is kept
        return sum(s.nbytes() for key, s in storages.items() if key not in own)


def chunk_bytes(m: GPTConfig, tokens: int, dtype: torch.dtype) -> int:
    """HeadLoss's logits, their float32 copy, probabilities and gradient, for a chunk of rows; and
    the weight in the dtype of the product."""
    rows = min(tokens, max(512, CHUNK[here().type] // m.vocab_size))
    cast = 0 if dtype == torch.float32 else m.vocab_size * m.n_embd * dtype.itemsize
    return rows * m.vocab_size * (4 + 4 + 2 * dtype.itemsize) + cast


def checkpoint_activations(model: GPT) -> None:
    """Have each block (`model.layers`) keep only its input, and run forward again in backward.

    About a third more work, and equal bits, dropout included: the random generator's state is
    restored for the second forward pass. Called before an Engine distributes the model.
    """

    def recomputed(forward: Callable) -> Callable:
        def call(*args: Any) -> Any:
            if not torch.is_grad_enabled():
                return forward(*args)
            return checkpoint(forward, *args, use_reentrant=False, preserve_rng_state=True)

        return call

    for layer in model.layers:
        layer.forward = recomputed(layer.forward)
