"""NorMuon (arXiv 2510.05491), exact on one process, under DDP and under FSDP2. Imports torch alone.

One step, for one matrix W of m rows (output neurons) and n columns, with gradient G:

    M <- momentum M + (1 - momentum) G
    X  = momentum M + (1 - momentum) G       Nesterov momentum; without it X = M
    O  = newton_schulz(X)                    all singular values pushed towards 1: Muon's update
    v <- beta2 v + (1 - beta2) mean(O^2)     one value per neuron, the mean over its weights
    U  = O / sqrt(v)                         every neuron moves at the same rate ...
    W <- (1 - lr weight_decay) W - lr s U    ... and s restores the norm that O had

Only newton_schulz needs whole matrices: M, v and W are updated row by row, and s needs two sums of
squares per matrix. So the step is independent of the layout, which gathers and returns whole
matrices (`to_whole`, `to_parts`) and sums over the ranks that share a matrix (`total`). K counts
the stacked matrices of one shape.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise, zip_longest

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor, Replicate, Shard

# torch 2.13 renamed it
all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
# AMX is bound by memory, so fewer multiplications do not pay (docs/log.md)
AMX = getattr(torch.cpu, "_is_amx_tile_supported", bool)()
Arriving = Callable[[], Tensor]  # waits for a transfer and returns the matrices
CHOICES = {
    "neuron_axis": ("rows", "longest", "columns"),
    "adjust_lr_fn": ("original", "match_rms_adamw"),
}

MUON = ((3.4445, -4.7750, 2.0315),) * 5  # Keller Jordan's
# arXiv 2505.16932: each triple is optimal after the one before. The paper divides X by 1.02 times
# its norm; the first triple includes this factor.
POLAR_EXPRESS = (
    (8.156554524902461 / 1.02, -22.48329292557795 / 1.02**3, 15.878769915207462 / 1.02**5),
    (4.042929935166739, -2.808917465908714, 0.5000178451051316),
    (3.8916678022926607, -2.772484153217685, 0.5060648178503393),
    (3.285753657755655, -2.3681294933425376, 0.46449024233003106),
    (2.3465413258596377, -1.7097828382687081, 0.42323551169305323),
)
COEFFICIENTS = {"muon": MUON, "polar_express": POLAR_EXPRESS}


def coefficients(setting: str | Sequence, steps: int) -> tuple[tuple[float, ...], ...]:
    """Return a triple (a, b, c) per Newton-Schulz iteration, repeating the last one given.

    setting: a key of COEFFICIENTS, the text "a, b, c", a triple, or a sequence of triples. Raises
    ValueError.
    """
    if isinstance(setting, str):
        given = COEFFICIENTS.get(setting) or [setting.split(",")]
    else:
        given = setting if isinstance(setting[0], Sequence) else [setting]
    try:
        triples = [(float(a), float(b), float(c)) for a, b, c in given]
    except ValueError:
        expected = f'{", ".join(COEFFICIENTS)} or three numbers: "a, b, c"'
        raise ValueError(f'ns_coefficients = "{setting}": expected {expected}') from None
    return (*triples, *[triples[-1]] * steps)[:steps]


# --------------------------------------------------------------- The maths, on stacks of K matrices


def newton_schulz(X: Tensor, triples: Sequence[Sequence[float]] = MUON) -> Tensor:
    """Approximate U V^T of the singular value decomposition of each matrix (K, m, n).

    One iteration per triple: X <- a X + (b A + c A^2) X with A = X X^T. Oblong matrices take two
    iterations at a time, mostly on the small A; for three, bfloat16 is too coarse. Runs in X's
    dtype. A matrix of zeros stays zero.
    """
    # torch sums in float32 anyway; dtype=torch.float32 would copy X on a CPU
    X = X / (torch.linalg.vector_norm(X, dim=(-2, -1), keepdim=True) + 1e-7)
    if tall := X.size(-2) > X.size(-1):  # X X^T is then the smaller square
        X = X.mT
    left = list(triples)
    while left:
        A, (a, b, c) = symmetric(X, X), left.pop(0)
        P = symmetric(A, A, A, b, c)
        if X.size(-1) < 1.5 * X.size(-2) or len(left) % 2 == 0:
            X = torch.baddbmm(X, P, X, beta=a)
            continue
        A = symmetric(P, A, A, a)
        A = symmetric(P, A, A, a)  # X X^T of the next X, without computing that X
        P.diagonal(dim1=-2, dim2=-1).add_(a)
        a, b, c = left.pop(0)
        X = symmetric(symmetric(A, A, A, b, c), P, P, a) @ X
    return X.mT if tall else X


def symmetric(X: Tensor, Y: Tensor, C: Tensor | None = None, b: float = 0, c: float = 1) -> Tensor:
    """Compute b C + c X Y^T (K, m, m), where X Y^T is known to be symmetric."""
    m, fast = X.size(-2), X.device.type != "cpu" or (AMX and X.dtype == torch.bfloat16)
    if fast or m < 512:
        return X @ Y.mT if C is None else torch.baddbmm(C, X, Y.mT, beta=b, alpha=c)
    # four bands of rows, each from the diagonal on, mirrored below it: 5/8 of the work
    out = X.new_empty(len(X), m, m)
    for x, y, o, ground in zip(X, Y, out, C if b else out):
        for i, j in pairwise(m * band // 4 for band in range(5)):
            torch.addmm(ground[i:j, i:], x[i:j], y[i:].mT, beta=b, alpha=c, out=o[i:j, i:])
            o[j:, i:j] = o[i:j, j:].mT
    return out


def neuron_factors(
    O: Tensor,
    v: Tensor | None,
    beta2: float,
    adjust_lr_fn: str,
    shape: Sequence,
    total: Callable,
    transposed: bool = False,
) -> Tensor:
    """Update the second moment v in place and return the factors in s U = factors * O.

    O: (K, rows here, n). v and the factors: (K, rows here, 1) for one value per row, or (K, 1, n)
    for one per column; v = None is Muon, with one factor (K, 1, 1) per matrix. shape: (m, n) of the
    whole matrices. total: sums over the ranks that share them.
    """
    m, n = shape
    aspect = max(1, n / m if transposed else m / n)  # neurons over inputs
    if v is None:
        ratio = aspect if adjust_lr_fn == "original" else 0.04 * max(m, n)
        dtype = torch.promote_types(O.dtype, torch.float32)
        return O.new_full((len(O), 1, 1), math.sqrt(ratio), dtype=dtype)
    by_row = v.size(-1) == 1
    norms = torch.linalg.vector_norm(O, dim=-1 if by_row else -2, keepdim=True, dtype=v.dtype)
    squares = norms**2 if by_row else total(norms**2)  # a column is spread over ranks
    v.lerp_(squares / (n if by_row else m), 1 - beta2)
    inverse = (v.sqrt() + 1e-10).reciprocal()
    sums = torch.stack([squares, squares * inverse**2]).sum((-2, -1), keepdim=True)
    if by_row:
        sums = total(sums)
    O_norm, U_norm = sums.sqrt().clamp_min(1e-10)  # for a zero gradient; 1e-30 would overflow
    if adjust_lr_fn == "original":
        return inverse * (O_norm / U_norm * math.sqrt(aspect))
    return inverse * (0.2 * math.sqrt(m * n) / U_norm)


# ----------------------------------------------------------------------------------------- The step


@dataclass(eq=False)
class Bucket:
    """Matrices of one shape in a parameter group, updated together in three stages."""

    params: list[Tensor]
    group: int  # index into the optimizer's param_groups
    layout: "Layout"  # may be replaced between steps
    M: Tensor  # momentum (K, rows here, n)
    v: Tensor | None  # second moment, as neuron_factors takes it
    arriving: Arriving | None = None  # input of the next stage

    def send(self, group: dict, dtype: torch.dtype) -> None:
        """Update the momentum, and send Newton-Schulz's input to the ranks that iterate it."""
        grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in self.params]
        X = stack([local(G) for G in grads]).to(self.M.dtype)
        self.M.lerp_(X, 1 - group["momentum"])
        X = X.lerp_(self.M, group["momentum"]) if group["nesterov"] else self.M
        self.arriving = self.layout.to_whole(X.to(dtype))

    def orthogonalise(self, triples: Sequence[Sequence[float]]) -> None:
        """Iterate this rank's matrices, and send O to the ranks that hold the weights."""
        self.arriving = self.layout.to_parts(newton_schulz(self.arriving(), triples))

    def apply(self, group: dict) -> None:
        """Update the second moment and the weights."""
        O, self.arriving = self.arriving(), None
        lr, shape, total = group["lr"], self.params[0].shape[-2:], self.layout.total
        scale, columns = group["adjust_lr_fn"], group["neuron_axis"] == "columns"
        factors = neuron_factors(O, self.v, group["beta2"], scale, shape, total, columns)
        W, decay = [local(p) for p in self.params], 1 - lr * group["weight_decay"]
        if group["cautious"]:
            decay = unstack(torch.where(stack(W).mul_(O) > 0, decay, 1), W)
        # W's dtype and strides, which O may lack, let a GPU update all matrices at once
        U = torch.empty_like(self.M, dtype=factors.dtype)
        torch.mul(O, factors * lr, out=U)
        torch._foreach_mul_(W, decay)
        torch._foreach_sub_(W, unstack(U, W))


class NorMuon(torch.optim.Optimizer):
    """Optimizes hidden weight matrices; embeddings, heads, norms and biases belong to AdamW.

    params: matrices, or 3-D stacks of matrices (experts, or a view of a fused QKV); plain tensors
        or FSDP2's DTensors. In a process group, plain tensors count as replicas whose gradients are
        already averaged, as by DDP.
    lr, weight_decay: W <- (1 - lr weight_decay) W - lr update.
    momentum, nesterov, beta2: see the top of this file; beta2 = None: Muon, no second moment.
    neuron_axis: "rows" (the paper); "longest": rows where m >= n, else columns (modded-nanogpt);
        "columns": for weights stored (inputs, outputs), updates the transpose.
    adjust_lr_fn: "original" scales the update by sqrt(max(1, m / n)) (Keller Jordan, lr about
        0.02); "match_rms_adamw" scales its root mean square to 0.2, so that AdamW's lr fits (the
        paper). Both names, and Muon's scales, are torch.optim.Muon's.
    ns_coefficients, ns_steps: see `coefficients`. ns_dtype: of Newton-Schulz and its transfers.
    cautious: decay only weights that the update moves towards zero (arXiv 2510.12402).

    lr, weight_decay, momentum and beta2 may be 0-d tensors on the parameters' device, so that a
    schedule does not recompile a compiled step. A missing gradient counts as zero, since knowing
    whether another rank has one would take communication; to freeze a matrix, leave it out. State
    exists from construction on, shaped and sharded like its parameter: `momentum` in the
    parameter's dtype (use float32: a bfloat16 average loses small gradients) and `second_moment`,
    one value per neuron, in at least float32.

    Raises ValueError for settings, parameters or placements that it cannot handle exactly.
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
        ns_coefficients: str | Sequence = MUON,
        ns_steps: int = 5,
        ns_dtype: torch.dtype = torch.bfloat16,
        cautious: bool = False,
    ):
        self.ns_coefficients = coefficients(ns_coefficients, ns_steps)
        self.ns_dtype, self.buckets = ns_dtype, []
        defaults = dict(lr=lr, weight_decay=weight_decay, momentum=momentum, beta2=beta2)  # noqa: C408
        defaults |= dict(nesterov=nesterov, neuron_axis=neuron_axis, cautious=cautious)  # noqa: C408
        super().__init__(params, defaults | {"adjust_lr_fn": adjust_lr_fn})

    def add_param_group(self, param_group: dict) -> None:
        super().add_param_group(param_group)
        group, alike = self.param_groups[-1], {}
        for key in ("momentum", "beta2"):
            if not 0 <= (group[key] or 0) < 1:
                raise ValueError(f"{key} = {group[key]}: expected at least 0, below 1")
        for key, choices in CHOICES.items():
            if group[key] not in choices:
                raise ValueError(f"{key} = {group[key]}: expected {' or '.join(choices)}")
        for p in group["params"]:
            if p.ndim not in (2, 3) or min(p.shape[-2:]) < 2:
                expected = "a matrix of at least 2 x 2, or a stack of them; give others to AdamW"
                raise ValueError(f"a parameter of shape {tuple(p.shape)}: expected {expected}")
            where = (p.device_mesh, p.placements) if isinstance(p, DTensor) else None
            alike.setdefault((p.shape, p.dtype, p.device, where), []).append(p)
        for params in alike.values():
            self._add_bucket(group, params)

    def _add_bucket(self, group: dict, params: list[Tensor]) -> None:
        """Create the state of equal matrices: stacks, with views of them in `self.state`."""
        W, (m, n) = [local(p) for p in params], params[0].shape[-2:]
        M, v = torch.zeros_like(stack(W)), None
        buffers = [("momentum", M, (m, n))]
        if group["beta2"] is not None:
            by_row = {"rows": True, "longest": m >= n, "columns": False}[group["neuron_axis"]]
            shape = (len(M), M.size(1), 1) if by_row else (len(M), 1, n)
            v = M.new_zeros(shape, dtype=torch.promote_types(M.dtype, torch.float32))
            buffers.append(("second_moment", v, (m, 1) if by_row else (1, n)))
        for key, buffer, shape in buffers:
            for p, part in zip(params, unstack(buffer, W)):
                self.state[p][key] = wrap_local(part, p, (*p.shape[:-2], *shape))
        layout = layout_of(params[0], len(M))
        self.buckets.append(Bucket(params, len(self.param_groups) - 1, layout, M, v))

    @torch.no_grad()
    def step(self, closure: Callable | None = None):
        """Update every parameter, overlapping a bucket's transfers with other buckets' work."""
        loss = torch.enable_grad()(closure)() if closure else None
        groups, todo = self.param_groups, self.buckets
        for sending, computing, finishing in zip_longest(todo, [None, *todo], [None, None, *todo]):
            if sending:
                sending.send(groups[sending.group], self.ns_dtype)
            if finishing:
                finishing.apply(groups[finishing.group])
            if computing:
                computing.orthogonalise(self.ns_coefficients)
        return loss

    def load_state_dict(self, state_dict: dict) -> None:
        kept, saved = self.state, state_dict["state"]
        ids = [i for group in state_dict["param_groups"] for i in group["params"]]
        params = [p for group in self.param_groups for p in group["params"]]
        for i, p in zip(ids, params):
            if missing := kept[p].keys() - saved.get(i, {}).keys():
                raise ValueError(f"state_dict: no {missing} of parameter {i}, shape {[*p.shape]}")
        super().load_state_dict(state_dict | {"state": {}})
        self.state = kept  # its buffers stay views of the stacks, in their own dtype
        for i, p in zip(ids, params):
            for key, buffer in kept[p].items():
                buffer.copy_(saved[i][key])


def local(p: Tensor) -> Tensor:
    """Return the part of a tensor that this rank holds."""
    return p.to_local() if isinstance(p, DTensor) else p


def wrap_local(part: Tensor, p: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Invert `local`: make a tensor of the given whole shape from this rank's `part`, placed like
    the parameter p. Values per column are replicated on the ranks that share them."""
    if not isinstance(p, DTensor):
        return part
    places = [Replicate() if shape[-2] == 1 and a.is_shard(p.ndim - 2) else a for a in p.placements]
    stride = torch.empty(shape, device="meta").stride()
    return DTensor.from_local(part, p.device_mesh, places, shape=torch.Size(shape), stride=stride)


def stack(parts: list[Tensor]) -> Tensor:
    """Stack equal matrices, or equal stacks of them, to (K, m, n)."""
    return torch.stack(parts).flatten(0, -3)


def unstack(stacked: Tensor, like: list[Tensor]) -> Sequence[Tensor]:
    """Invert `stack`: return views of a stack, one for each tensor in `like`."""
    return stacked.unflatten(0, (len(like), *like[0].shape[:-2])).unbind()


# --------- The layouts: how to gather whole matrices, and how to sum over the ranks that share them


class Layout:
    """How K equal matrices are distributed. All ranks make these calls in one order. The base class
    has whole matrices on every rank, which iterates all of them."""

    def to_whole(self, X: Tensor) -> Arriving:
        """Turn (K, rows here, n) into the whole matrices that this rank iterates (K here, m, n)."""
        return lambda: X

    def to_parts(self, O: Tensor) -> Arriving:
        """Turn iterated matrices (K here, m, n) back into (K, rows here, n)."""
        return lambda: O

    def total(self, x: Tensor) -> Tensor:
        """Sum x over the ranks that share each matrix, perhaps in place."""
        return x


class OneProcess(Layout):
    """Whole matrices, all of them iterated by this process."""


class Replicated(Layout):
    """Every rank holds all K matrices (DDP) and iterates its share, followed by an all-gather."""

    def __init__(self, K: int, group: dist.ProcessGroup | None):
        self.K, self.group, ranks = K, group, dist.get_world_size(group)
        self.share = -(-K // ranks)  # the last ranks may have fewer or none
        self.padded, self.start = self.share * ranks, self.share * dist.get_rank(group)

    def to_whole(self, X: Tensor) -> Arriving:
        return lambda: X[self.start : self.start + self.share]

    def to_parts(self, O: Tensor) -> Arriving:
        joined, sent = O.new_empty(self.padded, *O.shape[1:]), O.new_zeros(self.share, *O.shape[1:])
        sent[: len(O)] = O
        work = all_gather(joined, sent, self.group, async_op=True)

        def arrive(sent: Tensor = sent) -> Tensor:  # sent must live until the collective ends
            work.wait()
            return joined[: self.K]

        return arrive


class RowSharded(Layout):
    """Every rank holds some rows, perhaps none, of each of the K matrices (FSDP2): an all-to-all
    gives each rank whole matrices, and another one returns the rows."""

    def __init__(self, K: int, m: int, group: dist.ProcessGroup):
        self.group, self.rank, ranks = group, dist.get_rank(group), dist.get_world_size(group)
        self.rows = chunk_sizes(m, ranks)  # of each matrix, per rank, as FSDP2 shards
        self.owned = chunk_sizes(K, ranks)  # matrices iterated per rank

    def to_whole(self, X: Tensor) -> Arriving:
        shapes = [(self.owned[self.rank], rows, X.size(2)) for rows in self.rows]
        return self.exchange(X.split(self.owned), shapes, dim=1)

    def to_parts(self, O: Tensor) -> Arriving:
        shapes = [(owned, self.rows[self.rank], O.size(2)) for owned in self.owned]
        return self.exchange(O.split(self.rows, dim=1), shapes, dim=0)

    def exchange(self, parts: Sequence[Tensor], shapes: list, dim: int) -> Arriving:
        """Send parts[r] to rank r, receive shapes[r] from it, and join these along `dim`."""
        sent = torch.cat([part.flatten() for part in parts])
        lengths, sizes = [part.numel() for part in parts], [math.prod(shape) for shape in shapes]
        received = sent.new_empty(sum(sizes))
        work = dist.all_to_all_single(received, sent, sizes, lengths, self.group, async_op=True)

        def arrive(sent: Tensor = sent) -> Tensor:  # sent must live until the collective ends
            work.wait()
            pieces = zip(received.split(sizes), shapes)
            return torch.cat([piece.view(shape) for piece, shape in pieces], dim)

        return arrive

    def total(self, x: Tensor) -> Tensor:
        dist.all_reduce(x, group=self.group)
        return x


def chunk_sizes(total: int, parts: int) -> list[int]:
    """Return the sizes of torch.chunk's pieces, with zeros for missing ones."""
    size = -(-total // parts)
    return [max(0, min(size, total - size * i)) for i in range(parts)]


def layout_of(p: Tensor, K: int) -> Layout:
    """Return the layout of K matrices placed like the parameter p."""
    if not isinstance(p, DTensor):
        several = dist.is_initialized() and dist.get_world_size() > 1
        return Replicated(K, None) if several else OneProcess()
    mesh, places = p.device_mesh, p.placements
    shards = [(i, a) for i, a in enumerate(places) if not a.is_replicate() and mesh.size(i) > 1]
    if not shards:  # replicated over several mesh dimensions: every rank does all the work
        return Replicated(K, mesh.get_group()) if mesh.ndim == 1 < mesh.size() else OneProcess()
    i, a = shards[0]
    whole_matrices = p.ndim == 3 and a.is_shard(0)
    if len(shards) > 1 or type(a) is not Shard or not (whole_matrices or a.dim == p.ndim - 2):
        raise ValueError(
            f"NorMuon cannot update a parameter of shape {tuple(p.shape)} placed as {places}: "
            "expected replicas, or row-wise shards over one dimension of the mesh (as FSDP2's)"
        )
    # a stack sharded into whole matrices needs no exchange
    return OneProcess() if whole_matrices else RowSharded(K, p.size(-2), mesh.get_group(i))
