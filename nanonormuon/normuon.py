"""NorMuon (arXiv 2510.05491), exact on one process, under DDP and under FSDP2. Imports torch alone.

One step, for one matrix W of m rows (output neurons) and n columns, with gradient G:

    M <- momentum M + (1 - momentum) G
    X  = momentum M + (1 - momentum) G       Nesterov's look ahead; without it X = M
    O  = newton_schulz(X)                    all singular values pushed towards 1: Muon's update
    v <- beta2 v + (1 - beta2) mean(O^2)     one number per neuron, the mean over its weights
    U  = O / sqrt(v)                         every neuron moves at the same rate ...
    W <- (1 - lr weight_decay) W - lr s U    ... and s gives U back the length that O had

Only newton_schulz needs whole matrices. M, v and W keep to their rows, and s takes two sums of
squares per matrix. So one step serves every layout; a layout answers two questions: how do whole
matrices come together (`whole`, `back`), and how is a number summed over the ranks that share a
matrix (`total`).
"""

import math
from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor, Replicate, Shard

# torch 2.13 renamed it
all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
MUON = ((3.4445, -4.7750, 2.0315),) * 5  # Keller Jordan's coefficients, the same each time
# tiles multiply faster than memory feeds them: fewer products would not pay (dev/LOG.md)
AMX = getattr(torch.cpu, "_is_amx_tile_supported", bool)()
AXES, SCALES = ("rows", "longest"), ("original", "match_rms_adamw")

# ------------------------------------------------------------------------------------------------
# The maths, on stacks of K matrices of one shape


def newton_schulz(X: Tensor, coefficients: Sequence[tuple[float, float, float]] = MUON) -> Tensor:
    """(K, m, n) -> (K, m, n): U V^T of each matrix's singular value decomposition, approximately.

    One iteration per triple: X <- a X + (b A + c A^2) X with A = X X^T. On oblong matrices two at
    a time, most of which is then work on the small A; more at a time would let bfloat16's rounding
    of A grow. Runs in X's dtype. A matrix of zeros stays zero.
    """
    # summed in float32, also for bfloat16; asked for that, torch would make a copy on a CPU
    X = X / (torch.linalg.vector_norm(X, dim=(-2, -1), keepdim=True) + 1e-7)
    if tall := X.size(-2) > X.size(-1):  # X X^T is then the smaller square
        X = X.mT
    left = list(coefficients)
    while left:
        A, (a, b, c) = symmetric(X, X), left.pop(0)
        P = symmetric(A, A, A, b, c)
        if X.size(-1) < 1.5 * X.size(-2) or len(left) % 2 == 0:
            X = torch.baddbmm(X, P, X, beta=a)
            continue
        A = symmetric(P, A, A, a)
        A = symmetric(P, A, A, a)  # of the next X, without that X
        P.diagonal(dim1=-2, dim2=-1).add_(a)
        a, b, c = left.pop(0)
        X = symmetric(symmetric(A, A, A, b, c), P, P, a) @ X
    return X.mT if tall else X


def symmetric(X: Tensor, Y: Tensor, C: Tensor | None = None, b: float = 0, c: float = 1) -> Tensor:
    """b C + c X Y^T (K, m, m), of stacks for which it is known to be symmetric: (K, m, m)."""
    m, fast = X.size(-2), X.device.type != "cpu" or (AMX and X.dtype == torch.bfloat16)
    if fast or m < 512:
        return X @ Y.mT if C is None else torch.baddbmm(C, X, Y.mT, beta=b, alpha=c)
    # by bands of rows, each from its own columns on, the rest mirrored: 5/8 of the work
    out = X.new_empty(len(X), m, m)
    for x, y, o, ground in zip(X, Y, out, C if b else out):
        for i, j in pairwise(m * band // 4 for band in range(5)):
            torch.addmm(ground[i:j, i:], x[i:j], y[i:].mT, beta=b, alpha=c, out=o[i:j, i:])
            o[j:, i:j] = o[i:j, j:].mT
    return out


def wide(dtype: torch.dtype) -> torch.dtype:
    """What sums over a matrix are kept in: float32 at least."""
    return torch.promote_types(dtype, torch.float32)


def neuron_factors(
    O: Tensor, v: Tensor, beta2: float, adjust_lr_fn: str, shape: tuple[int, int], total: Callable
) -> Tensor:
    """The second moment's step and what it makes of the update: s U = factors * O.

    O (K, rows here, n). v (K, rows here, 1) with one number per row, or (K, 1, n) with one per
    column, is moved in place. shape = (m, n) of the whole matrices; `total` sums over the ranks
    that share them. Returns v's shape. U is never formed: its norm follows from the neurons' own.
    """
    (m, n), by_row = shape, v.size(-1) == 1
    squares = (
        torch.linalg.vector_norm(O, dim=-1 if by_row else -2, keepdim=True, dtype=v.dtype) ** 2
    )
    if not by_row:
        squares = total(squares)  # a column's weights lie on all the ranks
    v.lerp_(squares / (n if by_row else m), 1 - beta2)
    inverse = 1 / (v.sqrt() + 1e-10)
    norms = torch.stack([squares, squares * inverse**2]).sum((-2, -1), keepdim=True)
    if by_row:
        norms = total(norms)  # exact on any number of ranks: the norm is the whole matrix's
    O_norm, U_norm = norms.sqrt().clamp_min(1e-10)  # no gradient, no update; 1e-30 would overflow
    if adjust_lr_fn == "original":
        return inverse * (O_norm / U_norm * math.sqrt(max(1, m / n)))
    return inverse * (0.2 * math.sqrt(m * n) / U_norm)


# ------------------------------------------------------------------------------------------------
# The step


class NorMuon(torch.optim.Optimizer):
    """For hidden weight matrices; embeddings, heads, norms and biases belong to AdamW.

    params: 2-D parameters, or 3-D ones that are stacks of matrices (as experts are stored; view a
        fused QKV so); plain tensors or FSDP2's DTensors. Under a process group of several ranks
        plain tensors are taken as replicated, with gradients already averaged, as DDP leaves them.
    lr, weight_decay: W <- (1 - lr weight_decay) W - lr update.
    momentum, nesterov: as above. beta2: None leaves the neurons' step sizes out, which is Muon.
    neuron_axis: "rows" (the paper), or "longest": rows where m >= n, else columns (modded-nanogpt).
    adjust_lr_fn: "original" scales the update by sqrt(max(1, m / n)) (Keller Jordan, lr about
        0.02); "match_rms_adamw" gives it the root mean square 0.2, so that AdamW's lr carries over
        (the paper). Both names, and Muon's scales, are torch.optim.Muon's.
    ns_coefficients, ns_steps: a triple for every step, or a sequence of triples, the last of which
        is repeated. ns_dtype: of Newton-Schulz, and of what is sent for it.
    cautious: decay only weights that the update moves towards zero (arXiv 2510.12402).

    lr, weight_decay, momentum and beta2 may be 0-d tensors on the parameters' device, so that a
    schedule does not make a compiled step compile again. A parameter without a gradient counts as
    one with gradient zero, on every layout: whether another rank has one cannot be known without
    asking. To freeze a matrix, leave it out. State per parameter, from construction on, shaped and
    sharded like it: `momentum`, in its dtype (no option for bfloat16, in which an average loses
    small gradients), and `second_moment`, one number per neuron, in float32 at least.

    Raises ValueError for settings, parameters and placements it cannot update exactly.
    """

    def __init__(
        self,
        params,
        lr: float = 0.02,
        weight_decay: float = 0.1,
        momentum: float = 0.95,
        beta2: float | None = 0.95,
        *,
        nesterov: bool = True,
        neuron_axis: str = "rows",
        adjust_lr_fn: str = "original",
        ns_coefficients: Sequence = MUON,
        ns_steps: int = 5,
        ns_dtype: torch.dtype = torch.bfloat16,
        cautious: bool = False,
    ):
        triples = ns_coefficients if isinstance(ns_coefficients[0], Sequence) else [ns_coefficients]
        self.ns_coefficients = (*triples, *[triples[-1]] * ns_steps)[:ns_steps]
        self.ns_dtype, self.buckets = ns_dtype, []
        defaults = dict(lr=lr, weight_decay=weight_decay, momentum=momentum, beta2=beta2)  # noqa: C408
        defaults |= dict(nesterov=nesterov, neuron_axis=neuron_axis, cautious=cautious)  # noqa: C408
        super().__init__(params, defaults | {"adjust_lr_fn": adjust_lr_fn})

    def add_param_group(self, param_group: dict) -> None:
        super().add_param_group(param_group)
        group, alike = self.param_groups[-1], {}
        for key, good, expected in (
            ("momentum", 0 <= group["momentum"] < 1, "at least 0, below 1"),
            ("beta2", 0 <= (group["beta2"] or 0) < 1, "at least 0, below 1, or None"),
            ("neuron_axis", group["neuron_axis"] in AXES, " or ".join(AXES)),
            ("adjust_lr_fn", group["adjust_lr_fn"] in SCALES, " or ".join(SCALES)),
        ):
            if not good:
                raise ValueError(f"{key} = {group[key]}: expected {expected}")
        for p in group["params"]:
            if p.ndim not in (2, 3) or min(p.shape[-2:]) < 2:
                raise ValueError(
                    f"NorMuon got a parameter of shape {tuple(p.shape)}: expected matrices of at "
                    "least 2 x 2, or a stack of them; give anything else to AdamW"
                )
            where = (p.device_mesh, p.placements) if isinstance(p, DTensor) else None
            alike.setdefault((p.shape, p.dtype, p.device, where), []).append(p)
        for params in alike.values():
            self._add_bucket(group, params)

    def _add_bucket(self, group: dict, params: list[Tensor]) -> None:
        """State for equal matrices: views of one stack, as the step moves it."""
        W, (m, n) = [local(p) for p in params], params[0].shape[-2:]
        M, v = torch.zeros_like(stack(W)), None
        by_row = group["neuron_axis"] == "rows" or m >= n
        buffers = [("momentum", M, (m, n))]
        if group["beta2"] is not None:
            v = M.new_zeros(
                len(M), M.size(1) if by_row else 1, 1 if by_row else n, dtype=wide(M.dtype)
            )
            buffers.append(("second_moment", v, (m, 1) if by_row else (1, n)))
        for key, buffer, shape in buffers:
            for p, part in zip(params, unstack(buffer, W)):
                self.state[p][key] = placed_like(p, part, (*p.shape[:-2], *shape))
        self.buckets.append((len(self.param_groups) - 1, params, make_layout(params), M, v))

    @torch.no_grad()
    def step(self, closure: Callable | None = None):
        """One update of every parameter, in buckets of equal matrices."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        under_way: list[Iterator] = []
        for bucket in self.buckets:
            update = self._update(*bucket)
            next(update)  # sends its matrices off before the buckets ahead of it compute
            under_way = [u for u in under_way if next(u, "done") is None] + [update]
        while under_way:
            under_way = [u for u in under_way if next(u, "done") is None]
        return loss

    def _update(
        self, index: int, params: list[Tensor], layout: "Alone", M: Tensor, v: Tensor | None
    ) -> Iterator[None]:
        """One bucket's step; it pauses where its matrices are on their way."""
        group, (m, n) = self.param_groups[index], params[0].shape[-2:]
        lr, momentum = group["lr"], group["momentum"]
        W = [local(p) for p in params]
        X = torch.empty_like(M, dtype=self.ns_dtype)
        for p, w, mean, x in zip(params, W, unstack(M, W), unstack(X, W)):  # while in the cache
            G = torch.zeros_like(w) if p.grad is None else local(p.grad)
            mean.lerp_(G.to(M.dtype), 1 - momentum)
            x.copy_(G.to(M.dtype).lerp(mean, momentum) if group["nesterov"] else mean)
        whole = layout.whole(X)
        yield
        back = layout.back(newton_schulz(whole(), self.ns_coefficients))
        yield
        O = back()
        if v is None:  # Muon
            ratio = max(1, m / n) if group["adjust_lr_fn"] == "original" else 0.04 * max(m, n)
            factors = O.new_full((len(O), 1, 1), math.sqrt(ratio), dtype=wide(O.dtype))
        else:
            factors = neuron_factors(
                O, v, group["beta2"], group["adjust_lr_fn"], (m, n), layout.total
            )
        decay, O = 1 - lr * group["weight_decay"], unstack(O, W)
        if group["cautious"]:
            decay = [torch.where(w * o > 0, decay, 1) for w, o in zip(W, O)]
        torch._foreach_mul_(W, decay)
        torch._foreach_addcmul_(W, O, unstack(factors * lr, W), value=-1)

    def load_state_dict(self, state_dict: dict) -> None:
        buffers = {p: dict(state) for p, state in self.state.items()}
        saved = [i for group in state_dict["param_groups"] for i in group["params"]]
        params = [p for group in self.param_groups for p in group["params"]]
        for i, p in zip(saved, params):
            if missing := buffers[p].keys() - state_dict["state"].get(i, {}).keys():
                raise ValueError(
                    f"state_dict: no {missing} of parameter {i}, shape {tuple(p.shape)}"
                )
        super().load_state_dict(state_dict)
        for i, p in zip(saved, params):  # into the stacks, in their dtype
            for key, buffer in buffers[p].items():
                buffer.copy_(state_dict["state"][i][key])
            self.state[p] = buffers[p]


def local(p: Tensor) -> Tensor:
    """The part of a tensor that this rank holds."""
    return p.to_local() if isinstance(p, DTensor) else p


def placed_like(p: Tensor, part: Tensor, shape: tuple[int, ...]) -> Tensor:
    """This rank's part of a tensor of the given shape, placed as the parameter is. A column's
    number belongs to all ranks that hold its weights."""
    if not isinstance(p, DTensor):
        return part
    columns = shape[-2] == 1
    places = [Replicate() if columns and a.is_shard(p.ndim - 2) else a for a in p.placements]
    stride = torch.empty(shape, device="meta").stride()
    return DTensor.from_local(part, p.device_mesh, places, shape=torch.Size(shape), stride=stride)


def stack(tensors: list[Tensor]) -> Tensor:
    """Matrices and stacks of matrices of one shape -> (K, rows, columns), copied."""
    return torch.cat([t if t.ndim == 3 else t[None] for t in tensors])


def unstack(stacked: Tensor, like: list[Tensor]) -> list[Tensor]:
    """Views of the stack, one per tensor it was made of and with as many dimensions."""
    parts = stacked.split([len(t) if t.ndim == 3 else 1 for t in like])
    return [part if t.ndim == 3 else part[0] for part, t in zip(parts, like)]


# ------------------------------------------------------------------------------------------------
# The layouts: how whole matrices come together, and how a number is summed over their ranks


class Alone:
    """Whole matrices, and nobody to share the work with."""

    def whole(self, X: Tensor) -> Callable[[], Tensor]:
        """(K, rows here, n) -> a function that waits for the matrices this rank iterates."""
        return lambda: X

    def back(self, O: Tensor) -> Callable[[], Tensor]:
        """The iterated matrices -> a function that waits for (K, rows here, n)."""
        return lambda: O

    def total(self, x: Tensor) -> Tensor:
        """x summed over the ranks among which each matrix is divided."""
        return x


class Replicated(Alone):
    """Every rank holds all K matrices (DDP): each iterates a share, an all-gather joins them."""

    def __init__(self, K: int, group: dist.ProcessGroup | None):
        self.K, self.group, ranks = K, group, dist.get_world_size(group)
        self.share = -(-K // ranks)  # the last ranks may have less, or nothing
        self.padded, self.start = self.share * ranks, self.share * dist.get_rank(group)

    def whole(self, X: Tensor) -> Callable[[], Tensor]:
        return lambda: X[self.start : self.start + self.share]

    def back(self, O: Tensor) -> Callable[[], Tensor]:
        joined, sent = O.new_empty(self.padded, *O.shape[1:]), O.new_zeros(self.share, *O.shape[1:])
        sent[: len(O)] = O
        work = all_gather(as_bytes(joined), as_bytes(sent), self.group, async_op=True)
        return lambda _until_then=sent: work.wait() and joined[: self.K]


class RowSharded(Alone):
    """Every rank holds some rows of each of the K matrices (FSDP2): an all-to-all deals out whole
    matrices, another returns their rows. Any number of rows per rank, also none."""

    def __init__(self, K: int, m: int, group: dist.ProcessGroup):
        self.group, self.rank, ranks = group, dist.get_rank(group), dist.get_world_size(group)
        self.rows = chunk_sizes(m, ranks)  # of each matrix, per rank: torch's own rule for shards
        self.owned = chunk_sizes(K, ranks)  # matrices iterated per rank

    def whole(self, X: Tensor) -> Callable[[], Tensor]:
        shapes = [(self.owned[self.rank], rows, X.size(2)) for rows in self.rows]
        return self.exchange(X.split(self.owned), shapes, dim=1)

    def back(self, O: Tensor) -> Callable[[], Tensor]:
        shapes = [(owned, self.rows[self.rank], O.size(2)) for owned in self.owned]
        return self.exchange(O.split(self.rows, dim=1), shapes, dim=0)

    def exchange(self, parts: Sequence[Tensor], shapes: list, dim: int) -> Callable[[], Tensor]:
        """Send parts[r] to rank r, receive shapes[r] from it; the function joins what has come."""
        sent = as_bytes(torch.cat([part.flatten() for part in parts]))
        sizes = [parts[0].element_size() * math.prod(shape) for shape in shapes]
        received = sent.new_empty(sum(sizes))
        lengths = [part.element_size() * part.numel() for part in parts]
        work = dist.all_to_all_single(received, sent, sizes, lengths, self.group, async_op=True)

        def wait(_until_then=sent) -> Tensor:  # holds on to what is being sent
            work.wait()
            came = received.view(parts[0].dtype).split([math.prod(shape) for shape in shapes])
            return torch.cat([part.view(shape) for part, shape in zip(came, shapes)], dim)

        return wait

    def total(self, x: Tensor) -> Tensor:
        dist.all_reduce(x, group=self.group)
        return x


def as_bytes(t: Tensor) -> Tensor:
    """For collectives that only move data: every backend moves bytes, not all move bfloat16."""
    return t.view(-1).view(torch.uint8)


def chunk_sizes(total: int, parts: int) -> list[int]:
    """Sizes of torch.chunk's pieces, with zeros for the pieces that it leaves out."""
    size = -(-total // parts)
    return [max(0, min(size, total - size * i)) for i in range(parts)]


def make_layout(params: list[Tensor]) -> Alone:
    """The layout of a bucket, read off its first parameter."""
    p = params[0]
    K = sum(len(q) if q.ndim == 3 else 1 for q in params)
    if not isinstance(p, DTensor):
        several = dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
        return Replicated(K, None) if several else Alone()
    mesh, places = p.device_mesh, p.placements
    shards = [(i, a) for i, a in enumerate(places) if not a.is_replicate() and mesh.size(i) > 1]
    if not shards:  # replicated over several dimensions: every rank does all of the work
        return Replicated(K, mesh.get_group()) if mesh.ndim == 1 and mesh.size() > 1 else Alone()
    (i, a), whole_matrices = shards[0], p.ndim == 3 and shards[0][1].is_shard(0)
    if len(shards) > 1 or type(a) is not Shard or not (whole_matrices or a.dim == p.ndim - 2):
        raise ValueError(
            f"NorMuon cannot update a parameter of shape {tuple(p.shape)} placed as {places}: "
            "expected replicas, or shards along the rows on one dimension of the mesh (as FSDP2's)"
        )
    # a stack sharded between its matrices needs no exchange
    return Alone() if whole_matrices else RowSharded(K, p.size(-2), mesh.get_group(i))
