"""Latent attention: the keys and values of all heads are projected from one narrow latent per
token, and generation caches only this latent and a rotary key.

Multi-head latent attention (MLA) of DeepSeek-V2 (arXiv 2405.04434, section 2.1) as in DeepSeek-V3
(2412.19437), with the parameter names of its checkpoints. D channels of a head's query and key have
no RoPE, so that they can be absorbed into the up-projections; R more have it, and all heads share
one rotary key. As in those checkpoints, two matrices are fused: kv_a_proj_with_mqa (rows of the
latent and of the rotary key) and kv_b_proj (each head's key and value rows).

Shapes as in model.py, and: L = kv_rank, D = head_dim, R = rope_head_dim, V = v_head_dim.
"""

import torch
from torch import Tensor, nn

from nanonormuon.model import Cache, Linear, RMSNorm, attend, rotate
from nanonormuon.parts.config import GPTConfig

EPS = 1e-6  # of the latents' norms, a constant in transformers' DeepSeek-V3


class LatentAttention(nn.Module):
    """Attention with H heads over a latent and a rotary key per token."""

    attend = staticmethod(attend)  # as in model.Attention

    def __init__(self, config: GPTConfig):
        super().__init__()
        C, H = config.n_embd, config.n_head
        L, D, R, V = config.kv_rank, config.head_dim, config.rope_head_dim, config.v_head_dim
        self.heads, self.latent, self.scale = H, L, config.attn_scale
        self.width, self.rotary, self.values = D, R, V
        self.interleave = config.rope_interleave
        self.cached = ((1, L + R),)  # (heads, width) of what Cache holds per token
        self.products = H * (D + R + V)  # multiplications per pair of query and key
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
        """Attend over x (B, T, C). cos, sin: (T, R), from model.rope_tables."""
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
        """Project x (B, T, C) to queries (B, H, T, D + R), through a latent if q_rank is set."""
        if hasattr(self, "q_proj"):
            return self.per_head(self.q_proj(x))
        return self.per_head(self.q_b_proj(self.q_a_layernorm(self.q_a_proj(x))))

    def per_head(self, x: Tensor) -> Tensor:
        """Turn (B, T, H n) into (B, H, T, n)."""
        return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)

    def turned(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """Apply RoPE. First moves interleaved pairs into halves, in queries and keys alike, which
        leaves their dot products unchanged."""
        if self.interleave:
            x = x.unflatten(-1, (-1, 2)).mT.flatten(-2)
        return rotate(x, cos, sin)

    def scaled_by(self, factors: Tensor) -> list[tuple[Tensor, Tensor]]:
        """Return weights with a factor per row, which scale each head's logits by `factors` (H,).
        Leaves the rotary key alone, as all heads share it (Kimi K2, arXiv 2507.20534)."""

        def rows(*parts: tuple[Tensor, int]) -> Tensor:
            return torch.cat([x[:, None].expand(-1, width) for x, width in parts], 1).flatten()

        root, queries = factors.sqrt(), self.q_b_proj if hasattr(self, "q_b_proj") else self.q_proj
        keys = rows((root, self.width), (torch.ones_like(root), self.values))
        turned = rows((root, self.width), (factors, self.rotary))
        return [(queries.weight, turned), (self.kv_b_proj.weight, keys)]

    def from_cache(self, q: Tensor, q_rotary: Tensor, seen: Tensor, mask: Tensor | None) -> Tensor:
        """Attend from one query per head, (B, H, 1, D) and (B, H, 1, R), to S latents and rotary
        keys (B, 1, S, L + R); returns (B, H, 1, V).

        q (W_k c) = (q W_k) c and sum_s a_s W_v c_s = W_v sum_s a_s c_s, so the latents can serve as
        one head's keys and values, and those of earlier tokens need not be recomputed (absorption,
        2405.04434, section 2.1.2).
        """
        W = self.kv_b_proj.weight.to(q.dtype).unflatten(0, (self.heads, -1))  # (H, D + V, L)
        W_k, W_v = W.split([self.width, self.values], 1)
        q = torch.cat([q @ W_k, q_rotary], -1)
        return attend(q, seen, seen[..., : self.latent], self.scale, mask) @ W_v.mT
