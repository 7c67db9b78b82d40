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

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor import zeros as distributed_zeros

# torch 2.13 renamed it
all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor

# -------------------------------------------------------------------------------------------------
# The maths, on stacks of K matrices of one shape

# each triple (a, b, c) is one iteration X <- a X + (b A + c A^2) X with A = X X^T
MUON = ((3.4445, -4.7750, 2.0315),) * 5  # Keller Jordan's, the same each time
POLAR_EXPRESS = (  # arXiv 2505.16932: the best sequence for singular values below 1 / 1.02
    (8.156554524902461, -22.48329292557795, 15.878769915207462),
    (4.042929935166739, -2.808917465908714, 0.5000178451051316),
    (3.8916678022926607, -2.772484153217685, 0.5060648178503393),
    (3.285753657755655, -2.3681294933425376, 0.46449024233003106),
    (2.3465413258596377, -1.7097828382687081, 0.42323551169305323),
)


def newton_schulz(X: Tensor, coefficients: Sequence[tuple[float, float, float]] = MUON) -> Tensor:
    """(K, m, n) -> (K, m, n): U V^T of each matrix's singular value decomposition, approximately.

    Runs in X's dtype. A matrix of zeros stays zero. One call serves the whole stack.
    """
    safety = 1.02 if tuple(coefficients[:1]) == POLAR_EXPRESS[:1] else 1.0
    norm = torch.linalg.vector_norm(X, dim=(-2, -1), keepdim=True, dtype=wide(X.dtype))
    X = X / (norm * safety + 1e-7).to(X.dtype)
    if tall := X.size(-2) > X.size(-1):  # X X^T is then the smaller square
        X = X.mT
    for a, b, c in coefficients:
        A = X @ X.mT
        A = torch.baddbmm(A, A, A, beta=b, alpha=c)
        X = torch.baddbmm(X, A, X, beta=a)
    return X.mT if tall else X


def wide(dtype: torch.dtype) -> torch.dtype:
    """What sums over a matrix are kept in: float32 at least."""
    return torch.promote_types(dtype, torch.float32)


def neuron_factors(
    O: Tensor, v: Tensor, beta2: float, adjust_lr_fn: str, shape: tuple[int, int], total: Callable
) -> Tensor:
    """The second moment's step and what it makes of the update: s U = factors * O.

    O (K, rows here, n). v (K, rows here, 1) with one number per row, or (K, 1, n) with one per
    column, is moved in place. shape = (m, n) of the whole matrices; `total` sums over the ranks
    that share them. Returns v's shape. U is never formed: its norm follows from the neurons' own
    norms.
    """
    m, n = shape
    by_row = v.size(-1) == 1
    dim = -1 if by_row else -2
    squares = torch.linalg.vector_norm(O, dim=dim, keepdim=True, dtype=v.dtype).square()
    if not by_row:
        squares = total(squares)  # a column's weights lie on all the ranks
    v.lerp_(squares / (n if by_row else m), 1 - beta2)
    inverse = 1 / (v.sqrt() + 1e-10)
    norms = torch.stack([squares, squares * inverse.square()]).sum((-2, -1), keepdim=True)
    if by_row:
        norms = total(norms)  # exact on any number of ranks: the norm is the whole matrix's
    O_norm, U_norm = norms.sqrt().clamp_min(1e-30)  # a zero gradient gives a zero update
    if adjust_lr_fn == "original":
        return inverse * (O_norm / U_norm * math.sqrt(max(1, m / n)))
    return inverse * (0.2 * math.sqrt(m * n) / U_norm)


# ------------------------------------------------------------------------------------------------
# The step


class NorMuon(torch.optim.Optimizer):
    """For hidden weight matrices; embeddings, heads, norms and biases belong to AdamW.

    params: 2-D parameters, or 3-D ones that are stacks of matrices (as experts are stored); plain
        tensors or FSDP2's DTensors. Under an initialised process group of several ranks plain
        tensors are taken as replicated, with gradients already averaged (as DDP leaves them).
    lr, weight_decay: W <- (1 - lr weight_decay) W - lr update.
    momentum, nesterov: as above. beta2: None leaves the neurons' step sizes out, which is Muon.
    neuron_axis: "rows" (the paper), or "longest": rows where m >= n, else columns (modded-nanogpt).
    adjust_lr_fn: "original" scales the update by sqrt(max(1, m / n)) (Keller Jordan, lr about
        0.02); "match_rms_adamw" gives it the root mean square 0.2, so that AdamW's lr carries over
        (the paper). Both names, and Muon's scales, are torch.optim.Muon's.
    ns_coefficients, ns_steps: a triple for every step, or a sequence of triples, the last of which
        is repeated. ns_dtype: of Newton-Schulz, and of what is sent for it.
    cautious: decay only weights that the update moves towards zero (arXiv 2510.12402).

    A parameter without a gradient counts as one with gradient zero, on every layout: whether
    another rank has one cannot be known without asking. To freeze a matrix, leave it out.
    State per parameter, from construction on, shaped and sharded like it: `momentum`, in its dtype
    (averaging in bfloat16 would lose the small gradients, so there is no option for it), and
    `second_moment`, one number per neuron, in float32 at least. A fused QKV should be split, or
    viewed as a 3-D stack: orthogonalised as one matrix it is another optimizer.

    Raises ValueError for parameters and placements it cannot update exactly.
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
        if neuron_axis not in ("rows", "longest"):
            raise ValueError(f'neuron_axis = "{neuron_axis}": expected rows or longest')
        if adjust_lr_fn not in ("original", "match_rms_adamw"):
            raise ValueError(f'adjust_lr_fn = "{adjust_lr_fn}": not original or match_rms_adamw')
        if not 0 <= momentum < 1 or not 0 <= (beta2 or 0) < 1 or ns_steps < 1:
            raise ValueError(
                f"momentum = {momentum}, beta2 = {beta2}, ns_steps = {ns_steps}: "
                "expected momentum and beta2 in [0, 1), ns_steps at least 1"
            )
        triples = ns_coefficients if isinstance(ns_coefficients[0], Sequence) else [ns_coefficients]
        self.ns_coefficients = (*triples, *[triples[-1]] * ns_steps)[:ns_steps]
        self.ns_dtype = ns_dtype
        defaults = dict(lr=lr, weight_decay=weight_decay, momentum=momentum, beta2=beta2)  # noqa: C408
        defaults |= dict(nesterov=nesterov, neuron_axis=neuron_axis, cautious=cautious)  # noqa: C408
        super().__init__(params, defaults | {"adjust_lr_fn": adjust_lr_fn})

    def add_param_group(self, param_group: dict) -> None:
        super().add_param_group(param_group)
        for p in self.param_groups[-1]["params"]:
            if p.ndim not in (2, 3) or min(p.shape[-2:]) < 2:
                raise ValueError(
                    f"NorMuon got a parameter of shape {tuple(p.shape)}: expected matrices of at "
                    "least 2 x 2, or a stack of them; give anything else to AdamW"
                )
            self._make_state(p, self.param_groups[-1])
        self.buckets = [
            (index, params, make_layout(params))
            for index, group in enumerate(self.param_groups)
            for params in alike(group["params"])
        ]

    def _make_state(self, p: Tensor, group: dict) -> None:
        self.state[p]["momentum"] = torch.zeros_like(p)
        if group["beta2"] is None:
            return
        shape, dtype = list(p.shape), wide(p.dtype)
        by_row = group["neuron_axis"] == "rows" or shape[-2] >= shape[-1]
        shape[-1 if by_row else -2] = 1
        if isinstance(p, DTensor):  # a column's number belongs to all ranks that hold its weights
            rows = p.ndim - 2
            places = [Replicate() if a.is_shard(rows) and not by_row else a for a in p.placements]
            v = distributed_zeros(shape, dtype=dtype, device_mesh=p.device_mesh, placements=places)
        else:
            v = p.new_zeros(shape, dtype=dtype)
        self.state[p]["second_moment"] = v

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

    def load_state_dict(self, state_dict: dict) -> None:
        super().load_state_dict(state_dict)
        saved = [i for group in state_dict["param_groups"] for i in group["params"]]
        params = [p for group in self.param_groups for p in group["params"]]
        for i, p in zip(saved, params):  # torch has cast it to the parameter's dtype
            if "second_moment" in state_dict["state"].get(i, {}):
                exact = state_dict["state"][i]["second_moment"]
                self.state[p]["second_moment"] = exact.to(p.device, wide(p.dtype), copy=True)

    def _update(self, index: int, params: list[Tensor], layout: "Alone") -> Iterator[None]:
        """One bucket's step; it pauses where its matrices are on their way."""
        group, (m, n) = self.param_groups[index], params[0].shape[-2:]
        lr, momentum = group["lr"], group["momentum"]
        W = [local(p) for p in params]
        M = [local(self.state[p]["momentum"]) for p in params]
        G = [torch.zeros_like(w) if p.grad is None else local(p.grad) for p, w in zip(params, W)]
        G = [g.to(mom.dtype) for g, mom in zip(G, M)]
        torch._foreach_lerp_(M, G, 1 - momentum)
        X = torch._foreach_lerp(G, M, momentum) if group["nesterov"] else M
        whole = layout.whole(stack(X).to(self.ns_dtype))
        yield
        back = layout.back(newton_schulz(whole(), self.ns_coefficients))
        yield
        O = back()
        if group["beta2"] is None:  # Muon
            ratio = max(1, m / n) if group["adjust_lr_fn"] == "original" else 0.04 * max(m, n)
            factors = O.new_full((len(O), 1, 1), math.sqrt(ratio), dtype=torch.float32)
        else:
            second_moments = [local(self.state[p]["second_moment"]) for p in params]
            v = stack(second_moments)
            factors = neuron_factors(
                O, v, group["beta2"], group["adjust_lr_fn"], (m, n), layout.total
            )
            torch._foreach_copy_(second_moments, unstack(v, second_moments))
        decay, O = lr * group["weight_decay"], unstack(O, W)
        if group["cautious"]:
            shrink = [1 - decay * (w * o > 0) for w, o in zip(W, O)]
            torch._foreach_mul_(W, shrink)
        else:
            torch._foreach_mul_(W, 1 - decay)
        torch._foreach_addcmul_(W, O, unstack(factors * lr, W), value=-1)


def local(p: Tensor) -> Tensor:
    """The part of a tensor that this rank holds."""
    return p.to_local() if isinstance(p, DTensor) else p


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
        self.K, self.group = K, group
        self.share = -(-K // dist.get_world_size(group))  # the last ranks may have less, or nothing
        self.start = self.share * dist.get_rank(group)

    def whole(self, X: Tensor) -> Callable[[], Tensor]:
        return lambda: X[self.start : self.start + self.share]

    def back(self, O: Tensor) -> Callable[[], Tensor]:
        padded = O.new_zeros(self.share, *O.shape[1:])
        padded[: len(O)] = O
        joined = O.new_empty(self.share * dist.get_world_size(self.group), *O.shape[1:])
        work = all_gather(as_bytes(joined), as_bytes(padded), self.group, async_op=True)

        def wait(_until_then=padded) -> Tensor:  # holds on to what is being sent
            work.wait()
            return joined[: self.K]

        return wait


class RowSharded(Alone):
    """Every rank holds some rows of each of the K matrices (FSDP2): an all-to-all deals out whole
    matrices, another returns their rows. Any number of rows per rank, also none."""

    def __init__(self, K: int, m: int, rows_here: int, group: dist.ProcessGroup):
        self.group, self.rank, ranks = group, dist.get_rank(group), dist.get_world_size(group)
        self.rows = chunk_sizes(m, ranks)  # of each matrix, per rank: torch's own rule for shards
        self.owned = chunk_sizes(K, ranks)  # matrices iterated per rank
        if self.rows[self.rank] != rows_here:
            raise ValueError(
                f"NorMuon: rank {self.rank} holds {rows_here} of {m} rows, expected "
                f"{self.rows[self.rank]} (shards as torch.chunk cuts them)"
            )

    def whole(self, X: Tensor) -> Callable[[], Tensor]:
        n, mine = X.size(-1), self.owned[self.rank]
        shapes = [(mine, rows, n) for rows in self.rows]
        wait = all_to_all([*X.split(self.owned)], shapes, self.group)
        return lambda: torch.cat(wait(), dim=1)

    def back(self, O: Tensor) -> Callable[[], Tensor]:
        shapes = [(owned, self.rows[self.rank], O.size(-1)) for owned in self.owned]
        wait = all_to_all([*O.split(self.rows, dim=1)], shapes, self.group)
        return lambda: torch.cat(wait())

    def total(self, x: Tensor) -> Tensor:
        dist.all_reduce(x, group=self.group)
        return x


def all_to_all(
    parts: list[Tensor], shapes: list[tuple[int, ...]], group: dist.ProcessGroup
) -> Callable[[], list[Tensor]]:
    """Send parts[r] to rank r; the function returned waits for shapes[r] from each rank r."""
    sent = torch.cat([part.flatten() for part in parts])
    received = sent.new_empty(sum(map(math.prod, shapes)))
    size, sizes = sent.element_size(), [math.prod(shape) for shape in shapes]
    work = dist.all_to_all_single(
        as_bytes(received),
        as_bytes(sent),
        [size * s for s in sizes],
        [size * part.numel() for part in parts],
        group,
        async_op=True,
    )

    def wait(_until_then=sent) -> list[Tensor]:  # holds on to what is being sent
        work.wait()
        return [part.view(shape) for part, shape in zip(received.split(sizes), shapes)]

    return wait


def as_bytes(t: Tensor) -> Tensor:
    """For collectives that only move data: every backend moves bytes, not all move bfloat16."""
    return t.view(-1).view(torch.uint8)


def chunk_sizes(total: int, parts: int) -> list[int]:
    """Sizes of torch.chunk's pieces, with zeros for the pieces that it leaves out."""
    size = -(-total // parts)
    return [max(0, min(size, total - size * i)) for i in range(parts)]


def alike(params: list[Tensor]) -> list[list[Tensor]]:
    """The parameters divided into lists of equal shape, dtype, device and placement."""
    buckets: dict[tuple, list[Tensor]] = {}
    for p in params:
        where = (p.device_mesh, p.placements) if isinstance(p, DTensor) else None
        buckets.setdefault((p.shape, p.dtype, p.device, where), []).append(p)
    return list(buckets.values())


def make_layout(params: list[Tensor]) -> Alone:
    """The layout of a bucket, read off its first parameter."""
    p = params[0]
    K, m = sum(len(q) if q.ndim == 3 else 1 for q in params), p.size(-2)
    if not isinstance(p, DTensor):
        several = dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
        return Replicated(K, None) if several else Alone()
    mesh, placements = p.device_mesh, p.placements
    shards = [(i, a) for i, a in enumerate(placements) if not a.is_replicate() and mesh.size(i) > 1]
    if not shards and mesh.ndim == 1 and mesh.size() > 1:
        return Replicated(K, mesh.get_group())
    if not shards:  # replicated over several dimensions: every rank does all of the work
        return Alone()
    (i, a), whole_matrices = shards[0], p.ndim == 3 and shards[0][1].is_shard(0)
    if len(shards) > 1 or type(a) is not Shard or not (whole_matrices or a.dim == p.ndim - 2):
        raise ValueError(
            f"NorMuon cannot update a parameter of shape {tuple(p.shape)} placed as {placements}: "
            "expected replicas, or shards along the rows on one dimension of the mesh (as FSDP2's)"
        )
    # a stack sharded between its matrices needs no exchange
    return Alone() if whole_matrices else RowSharded(K, m, local(p).size(-2), mesh.get_group(i))
