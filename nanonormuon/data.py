"""Every batch as a pure function of (seed, step).

The order of the data is computed, not stored, so it cannot change on resume, and it does not depend
on the number of ranks or micro-batches.
"""

from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch

from nanonormuon.errors import DataError
from nanonormuon.runtime.distributed import World
from nanonormuon.storage.shards import Split, check_ids
from nanonormuon.storage.values import SHARES

# ------------------------------------------------------------------------------ the training order


@dataclass(frozen=True)
class Source:
    """One directory in the training stream. It gives `share` of every `of` sequences that the
    sources before it leave over, evenly spread."""

    name: str
    starts: np.ndarray  # index of each shard's first window, then the number of windows
    first_shard: int  # index of its first shard among the shards of all sources
    share: int
    of: int

    @property
    def windows(self) -> int:
        return int(self.starts[-1])


class Batches:
    """The training stream: which `seq_len` + 1 tokens form sequence j of step s.

    sequences: per optimizer step, over all ranks and micro-batches. A rank's micro-batch is a
        slice of this global batch, `batch(step, start, stop)`.
    order: "shuffled": window w of a shard is tokens[w*T : w*T + T + 1]; each epoch visits the
        windows of all shards once, in an order that depends on `seed` and the epoch. "sequential":
        every batch is the next sequences*T tokens of a shard, as in modded-nanogpt's benchmark; a
        shard ends when position + batch + 1 reaches its length.
    mix: further splits with their shares of the sequences in millionths; `split` has the rest. Each
        source has its own epochs.
    """

    def __init__(
        self,
        split: Split,
        seq_len: int,
        sequences: int,
        seed: int = 0,
        order: str = "shuffled",
        mix: Sequence[tuple[Split, int]] = (),
    ) -> None:
        self.seq_len, self.sequences, self.seed, self.order = seq_len, sequences, seed, order
        parts = [*mix, (split, SHARES - sum(share for _, share in mix))]
        shares = [share for _, share in parts]
        known = order == "shuffled" or (order == "sequential" and not mix)
        if min(seq_len, sequences, *shares) < 1 or not known:
            raise DataError(f"batches: {seq_len=} {sequences=} {order=} {shares=}")
        self.split, self.sources = Split.joined([part for part, _ in parts]), []
        first_shard, left = 0, SHARES
        for part, share in parts:
            name = str(part.paths[0].parent)
            self.sources.append(Source(name, self._number(part), first_shard, share, left))
            first_shard, left = first_shard + len(part.shards), left - share

    def _number(self, split: Split) -> np.ndarray:
        """Return the index of each shard's first window, then the number of windows."""
        batch_tokens, lengths = self.seq_len * self.sequences, [len(s) for s in split.shards]
        if self.order == "shuffled":
            counts, need = [(n - 1) // self.seq_len for n in lengths], self.seq_len + 1
        else:
            counts = [max(n - 2, 0) // batch_tokens * self.sequences for n in lengths]
            need = batch_tokens + 2
        starts = np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)
        if not starts[-1]:
            raise DataError(
                f"{split.paths[0].parent}: data.order={self.order}, data.seq_len={self.seq_len}:"
                f" expected a shard of at least {need} tokens, the longest has {max(lengths)}; add"
                " text or lower data.seq_len"
            )
        return starts

    def taken(self, step: int) -> list[int]:
        """Count the sequences of each source consumed before `step`."""
        left, found = step * self.sequences, []
        for source in self.sources:
            found.append(left * source.share // source.of)
            left -= found[-1]
        return found

    def epochs(self, step: int) -> list[float]:
        """Count the epochs of each source consumed before `step`."""
        return [n / s.windows for n, s in zip(self.taken(step), self.sources)]

    def begun(self, step: int) -> list[tuple[str, int]]:
        """List the sources that begin another epoch in `step`, with its number, from 1."""
        found = []
        for s, n, m in zip(self.sources, self.taken(step), self.taken(step + 1)):
            before, after = (max(count - 1, 0) // s.windows for count in (n, m))
            if after > before:
                found.append((s.name, after + 1))
        return found

    def windows(self, step: int) -> np.ndarray:
        """Locate the sequences of a step: shard index and offset, (sequences, 2) int64."""
        found = np.empty((self.sequences, 2), np.int64)
        rows = np.arange(self.sequences, dtype=np.int64)
        k = step * self.sequences + rows
        for i, source in enumerate(self.sources):
            before = k * source.share // source.of  # the source's sequences so far
            here = (k + 1) * source.share // source.of > before
            epoch, window = np.divmod(before[here], source.windows)
            if self.order == "shuffled":
                seed = self.seed + (len(self.sources) - 1 - i << 57)
                window = permute(window, source.windows, seed, epoch)
            shard = np.searchsorted(source.starts, window, side="right") - 1
            found[rows[here], 0] = source.first_shard + shard
            found[rows[here], 1] = (window - source.starts[shard]) * self.seq_len
            rows, k = rows[~here], (k - before)[~here]
        return found

    def batch(self, step: int, start: int, stop: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Read tokens and targets, each (stop - start, seq_len) int64, of a step's sequences."""
        return _gather(self.split, self.windows(step)[start:stop], self.seq_len)


class Loader:
    """Reads this rank's micro-batches, prefetching the next one in a thread.

    Each rank reads a contiguous part of the batch, or, if `dealt`, every size-th micro-batch. A
    wrong guess of the next request only costs a fresh read. Errors of the thread are raised when
    its batch is requested.
    """

    def __init__(self, batches: Batches, world: World, dealt: bool = False) -> None:
        self.batches, self.world, self.dealt = batches, world, dealt
        self._pool = ThreadPoolExecutor(1, "batches")
        self._next: tuple[tuple[int, int, int], Future] | None = None

    def micro_batches(self, step: int, n: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Yield tokens and targets of a step's micro-batches, each (n, seq_len) on the device."""
        rank, ranks, sequences = self.world.rank, self.world.size, self.batches.sequences
        share = sequences // ranks
        begins = range(rank * share, (rank + 1) * share, n)
        if self.dealt:
            begins = range(rank * n, sequences, ranks * n)
        wanted = [(step, i, i + n) for i in begins]
        following = [*wanted[1:], (step + 1, begins[0], begins[0] + n)]
        for now, then in zip(wanted, following):
            guess, self._next = self._next, None
            try:
                found = guess[1].result() if guess and guess[0] == now else self._read(*now)
            except Exception as error:
                error.section = "data"  # type: ignore[attr-defined]  # for the error message
                raise
            self._next = then, self._pool.submit(self._read, *then)
            tokens, targets = (t.to(self.world.device, non_blocking=True) for t in found)
            yield tokens, targets

    def _read(self, step: int, start: int, stop: int) -> tuple[torch.Tensor, torch.Tensor]:
        tokens, targets = self.batches.batch(step, start, stop)
        if self.world.device.type == "cuda":  # pinned memory is copied asynchronously
            return tokens.pin_memory(), targets.pin_memory()
        return tokens, targets


def permute(x: np.ndarray, n: int, seed: int, epoch: np.ndarray) -> np.ndarray:
    """Apply the permutation of range(n) that (seed, epoch) selects to x.

    A Feistel network of eight rounds permutes the smallest range(4**h) that contains range(n);
    results outside range(n) go through it again, at most three more times on average. This shuffles
    any number of windows without memory, and equally on every machine.
    """
    half = np.uint64(max(1, ((n - 1).bit_length() + 1) // 2))
    mask = (np.uint64(1) << half) - np.uint64(1)
    first = _mix(epoch.astype(np.uint64) + _mix(np.array([seed % 2**64], np.uint64)))
    keys = [_mix(first + np.uint64(i)) for i in range(8)]
    out, todo = x.astype(np.uint64), np.arange(len(x))
    while len(todo):
        left, right = out[todo] >> half, out[todo] & mask
        for key in keys:
            left, right = right, left ^ (_mix(right + key[todo]) & mask)
        out[todo] = left << half | right
        todo = todo[out[todo] >= n]
    return out.astype(np.int64)


def _mix(x: np.ndarray) -> np.ndarray:
    """Hash x with splitmix64: every input bit changes half of the output bits."""
    x = x + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ x >> np.uint64(30)) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ x >> np.uint64(27)) * np.uint64(0x94D049BB133111EB)
    return x ^ x >> np.uint64(31)


def _gather(split: Split, windows: np.ndarray, seq_len: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Read windows (rows, 2), with token 0 and target -1 past a shard's end and for shard -1."""
    tokens = np.zeros((len(windows), seq_len), np.int64)
    targets = np.full_like(tokens, -1)
    for shard in set(windows[:, 0].tolist()) - {-1}:
        split.files[shard].check()
    for row, (shard, offset) in enumerate(windows.tolist()):
        if shard >= 0:
            window = split.shards[shard][offset : offset + seq_len + 1]
            tokens[row, : len(window) - 1] = window[:-1]
            targets[row, : len(window) - 1] = window[1:]
    if split.vocab_size is not None and max(tokens.max(), targets.max()) >= split.vocab_size:
        for shard, offset in windows[windows[:, 0] >= 0].tolist():
            window = split.shards[shard][offset : offset + seq_len + 1]
            check_ids(window, split.vocab_size, split.paths[shard], offset)
    return torch.from_numpy(tokens), torch.from_numpy(targets)


# -------------------------------------------------------------------------------------- validation


def validation_targets(split: Split, max_tokens: int = 0) -> int:
    """Count the targets of `validation_batches`: all tokens but each shard's first, at most
    max_tokens (0: no limit)."""
    total = split.tokens - len(split.shards)
    return min(total, max_tokens) if max_tokens else total


def validation_batches(
    split: Split, seq_len: int, batch: int, world: World, max_tokens: int = 0, stride: int = 0
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Yield this rank's share of the validation split: (batch, seq_len) int64 tokens and targets.

    Over all ranks, each target of the split (or of its first `max_tokens`) occurs exactly once. The
    windows of a shard begin `stride` tokens apart (0: seq_len). Where they overlap, only the first
    window counts a target, so after a shard's first window every target has at least seq_len -
    stride tokens before it. All else has target -1, which the loss ignores: repeated targets,
    padding, and rows that give every rank equally many batches of one shape.
    """
    left, stride = validation_targets(split, max_tokens), stride or seq_len
    if left < 1:
        raise DataError(f"{split.paths[0].parent}: the validation split has no token to predict")
    rows = []  # shard, offset, first and end position of the targets that count
    for index, shard in enumerate(split.shards):
        targets = min(len(shard) - 1, left)
        left -= targets
        if targets:
            for offset in range(0, max(targets - seq_len, 0) + stride, stride):
                rows.append((index, offset, seq_len - stride if offset else 0, targets - offset))
    rows += [(-1, 0, 0, 0)] * (-len(rows) % (batch * world.size))
    position = np.arange(seq_len)
    for start in range(world.rank * batch, len(rows), batch * world.size):
        part = np.array(rows[start : start + batch], np.int64)
        tokens, targets = _gather(split, part[:, :2], seq_len)
        counts = (part[:, 2:3] <= position) & (position < part[:, 3:])
        yield tokens, targets.masked_fill(~torch.from_numpy(counts), -1)
