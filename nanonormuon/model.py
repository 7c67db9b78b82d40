"""A decoder-only transformer, independent of ranks and files.

The default config is the Qwen3 architecture (pre-RMSNorm, RoPE, grouped-query attention, per-head
QK-norm with gains, SwiGLU, no biases). Parameters have Hugging Face's names without the prefix
`model.`. The settings under "departures" make it Llama (qk_norm) or the GPT of modded-nanogpt's
track 3. parts/ has what few models need; storage/huggingface.py knows what transformers can load.

Shapes: B sequences, T tokens, C = n_embd, H query heads and G key/value heads of D = head_dim.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from nanonormuon.parts.config import GPTConfig

# logits per chunk of HeadLoss: few enough for a CPU's cache, many for a GPU's efficiency
CHUNK = {"cpu": 1 << 21, "cuda": 1 << 28}
TINY = torch.finfo(torch.float32).tiny  # smaller values may be flushed to zero
IGNORE = -1  # a target that the loss leaves out (padding of the last validation window)
REST = {"fp32": torch.float32, "bf16": torch.bfloat16}  # by GPTConfig.embed_dtype


class Linear(nn.Linear):
    """Keeps its weights in float32 and multiplies in the input's dtype."""

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
    """F.rms_norm in 0.4 of its time on a CPU, where torch has no fused kernel."""

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
        along = (p @ (weight / n.size(-1))).view(r.shape)  # the component along n
        return (dy * weight).addcmul_(n, along, value=-1).mul_(r), p.sum(0), None


def rope_tables(config: GPTConfig, length: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Compute cos and sin, (length, D) float32, for `rotate`. The first half of sin is negated."""
    D = config.rope_head_dim or config.head_dim
    if config.rope == "half":  # rotates in the opposite direction to Qwen3
        turning = (1 / 1024) ** torch.linspace(0, 1, D // 4, device=device)
        frequencies = torch.cat([-turning, turning.new_zeros(D // 2 - D // 4)])
    else:
        frequencies = config.rope_theta ** (-torch.arange(0, D, 2, device=device) / D)
    angle = torch.outer(torch.arange(length, device=device), frequencies)
    return angle.cos().repeat(1, 2), torch.cat([-angle.sin(), angle.sin()], dim=1)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Apply RoPE to (B, heads, T, D), pairing the first half of the channels with the second, in
    the wider dtype of x and the tables."""
    return torch.addcmul(x * cos, x.roll(x.size(-1) // 2, -1), sin).to(x.dtype)


def document_mask(tokens: Tensor, separator: int) -> Tensor:
    """Build the mask (B, 1, T, T): a token attends to itself and back to the last `separator`,
    which begins a document. RoPE is relative, so positions need not restart."""
    document = (tokens == separator).cumsum(1)[:, None]
    return (document[:, :, :, None] == document[:, :, None, :]).tril()


def attend(q: Tensor, k: Tensor, v: Tensor, scale: float, mask: Tensor | None) -> Tensor:
    """Attend from (B, H, T, D) to keys (B, G, S, D) and values (B, G, S, V); returns (B, H, T, V).
    Causal, unless there is a mask (B, 1, T, S). T is 1, a query that sees all S keys, or S."""
    (B, H, T, D), G = q.shape, k.size(1)
    plain = q.device.type == "cpu" and q.dtype == torch.bfloat16
    if not plain or T == 1 or T > 512 or mask is not None:
        causal = T > 1 and mask is None
        return F.scaled_dot_product_attention(
            q, k, v, mask, is_causal=causal, scale=scale, enable_gqa=G != H
        )
    # plain matmuls take half the time of torch's kernel here (docs/log.md); query heads that share
    # a key head are rows of one matmul
    q, k, v = q.reshape(B * G, -1, D), k.reshape(B * G, T, D), v.reshape(B * G, T, -1)
    future = q.new_full((T, T), -torch.inf).triu(1).repeat(H // G, 1)
    scores = (q * scale) @ k.mT + future
    return (scores.softmax(-1) @ v).view(B, H, T, -1)


class Attention(nn.Module):
    attend = staticmethod(attend)  # runtime/qk_clip.py replaces it to see the logits

    def __init__(self, config: GPTConfig):
        super().__init__()
        C, D, H, G = config.n_embd, config.head_dim, config.n_head, config.n_kv_head
        self.head_dim, self.scale = D, config.attn_scale
        self.cached = ((G, D), (G, D))  # (heads, width) of what Cache holds per token
        self.products = H * 2 * D  # multiplications per pair of query and key
        # not one fused matrix: NorMuon orthogonalises each projection separately
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
        """Attend over x (B, T, C). value (B, T, G D): added to the values."""
        heads = (*x.shape[:2], -1, self.head_dim)
        projections = (self.q_proj, self.k_proj, self.v_proj)
        q, k, v = (project(x).view(heads).transpose(1, 2) for project in projections)
        if value is not None:
            v = v + value.to(v.dtype).view(heads).transpose(1, 2)
        if x.device.type == "cpu":  # mixed memory layouts are slow there
            q, k = q.contiguous(), k.contiguous()
        q, k = rotate(self.q_norm(q), cos, sin), rotate(self.keys(k, cache, mask), cos, sin)
        if cache is not None:
            k, v = cache.extend(self, k, v)
        y = self.attend(q, k, v, self.scale, mask)
        return self.o_proj(y.transpose(1, 2).flatten(2))

    def keys(self, k: Tensor, cache: "Cache | None", mask: Tensor | None) -> Tensor:
        """Normalise the keys (B, G, T, D); see also parts/shift.py."""
        return self.k_norm(k)


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
        # every second layer adds a learnt vector per token to its values (modded-nanogpt)
        self.value_embed = None
        if config.value_embed and (config.n_layer - index) % 2 == 1:
            self.value_embed = nn.Embedding(config.vocab_size, config.n_kv_head * config.head_dim)
            self.parameter_roles = {"value_embed.weight": "value"}
        self.input_layernorm = RMSNorm(config.n_embd, config.norm_eps)
        if config.attention == "latent":
            from nanonormuon.parts.latent import LatentAttention  # imports this file

            self.self_attn: nn.Module = LatentAttention(config)
        elif config.key_shift:
            from nanonormuon.parts.shift import ShiftedAttention  # imports this file

            self.self_attn = ShiftedAttention(config)
        else:
            self.self_attn = Attention(config)
        self.post_attention_layernorm = RMSNorm(config.n_embd, config.norm_eps)
        if config.mlp == "experts" and index >= config.n_dense:
            from nanonormuon.parts.experts import Experts  # imports this file

            self.mlp: nn.Module = Experts(config)
        else:
            self.mlp = MLP(config)

    def forward(
        self, x: Tensor, cos: Tensor, sin: Tensor, cache: "Cache | None", mask: Tensor | None,
        tokens: Tensor,
    ) -> Tensor | tuple:  # fmt: skip
        value = () if self.value_embed is None else (self.value_embed(tokens),)
        x = x + self.self_attn(self.input_layernorm(x), cos, sin, cache, mask, *value)
        y = self.mlp(self.post_attention_layernorm(x))  # Experts returns (y, Routed)
        return (x + y[0], y[1]) if isinstance(y, tuple) else x + y


def chunk_rows(tokens: int, vocab_size: int, device: str) -> int:
    """Return the rows per chunk of HeadLoss: at most CHUNK logits, or 512 rows if that is more."""
    most = max(512, CHUNK.get(device, 1 << 28) // vocab_size)
    parts = -(-tokens // (1 << most.bit_length() - 1))  # matmuls of 2^k rows are the fastest
    return -(-tokens // parts)  # equal chunks: a remainder would be compiled separately


class HeadLoss(torch.autograd.Function):
    """Cross entropy of the logits cap(h W^T + b), summed over N tokens, and its gradients.

    The logits, (N, vocab_size) in float32, would be the largest tensor of a training step. So they
    exist one chunk of rows at a time, and the forward pass computes each chunk's gradient as well
    (as Liger Kernel's fused linear cross entropy does, arXiv 2410.10989).
    """

    @staticmethod
    def forward(
        ctx, h: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, cap: float,
        differentiate: bool,
    ) -> Tensor:  # fmt: skip
        """h (N, C), weight (vocab_size, C), bias (vocab_size,), targets (N,) -> float32 scalar."""
        W, b = weight.to(h.dtype), None if bias is None else bias.to(h.dtype)
        loss = torch.zeros((), device=h.device)
        # compute only the gradients needed: none in an evaluation, no dW for a frozen head
        to_h, to_W, to_b = (differentiate and need for need in ctx.needs_input_grad[:3])
        dh = torch.empty_like(h) if to_h else None
        dW = torch.zeros_like(weight, dtype=torch.float32) if to_W else None
        db = torch.zeros_like(bias, dtype=torch.float32) if to_b else None
        # a compiler fuses the passes over a chunk and never stores p, but not around a scatter,
        # which is by far the cheapest way without a compiler
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
            # clamped at exp(-87), float32's smallest; the gradient stays exact
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
                    # not dz.sum(0): a compiler would fuse the sums of all chunks and keep every dz
                    db += (dz.T @ counts).flatten()
        ctx.save_for_backward(dh, dW, db)
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx, upstream: Tensor):
        dh, dW, db = (None if g is None else g * upstream.to(g.dtype) for g in ctx.saved_tensors)
        return dh, dW, db, None, None, None


class GPT(nn.Module):
    """Computes in `compute_dtype`. Weights stay float32, except for an embedding in embed_dtype."""

    def __init__(self, config: GPTConfig, compute_dtype: torch.dtype = torch.float32):
        super().__init__()
        config = self.config = config.resolved()
        self.compute_dtype = compute_dtype
        self.separator: int | None = None  # token that attention does not cross
        V, C, eps = config.vocab_size, config.n_embd, config.norm_eps
        self.embed_tokens = nn.Embedding(V, C, dtype=REST[config.embed_dtype])
        self.bigram_embed = None
        if config.bigram_embed:
            from nanonormuon.parts.bigram import BigramEmbedding

            self.bigram_embed = BigramEmbedding(config.bigram_embed, C)
        self.embed_norm = RMSNorm(C, eps) if config.embed_norm else nn.Identity()
        self.layers = nn.ModuleList(Block(config, i) for i in range(config.n_layer))
        self.routed: list = []  # a parts.experts.Routed per router for the last forward pass
        self.norm = RMSNorm(C, eps)
        self.lm_head = None if config.tied else Linear(C, V, bias=config.bias)

    def init_weights(self, seed: int) -> "GPT":
        """Initialise the parameters from a separate random generator.

        Output projections, value and bigram embeddings and an untied head start at zero: every
        block is the identity at first, and the loss log(vocab_size) (modded-nanogpt). Other
        matrices have the standard deviation sqrt(0.33 / fan_in).
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
        """Map tokens (B, T) int64 to the residual stream after the last norm (B, T, C)."""
        start = 0 if cache is None else cache.length
        length = start + tokens.size(1)
        cos, sin = (t[start:] for t in rope_tables(self.config, length, tokens.device))
        if self.config.rope == "full":  # rounded as Qwen3's; track 3 rotates in float32
            cos, sin = cos.to(self.compute_dtype), sin.to(self.compute_dtype)
        mask = None
        if self.separator is not None and cache is None:
            mask = document_mask(tokens, self.separator)
        elif cache is not None and tokens.size(1) == 1:
            mask = cache.mask()
        x = self.embed_tokens(tokens).to(self.compute_dtype)
        if self.bigram_embed is not None:
            x = x + self.bigram_embed(tokens, cache, self.separator).to(x.dtype)
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
        """Return the module whose weight makes the logits (transformers' name)."""
        return self.embed_tokens if self.lm_head is None else self.lm_head

    def logits(self, h: Tensor) -> Tensor:
        """Map h (..., C) to float32 logits (..., vocab_size)."""
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
        """Return logits (B, T, vocab_size), or with targets (B, T) the cross entropy in nats.

        reduction: "mean" or "sum", without IGNORE. cache: earlier tokens; it takes these, too.
        """
        h = self.hidden(tokens, cache)
        if targets is None:
            return self.logits(h)
        head, train = self.get_output_embeddings(), torch.is_grad_enabled()
        bias, cap = getattr(head, "bias", None), self.config.logit_cap
        loss = HeadLoss.apply(h.flatten(0, 1), head.weight, bias, targets.flatten(), cap, train)
        loss = loss if reduction == "sum" else loss / (targets != IGNORE).sum()
        if self.config.balance_loss and train:  # adds its gradient, not its value
            auxiliary = self.config.balance_loss * sum(r.balance for r in self.routed)
            loss = loss + (auxiliary - auxiliary.detach())
        return loss

    def unvisited(self) -> int:
        """Count the weights of experts that a token does not visit."""
        stacks, c = sum(p.numel() for p in self.parameters() if p.ndim == 3), self.config
        return stacks // max(c.n_expert, 1) * (c.n_expert - c.n_expert_used)

    def flops_per_token(self, seq_len: int) -> float:
        """Return the floating-point operations of forward and backward pass per trained token.

        6 per weight of a matmul (experts: those visited), and 12 n_layer (H D) seq_len / 2 for
        attention (PaLM, arXiv 2204.02311, appendix B; halved, since causal masking skips half of
        the scores). An attention's `products` is 2 H D.
        """
        head = self.get_output_embeddings()
        weights = sum(p.numel() for p in self.parameters() if p.ndim > 1) - self.unvisited()
        tables = [m for m in self.modules() if isinstance(m, nn.Embedding) and m is not head]
        lookup = sum(m.weight.numel() for m in tables)  # lookups take no multiplications
        return 6 * (weights - lookup) + 3 * seq_len * sum(b.self_attn.products for b in self.layers)


class Cache:
    """Keys and values, or latents (an attention's `cached` says which), of up to `size` tokens.

    cuDNN plans a kernel for every number of keys, so a single query gets whole blocks of keys, with
    a mask over those still to come. On a CPU a block is one token.
    """

    def __init__(self, model: GPT, batch: int, size: int):
        dtype, device = model.compute_dtype, model.embed_tokens.weight.device
        self.length, self.size, self.device = 0, size, device
        self.block = 1 if device.type == "cpu" else 256
        self.last = torch.zeros(batch, 1, dtype=torch.int64, device=device)  # of the tokens

        def room(heads: int, width: int) -> Tensor:  # zeros: a mask cannot hide NaN
            return torch.zeros(batch, heads, size, width, dtype=dtype, device=device)

        self.latest: dict[nn.Module, Tensor] = {}  # of key_shift, the last token's keys
        each = [layer.self_attn for layer in model.layers]
        self.kept = {attention: [room(*of) for of in attention.cached] for attention in each}

    def shown(self) -> int:
        """Return how many keys the next token's query gets."""
        return min(self.size, (self.length // self.block + 1) * self.block)

    def mask(self) -> Tensor | None:
        """Return the next token's mask (1, 1, 1, shown), or None if its query sees all keys."""
        if self.block == 1:
            return None
        return (torch.arange(self.shown(), device=self.device) <= self.length)[None, None, None]

    def extend(self, attention: nn.Module, *new: Tensor) -> list[Tensor]:
        """Append (B, heads, T, width) in the order of attention.cached; return all to attend to."""
        end = self.length + (T := new[0].size(2))
        if end > self.size:
            raise ValueError(f"{end} tokens do not fit into a cache of {self.size}")
        assert self.length == 0 or T == 1, "several tokens need an empty cache"
        for kept, t in zip(self.kept[attention], new):
            kept[:, :, self.length : end] = t
        shown = self.shown() if T == 1 else end
        return [kept[:, :, :shown] for kept in self.kept[attention]]
