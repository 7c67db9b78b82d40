"""A decoder-only transformer. Imports torch and its settings; knows nothing of ranks or files.

Left alone, the config describes the Qwen3 architecture (pre-RMSNorm, RoPE, grouped-query attention,
per-head QK-norm with gains, SwiGLU, no biases), and parameter names are Hugging Face's without the
prefix `model.`, so a checkpoint needs no translation. The fields under "departures" turn it
into Llama (qk_norm) or, all others but value_embed, into the GPT of modded-nanogpt's track 3;
storage/huggingface.py names those that nobody else could load. parts/ has DeepSeek-V3's attention.

Shapes: B sequences, T tokens, C = n_embd, H query heads and G key/value heads of D = head_dim.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from nanonormuon.parts.config import GPTConfig

# logits at a time in HeadLoss: on a CPU they stay in the cache, a GPU wants larger products
CHUNK = {"cpu": 1 << 21, "cuda": 1 << 28}
TINY = torch.finfo(torch.float32).tiny  # a smaller number is zero where denormals are flushed
IGNORE = -1  # a target that counts for nothing (padding of the last validation window)
REST = {"fp32": torch.float32, "bf16": torch.bfloat16}  # by GPTConfig.embed_dtype


class Linear(nn.Linear):
    """Weights rest in their own dtype (float32); the product runs in the dtype of the input."""

    def forward(self, x: Tensor) -> Tensor:
        bias = None if self.bias is None else self.bias.to(x.dtype)
        return F.linear(x, self.weight.to(x.dtype), bias)


class RMSNorm(nn.Module):
    def __init__(self, size: int, eps: float, gain: bool = True):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size)) if gain else None
        self.size, self.eps = size, eps or torch.finfo(torch.float32).eps

    def forward(self, x: Tensor) -> Tensor:
        if x.device.type == "cpu" and x.dtype == torch.bfloat16 and self.weight is not None:
            return Normalise.apply(x, self.weight, self.eps)
        weight = None if self.weight is None else self.weight.to(x.dtype)
        return F.rms_norm(x, (self.size,), weight, self.eps)


class Normalise(torch.autograd.Function):
    """F.rms_norm in fewer passes: 0.4 of its time on a CPU, where torch has no kernel for it."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        weight = weight.to(x.dtype)
        square = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=torch.float32) ** 2
        r = (square / x.size(-1) + eps).rsqrt().to(x.dtype)
        n = x * r
        ctx.save_for_backward(n, r, weight)
        return n * weight

    @staticmethod
    @once_differentiable
    def backward(ctx, dy: Tensor) -> tuple[Tensor, Tensor, None]:
        n, r, weight = ctx.saved_tensors
        p = (dy * n).flatten(0, -2)
        along = (p @ (weight / n.size(-1))).view(r.shape)  # what only changes the norm
        return (dy * weight).addcmul_(n, along, value=-1).mul_(r), p.sum(0), None


def rope_tables(config: GPTConfig, length: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """cos and sin, each (length, D), for `rotate`; float32. The first half of sin is negative."""
    D = config.rope_head_dim or config.head_dim
    if config.rope == "half":  # its pairs turn the other way round than Qwen3's
        turning = (1 / 1024) ** torch.linspace(0, 1, D // 4, device=device)
        frequencies = torch.cat([-turning, turning.new_zeros(D // 2 - D // 4)])
    else:
        frequencies = config.rope_theta ** (-torch.arange(0, D, 2, device=device) / D)
    angle = torch.outer(torch.arange(length, device=device), frequencies)
    return angle.cos().repeat(1, 2), torch.cat([-angle.sin(), angle.sin()], dim=1)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """RoPE on (B, heads, T, D): the first half of the channels pairs with the second half. It is
    computed in the tables' dtype, if that is the wider one."""
    return torch.addcmul(x * cos, x.roll(x.size(-1) // 2, -1), sin).to(x.dtype)


def document_mask(tokens: Tensor, separator: int) -> Tensor:
    """(B, 1, T, T), true where a token sees another: itself and those before it, back to the last
    `separator`, which begins a document. Positions are relative, so they may run on."""
    document = (tokens == separator).cumsum(1)[:, None]
    return (document[:, :, :, None] == document[:, :, None, :]).tril()


def attend(q: Tensor, k: Tensor, v: Tensor, scale: float, mask: Tensor | None) -> Tensor:
    """Attention of queries (B, H, T, D) to keys (B, G, S, D) and values (B, G, S, V): (B, H, T, V).

    Causal, unless a mask (B, 1, T, S) says what each query sees. A single query sees all S keys;
    several are as many as the keys.
    """
    (B, H, T, D), G = q.shape, k.size(1)
    plain = q.device.type == "cpu" and q.dtype == torch.bfloat16
    if not plain or T == 1 or T > 512 or mask is not None:
        causal = T > 1 and mask is None
        return F.scaled_dot_product_attention(
            q, k, v, mask, is_causal=causal, scale=scale, enable_gqa=G != H
        )
    # plain products take half the time of torch's kernel here (docs/log.md); the query heads that
    # share a key head are rows of one product
    q, k, v = q.reshape(B * G, -1, D), k.reshape(B * G, T, D), v.reshape(B * G, T, -1)
    future = q.new_full((T, T), -torch.inf).triu(1).repeat(H // G, 1)
    scores = (q * scale) @ k.mT + future
    return (scores.softmax(-1) @ v).view(B, H, T, -1)


class Attention(nn.Module):
    attend = staticmethod(attend)  # runtime/qk_clip.py has one that looks at the logits

    def __init__(self, config: GPTConfig):
        super().__init__()
        C, D, H, G = config.n_embd, config.head_dim, config.n_head, config.n_kv_head
        self.head_dim, self.scale = D, config.attn_scale
        self.cached = ((G, D), (G, D))  # what Cache holds of a token: tensors of (heads, width)
        self.products = H * 2 * D  # multiplications per query and key that it sees
        # three matrices, not one: NorMuon orthogonalises each on its own
        self.q_proj = Linear(C, H * D, bias=config.bias)
        self.k_proj = Linear(C, G * D, bias=config.bias)
        self.v_proj = Linear(C, G * D, bias=config.bias)
        self.o_proj = Linear(H * D, C, bias=config.bias)
        qk_norm = (D, config.norm_eps, config.qk_gain)
        self.q_norm = RMSNorm(*qk_norm) if config.qk_norm else nn.Identity()
        self.k_norm = RMSNorm(*qk_norm) if config.qk_norm else nn.Identity()

    def forward(
        self, x: Tensor, cos: Tensor, sin: Tensor, cache: "Cache | None", mask: Tensor | None,
        value: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        """value (B, T, G D): added to the values."""
        heads = (*x.shape[:2], -1, self.head_dim)
        projections = (self.q_proj, self.k_proj, self.v_proj)
        q, k, v = (project(x).view(heads).transpose(1, 2) for project in projections)
        if value is not None:
            v = v + value.to(v.dtype).view(heads).transpose(1, 2)
        if x.device.type == "cpu":  # which is slow at passes over tensors of two orders in memory
            q, k = q.contiguous(), k.contiguous()
        q, k = rotate(self.q_norm(q), cos, sin), rotate(self.k_norm(k), cos, sin)
        if cache is not None:
            k, v = cache.extend(self, k, v)
        y = self.attend(q, k, v, self.scale, mask)
        return self.o_proj(y.transpose(1, 2).flatten(2))


class MLP(nn.Module):
    def __init__(self, config: GPTConfig):
        super().__init__()
        C, hidden, bias = config.n_embd, config.n_hidden, config.bias
        self.gate_proj = Linear(C, hidden, bias=bias) if config.mlp != "relu2" else None
        self.up_proj = Linear(C, hidden, bias=bias)
        self.down_proj = Linear(hidden, C, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        up = self.up_proj(x)
        h = F.relu(up).square() if self.gate_proj is None else F.silu(self.gate_proj(x)) * up
        return self.down_proj(h)


class Block(nn.Module):
    def __init__(self, config: GPTConfig, index: int):
        super().__init__()
        # a vector per token that is added to its values, in every second layer and the last (the
        # value embeddings of modded-nanogpt): many parameters, no products
        self.value_embed = None
        if config.value_embed and (config.n_layer - index) % 2 == 1:
            self.value_embed = nn.Embedding(config.vocab_size, config.n_kv_head * config.head_dim)
            self.parameter_roles = {"value_embed.weight": "value"}
        self.input_layernorm = RMSNorm(config.n_embd, config.norm_eps)
        if config.attention == "latent":
            from nanonormuon.parts.latent import LatentAttention  # made of this file's parts

            self.self_attn: nn.Module = LatentAttention(config)
        else:
            self.self_attn = Attention(config)
        self.post_attention_layernorm = RMSNorm(config.n_embd, config.norm_eps)
        if config.mlp == "experts" and index >= config.n_dense:
            from nanonormuon.parts.experts import Experts  # made of this file's MLP

            self.mlp: nn.Module = Experts(config)
        else:
            self.mlp = MLP(config)

    def forward(
        self, x: Tensor, cos: Tensor, sin: Tensor, cache: "Cache | None", mask: Tensor | None,
        tokens: Tensor,
    ) -> Tensor | tuple:  # fmt: skip
        value = () if self.value_embed is None else (self.value_embed(tokens),)
        x = x + self.self_attn(self.input_layernorm(x), cos, sin, cache, mask, *value)
        y = self.mlp(self.post_attention_layernorm(x))  # of Experts: also what the router did
        return (x + y[0], y[1]) if isinstance(y, tuple) else x + y


def chunk_rows(tokens: int, vocab_size: int, device: str) -> int:
    """Rows of logits that HeadLoss computes at a time: CHUNK logits, but at least 512 rows."""
    most = max(512, CHUNK.get(device, 1 << 28) // vocab_size)
    parts = -(-tokens // (1 << most.bit_length() - 1))  # products of 2^k rows are the fastest
    return -(-tokens // parts)  # equal parts: a rest would be slow and compiled on its own


class HeadLoss(torch.autograd.Function):
    """Cross entropy, summed over N tokens, of the logits cap(h W^T + b), and its gradients.

    All logits at once, (N, vocab_size) in float32, would be the largest tensor of a training step.
    Here they live one chunk of rows at a time, and each chunk's gradient is taken while its logits
    are at hand (the idea of Liger Kernel's fused linear cross entropy, arXiv 2410.10989).
    """

    @staticmethod
    def forward(
        ctx, h: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, cap: float,
        differentiate: bool,
    ) -> Tensor:  # fmt: skip
        """h (N, C), weight (vocab_size, C), bias (vocab_size,), targets (N,) -> float32 scalar."""
        W, b = weight.to(h.dtype), None if bias is None else bias.to(h.dtype)
        loss = torch.zeros((), device=h.device)
        # a frozen head's gradient, or no gradient in an evaluation, costs nothing
        to_h, to_W, to_b = (differentiate and need for need in ctx.needs_input_grad[:3])
        dh = torch.empty_like(h) if to_h else None
        dW = torch.zeros_like(weight, dtype=torch.float32) if to_W else None
        db = torch.zeros_like(bias, dtype=torch.float32) if to_b else None
        # compiled, the passes over a chunk fuse, so that p stays out of memory, unless it is
        # scattered into; without a compiler a scatter is by far the cheapest
        fused, ids = torch.compiler.is_compiling(), torch.arange(W.size(0), device=h.device)
        rows = chunk_rows(len(h), W.size(0), h.device.type)
        for start in range(0, h.size(0), rows):
            x, y = h[start : start + rows], targets[start : start + rows, None]
            z = F.linear(x, W, b).float()
            if cap:
                shrink = (z.square() + cap * cap).rsqrt_()
                z = cap * z * shrink
            p = z.softmax(1)
            counts, y = (y != IGNORE).to(h.dtype), y.clamp_min(0)
            right = p.gather(1, y)
            # float32 ends at exp(-87): what is further off counts so, its gradient is exact
            loss -= (right.clamp_min(TINY).log() * counts).sum()
            if to_h or to_W or to_b:
                # softmax minus one-hot
                dz = torch.where(ids == y, p - 1, p) if fused else p.scatter_(1, y, right - 1)
                if cap:
                    dz *= (cap * shrink) ** 3
                dz = dz.to(h.dtype)
                if to_h:
                    dh[start : start + rows] = (dz @ W) * counts
                if to_W:
                    dW += dz.T @ (x * counts)
                if to_b:
                    # no sum: a compiler would join those of all chunks and keep each dz for it
                    db += (dz.T @ counts).flatten()
        ctx.save_for_backward(dh, dW, db)
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx, upstream: Tensor):
        dh, dW, db = (None if g is None else g * upstream.to(g.dtype) for g in ctx.saved_tensors)
        return dh, dW, db, None, None, None


class GPT(nn.Module):
    """The model. Activations and products use `compute_dtype`; weights float32 (embed_dtype)."""

    def __init__(self, config: GPTConfig, compute_dtype: torch.dtype = torch.float32):
        super().__init__()
        config = self.config = config.resolved()
        self.compute_dtype = compute_dtype
        self.separator: int | None = None  # a token that attention is not to cross
        eps = config.norm_eps
        rest = REST[config.embed_dtype]
        self.embed_tokens = nn.Embedding(config.vocab_size, config.n_embd, dtype=rest)
        self.bigram_embed = None
        if config.bigram_embed:
            from nanonormuon.parts.bigram import BigramEmbedding

            self.bigram_embed = BigramEmbedding(config.bigram_embed, config.n_embd)
        self.embed_norm = RMSNorm(config.n_embd, eps) if config.embed_norm else None
        self.layers = nn.ModuleList(Block(config, i) for i in range(config.n_layer))
        self.routed: list = []  # what the routers did in the last pass: parts.experts.Routed
        self.norm = RMSNorm(config.n_embd, eps)
        self.lm_head = None
        if not config.tied:
            self.lm_head = Linear(config.n_embd, config.vocab_size, bias=config.bias)

    def init_weights(self, seed: int) -> "GPT":
        """Fill the parameters from a generator of their own, so that no other randomness matters.

        Output projections, value and bigram embeddings and an untied head start at zero: at the
        first step every block is the identity and the loss is log(vocab_size) (modded-nanogpt). The
        other matrices are N(0, sqrt(0.33 / fan_in)).
        """
        random = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for name, p in self.named_parameters():
                value = torch.zeros(p.shape)
                if name.endswith("norm.weight"):
                    value.fill_(1.0)
                elif name == "embed_tokens.weight":
                    value.normal_(std=self.config.embed_std, generator=random)
                elif p.ndim > 1 and not name.removesuffix(".weight").endswith(
                    ("o_proj", "down_proj", "value_embed", "bigram_embed", "lm_head")
                ):
                    value.normal_(std=(0.33 / p.size(-1)) ** 0.5, generator=random)
                p.copy_(value)
        return self

    def hidden(self, tokens: Tensor, cache: "Cache | None" = None) -> Tensor:
        """tokens (B, T) int64 -> the residual stream after the last norm (B, T, C)."""
        start = 0 if cache is None else cache.length
        length = start + tokens.size(1)
        cos, sin = (t[start:] for t in rope_tables(self.config, length, tokens.device))
        if self.config.rope == "full":  # as Qwen3 rounds them; track 3 turns in float32
            cos, sin = cos.to(self.compute_dtype), sin.to(self.compute_dtype)
        mask = None
        if self.separator is not None and cache is None:
            mask = document_mask(tokens, self.separator)
        elif cache is not None and tokens.size(1) == 1:
            mask = cache.mask()
        x = self.embed_tokens(tokens).to(self.compute_dtype)
        if self.bigram_embed is not None:
            x = x + self.bigram_embed(tokens, cache, self.separator).to(x.dtype)
        if self.embed_norm is not None:
            x = self.embed_norm(x)
        self.routed = []
        for layer in self.layers:
            x = layer(x, cos, sin, cache, mask, tokens)
            if isinstance(x, tuple):
                x, routed = x
                self.routed.append(routed)
        if cache is not None:
            cache.length, cache.last = length, tokens[:, -1:]
        return self.norm(x)

    def get_output_embeddings(self) -> nn.Module:
        """The module whose weight makes the logits; transformers' name for it."""
        return self.embed_tokens if self.lm_head is None else self.lm_head

    def logits(self, h: Tensor) -> Tensor:
        """h (..., C) -> float32 logits (..., vocab_size)."""
        head = self.get_output_embeddings()
        bias = getattr(head, "bias", None)
        z = F.linear(h, head.weight.to(h.dtype), None if bias is None else bias.to(h.dtype)).float()
        cap = self.config.logit_cap
        return cap * z * (z.square() + cap * cap).rsqrt() if cap else z

    def forward(
        self,
        tokens: Tensor,
        targets: Tensor | None = None,
        reduction: str = "mean",
        cache: "Cache | None" = None,
    ) -> Tensor:
        """Logits (B, T, vocab_size), or with targets (B, T) their cross entropy in nats.

        reduction: "mean" or "sum" over the targets that are not IGNORE. cache: `tokens` continue
        those it holds, and are added to it.
        """
        h = self.hidden(tokens, cache)
        if targets is None:
            return self.logits(h)
        head, train = self.get_output_embeddings(), torch.is_grad_enabled()
        bias, cap = getattr(head, "bias", None), self.config.logit_cap
        loss = HeadLoss.apply(h.flatten(0, 1), head.weight, bias, targets.flatten(), cap, train)
        loss = loss if reduction == "sum" else loss / (targets != IGNORE).sum()
        if self.config.balance_loss and train:  # its gradient alone: the loss is the cross entropy
            auxiliary = self.config.balance_loss * sum(r.balance for r in self.routed)
            loss = loss + (auxiliary - auxiliary.detach())
        return loss

    def unvisited(self) -> int:
        """How many weights are those of experts that a token does not visit."""
        stacks, c = sum(p.numel() for p in self.parameters() if p.ndim == 3), self.config
        return stacks // max(c.n_expert, 1) * (c.n_expert - c.n_expert_used)

    def flops_per_token(self, seq_len: int) -> float:
        """Floating-point operations of forward and backward per trained token.

        6 per weight of a product (of visited experts alone), and 12 n_layer (H D) seq_len / 2 for
        causal attention's two products (PaLM, arXiv 2204.02311, appendix B, halved because half of
        the scores are masked). `products` of an attention stands for 2 H D.
        """
        head = self.get_output_embeddings()
        weights = sum(p.numel() for p in self.parameters() if p.ndim > 1) - self.unvisited()
        tables = [m for m in self.modules() if isinstance(m, nn.Embedding) and m is not head]
        lookup = sum(m.weight.numel() for m in tables)  # a lookup multiplies nothing
        return 6 * (weights - lookup) + 3 * seq_len * sum(b.self_attn.products for b in self.layers)


class Cache:
    """What attention needs of the tokens seen so far, for generation: room for `size` tokens. Each
    attention's `cached` says what that is: keys and values, or a latent.

    A single query is given whole blocks of keys, since cuDNN plans a kernel for every number of
    keys, and a mask hides those still to come. On a CPU a block is one token.
    """

    def __init__(self, model: GPT, batch: int, size: int):
        dtype, device = model.compute_dtype, model.embed_tokens.weight.device
        self.length, self.size, self.device = 0, size, device
        self.block = 1 if device.type == "cpu" else 256
        self.last = torch.zeros(batch, 1, dtype=torch.int64, device=device)  # of the tokens

        def room(heads: int, width: int) -> Tensor:  # zeros: a mask could not hide NaN
            return torch.zeros(batch, heads, size, width, dtype=dtype, device=device)

        each = [layer.self_attn for layer in model.layers]
        self.kept = {attention: [room(*of) for of in attention.cached] for attention in each}

    def shown(self) -> int:
        """How many keys the next token's query is given."""
        return min(self.size, (self.length // self.block + 1) * self.block)

    def mask(self) -> Tensor | None:
        """(1, 1, 1, shown), true where the next token's query sees a key; None: it sees all."""
        if self.block == 1:
            return None
        return (torch.arange(self.shown(), device=self.device) <= self.length)[None, None, None]

    def extend(self, attention: nn.Module, *new: Tensor) -> list[Tensor]:
        """Append tensors (B, heads, T, width) as in attention.cached; returns all to attend to."""
        end = self.length + (T := new[0].size(2))
        if end > self.size:
            raise ValueError(f"cache of {self.size} tokens: {end} do not fit")
        assert self.length == 0 or T == 1, "several tokens need an empty cache"
        for kept, t in zip(self.kept[attention], new):
            kept[:, :, self.length : end] = t
        shown = self.shown() if T == 1 else end
        return [kept[:, :, :shown] for kept in self.kept[attention]]
