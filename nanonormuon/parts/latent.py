"""Latent attention: keys and values of all heads are products of one narrow latent per token, which
is all that generation keeps of it.

Multi-head latent attention (MLA) of DeepSeek-V2 (arXiv 2405.04434, section 2.1) as DeepSeek-V3 has
it (2412.19437), with the parameter names of its checkpoints. Of a query and a key, D channels per
head do not turn with the position, since their products with the up-projections have to commute;
R more do (RoPE), and the rotary key serves all heads. Two matrices are stacks in those checkpoints
and are trained as such: kv_a_proj_with_mqa (the latent's rows and the rotary key's), and kv_b_proj
(each head's key and value rows).

Shapes as in model.py, and: L = kv_rank, D = head_dim, R = rope_head_dim, V = v_head_dim.
"""

import torch
from torch import Tensor, nn

from nanonormuon.model import Cache, Linear, RMSNorm, attend, rotate
from nanonormuon.parts.config import GPTConfig

EPS = 1e-6  # of the latents' norms: in transformers' DeepSeek-V3 a constant


class LatentAttention(nn.Module):
    """Attention of H heads over a latent and a rotary key per token."""

    attend = staticmethod(attend)  # as in model.Attention

    def __init__(self, config: GPTConfig):
        super().__init__()
        C, H = config.n_embd, config.n_head
        L, D, R, V = config.kv_rank, config.head_dim, config.rope_head_dim, config.v_head_dim
        self.heads, self.latent, self.scale = H, L, config.attn_scale
        self.width, self.rotary, self.values = D, R, V
        self.interleave = config.rope_interleave
        self.cached = ((1, L + R),)  # what Cache holds of a token: tensors of (heads, width)
        self.products = H * (D + R + V)  # multiplications per query and key that it sees
        if config.q_rank:
            self.q_a_proj = Linear(C, config.q_rank, bias=False)
            self.q_a_layernorm = RMSNorm(config.q_rank, EPS)
            self.q_b_proj = Linear(config.q_rank, H * (D + R), bias=False)
        else:
            self.q_proj = Linear(C, H * (D + R), bias=False)
        self.kv_a_proj_with_mqa = Linear(C, L + R, bias=False)
        self.kv_a_layernorm = RMSNorm(L, EPS)
        self.kv_b_proj = Linear(L, H * (D + V), bias=False)
        self.o_proj = Linear(H * V, C, bias=False)

    def forward(
        self, x: Tensor, cos: Tensor, sin: Tensor, cache: Cache | None, mask: Tensor | None
    ) -> Tensor:
        """x (B, T, C) -> (B, T, C). cos, sin: (T, R), as of model.rope_tables."""
        latent, key = self.kv_a_proj_with_mqa(x).split([self.latent, self.rotary], -1)
        latent = self.kv_a_layernorm(latent)
        key = self.turned(key[:, None], cos, sin)  # (B, 1, T, R)
        q, q_rotary = self.queries(x).split([self.width, self.rotary], -1)
        q_rotary = self.turned(q_rotary, cos, sin)
        if cache is not None:
            (seen,) = cache.extend(self, torch.cat([latent[:, None], key], -1))
            if x.size(1) == 1:
                y = self.from_cache(q, q_rotary, seen, mask)
                return self.o_proj(y.transpose(1, 2).flatten(2))
        k, v = self.per_head(self.kv_b_proj(latent)).split([self.width, self.values], -1)
        q = torch.cat([q, q_rotary], -1)
        k = torch.cat([k, key.expand(-1, self.heads, -1, -1)], -1)
        y = self.attend(q, k, v, self.scale, mask)
        return self.o_proj(y.transpose(1, 2).flatten(2))

    def queries(self, x: Tensor) -> Tensor:
        """x (B, T, C) -> (B, H, T, D + R), through a latent of their own if q_rank is set."""
        if hasattr(self, "q_proj"):
            return self.per_head(self.q_proj(x))
        return self.per_head(self.q_b_proj(self.q_a_layernorm(self.q_a_proj(x))))

    def per_head(self, x: Tensor) -> Tensor:
        """(B, T, H n) -> (B, H, T, n)"""
        return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)

    def turned(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """RoPE. Pairs of neighbours are first sorted into halves, of queries and keys alike, which
        leaves their products as they are."""
        if self.interleave:
            x = x.unflatten(-1, (-1, 2)).mT.flatten(-2)
        return rotate(x, cos, sin)

    def scaled_by(self, factors: Tensor) -> list[tuple[Tensor, Tensor]]:
        """Weights, each with a factor per row, that scale the logits of each head by one of
        `factors` (H,). The rotary key stays, as all heads share it (Kimi K2, arXiv 2507.20534)."""

        def rows(*parts: tuple[Tensor, int]) -> Tensor:
            return torch.cat([x[:, None].expand(-1, width) for x, width in parts], 1).flatten()

        root, queries = factors.sqrt(), self.q_b_proj if hasattr(self, "q_b_proj") else self.q_proj
        keys = rows((root, self.width), (torch.ones_like(root), self.values))
        turned = rows((root, self.width), (factors, self.rotary))
        return [(queries.weight, turned), (self.kv_b_proj.weight, keys)]

    def from_cache(self, q: Tensor, q_rotary: Tensor, seen: Tensor, mask: Tensor | None) -> Tensor:
        """What one query per head, (B, H, 1, D) and (B, H, 1, R), reads from S latents and rotary
        keys (B, 1, S, L + R): (B, H, 1, V).

        q (W_k c) = (q W_k) c, and sum_s a_s W_v c_s = W_v sum_s a_s c_s: attention takes place
        among the latents, as if they were one head's keys and values, so no key or value of an
        earlier token is computed again (2405.04434, section 2.1.2, "absorbed").
        """
        W = self.kv_b_proj.weight.to(q.dtype).unflatten(0, (self.heads, -1))  # (H, D + V, L)
        W_k, W_v = W.split([self.width, self.values], 1)
        q = torch.cat([q @ W_k, q_rotary], -1)
        return attend(q, seen, seen[..., : self.latent], self.scale, mask) @ W_v.mT
