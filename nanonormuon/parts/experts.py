"""A mixture of experts instead of an MLP: each token visits a few of many SwiGLUs.

A router sends each token to the experts with the highest scores and weights their outputs by the
scores: a softmax of its logits (Qwen3-MoE) or sigmoids (DeepSeek-V3, arXiv 2412.19437). No token is
dropped. Two rules balance the load. The bias rule (arXiv 2408.15664) adds a bias to the scores when
choosing experts, not when weighting outputs, and after every step moves it against the load, whose
token counts over the whole batch are independent of ranks and micro-batches. The auxiliary loss is
Switch's (arXiv 2101.03961), averaged over sequences (DeepSeek-V3): per micro-batch, it would depend
on the micro-batch's size.

Shapes: B sequences, T tokens, C = n_embd, E experts of which k are used, V = B T k visits.
"""

from dataclasses import replace
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from nanonormuon.model import MLP
from nanonormuon.parts.config import GPTConfig


class Routed(NamedTuple):
    """A router's statistics of one forward pass."""

    load: Tensor  # (E,) int64: tokens sent to each expert
    entropy: Tensor  # mean entropy of a token's normalised scores, in nats
    balance: Tensor  # auxiliary loss; 1 for an even load


@torch.library.custom_op("nanonormuon::grouped_mm", mutates_args=())
def grouped_mm(a: Tensor, b: Tensor, ends: Tensor) -> Tensor:
    """torch's grouped matmul, which runs in any dtype but can be traced only in bfloat16."""
    return F.grouped_mm(a, b, offs=ends)


@grouped_mm.register_fake
def _(a: Tensor, b: Tensor, ends: Tensor) -> Tensor:
    rows, columns = a.size(0), b.size(-1)
    return a.new_empty((rows, columns) if b.ndim == 3 else (len(ends), rows, columns))


class Grouped(torch.autograd.Function):
    """Multiplies each expert's matrix by its rows. Zeroes the gradient of an expert without rows,
    which some kernels leave uninitialised (pytorch issue 172439)."""

    @staticmethod
    def forward(ctx, x: Tensor, W: Tensor, ends: Tensor) -> Tensor:
        """Map x (V, n), W (E, m, n), ends (E,) to (V, m): x[ends[i - 1] : ends[i]] @ W[i].T."""
        ctx.save_for_backward(x, W, ends)
        return grouped_mm(x, W.mT, ends)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy: Tensor) -> tuple[Tensor, Tensor, None]:
        (x, W, ends), dy = ctx.saved_tensors, dy.contiguous()  # it may be expanded
        dW = grouped_mm(dy.mT, x, ends)
        idle = ends.diff(prepend=ends.new_zeros(1)) == 0
        return grouped_mm(dy, W, ends), dW.masked_fill_(idle[:, None, None], 0), None


class Router(nn.Module):
    """Chooses k experts for each token, in float32, as rounding scores would change the choice."""

    def __init__(self, config: GPTConfig):
        super().__init__()
        # not for NorMuon: rows are used unequally, and the logits' scale must be learnt
        self.parameter_roles = {"weight": "vector"}
        self.config = config
        self.weight = nn.Parameter(torch.zeros(config.n_expert, config.n_embd))
        biased = config.router == "sigmoid" or config.balance_rate
        bias = torch.zeros(config.n_expert) if biased else None
        self.register_buffer("e_score_correction_bias", bias)  # DeepSeek-V3's name

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Routed]:
        """Map x (B, T, C) to the chosen experts and their float32 weights, each (B, T, k)."""
        c, logits = self.config, F.linear(x.float(), self.weight.float())
        scores = logits.sigmoid() if c.router == "sigmoid" else logits.softmax(-1)
        chosen = self.ranked(scores.detach()).topk(c.n_expert_used).indices
        weights = scores.gather(-1, chosen)
        total = weights.sum(-1, keepdim=True) + 1e-20 if c.router_norm else 1
        return chosen, weights / total * c.router_scale, self.report(scores, chosen)

    def ranked(self, scores: Tensor) -> Tensor:
        """Add the bias to scores (B, T, E), with -inf outside the groups chosen: those in which the
        two best experts have the largest sum."""
        c, bias = self.config, self.e_score_correction_bias
        ranked = scores + (0 if bias is None else bias)
        if c.n_expert_group == 1:
            return ranked
        groups = ranked.unflatten(-1, (c.n_expert_group, -1))
        best = groups.topk(2).values.sum(-1).topk(c.n_group_used).indices
        out = torch.ones_like(groups[..., 0], dtype=torch.bool).scatter(-1, best, False)
        return groups.masked_fill(out[..., None], -torch.inf).flatten(-2)

    def report(self, scores: Tensor, chosen: Tensor) -> Routed:
        c, kept = self.config, scores if self.config.balance_loss else scores.detach()
        visited = torch.zeros_like(scores, dtype=torch.bool).scatter(-1, chosen, True)
        shares = kept / kept.sum(-1, keepdim=True)
        of_visits = visited.float().mean(1) / c.n_expert_used  # by sequence and expert
        balance = c.n_expert * (of_visits * shares.mean(1)).sum(-1).mean()
        entropy = torch.special.entr(shares.detach()).sum(-1)
        return Routed(visited.sum((0, 1)), entropy.mean(), balance)

    @torch.no_grad()
    def rebalance(self, load: Tensor) -> None:
        """Move the bias against a step's load (E,), the batch's tokens per expert."""
        if self.config.balance_rate:
            excess = load * len(load) - load.sum()  # an exact integer
            self.e_score_correction_bias -= self.config.balance_rate * excess.sign()


class Experts(nn.Module):
    """Replaces model.MLP. Returns Routed as a result, so that a recomputed forward pass
    (train.activation_checkpointing) counts once."""

    def __init__(self, c: GPTConfig):
        super().__init__()
        self.gate, self.experts = Router(c), Stacks(c.n_expert, c.n_embd, c.expert_hidden)
        width = c.n_expert_shared * c.expert_hidden
        self.shared_experts = MLP(replace(c, n_hidden=width)) if width else None

    def forward(self, x: Tensor) -> tuple[Tensor, Routed]:
        chosen, weights, routed = self.gate(x)
        k, ends = chosen.size(-1), routed.load.cumsum(0, dtype=torch.int32)
        order = chosen.flatten().argsort(stable=True)  # visits sorted by expert
        y = self.experts(x.flatten(0, 1).index_select(0, order // k), ends)
        y = y.index_select(0, order.argsort()).view(*chosen.shape, -1)
        y = (y * weights.to(y.dtype)[..., None]).sum(-2)
        return y if self.shared_experts is None else y + self.shared_experts(x), routed


class Stacks(nn.Module):
    """E SwiGLUs with stacked matrices."""

    def __init__(self, E: int, C: int, hidden: int):
        super().__init__()
        self.parameter_roles = dict.fromkeys(("gate_proj", "up_proj", "down_proj"), "matrix")
        self.gate_proj = nn.Parameter(torch.zeros(E, hidden, C))
        self.up_proj = nn.Parameter(torch.zeros(E, hidden, C))
        self.down_proj = nn.Parameter(torch.zeros(E, C, hidden))

    def forward(self, x: Tensor, ends: Tensor) -> Tensor:
        """Map x (V, C), sorted by expert, to (V, C)."""
        gate, up, down = (W.to(x.dtype) for W in (self.gate_proj, self.up_proj, self.down_proj))
        h = F.silu(Grouped.apply(x, gate, ends)) * Grouped.apply(x, up, ends)
        return Grouped.apply(h, down, ends)
