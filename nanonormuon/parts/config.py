"""The model's settings: what model.py builds. Imports nothing but the standard library."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import NoReturn

CHOICES = {
    "attention": ("full", "latent"),
    "mlp": ("swiglu", "relu2", "experts"),
    "rope": ("full", "half"),
    "router": ("sigmoid", "softmax"),
}
EXPERTS = ("n_expert", "n_expert_used", "n_expert_shared", "expert_hidden", "n_dense", "router",
           "router_norm", "router_scale", "n_expert_group", "n_group_used", "balance_rate",
           "balance_loss")  # fmt: skip
# the settings of latent attention where there is none, and what latent attention has no choice in:
# its norms are those of the latents, and DeepSeek-V3's have gains
LATENT = {"q_rank": 0, "kv_rank": 0, "rope_head_dim": 0, "v_head_dim": 0, "rope_interleave": True}
PLAIN = {"qk_norm": True, "qk_gain": True, "bias": False, "value_embed": False}


@dataclass(frozen=True)
class GPTConfig:
    """The model's knobs; a 0 stands for the value its comment derives."""

    vocab_size: int = 0  # rows of embedding and head; 0: the data's, rounded up to a multiple of 64
    n_layer: int = 12
    n_head: int = 12  # query heads
    n_kv_head: int = 0  # key and value heads; 0: n_head
    n_embd: int = 768  # width of the residual stream
    head_dim: int = 0  # 0: n_embd / n_head; latent attention: of queries and keys what has no RoPE
    n_hidden: int = 0  # width of the MLP; 0: 8/3 n_embd up to a multiple of 64; relu2: 4 n_embd
    tied: bool = False  # head = embedding
    rope_theta: float = 10_000.0
    norm_eps: float = 1e-6  # 0: float32's epsilon, torch's default in bfloat16 too
    embed_std: float = 0.0  # of the initial embedding; 0: 1 untied, 0.02 tied
    attention: str = "full"  # full | latent (DeepSeek-V3's), which the next five are for
    q_rank: int = 0  # width of the queries' latent; 0: none, queries come from the residual stream
    kv_rank: int = 0  # width of the latent of keys and values; 0: 4 head_dim
    rope_head_dim: int = 0  # width of a rotary key or query, beside head_dim; 0: head_dim / 2
    v_head_dim: int = 0  # width of a value; 0: head_dim
    rope_interleave: bool = True  # channels 2i and 2i + 1 turn together; false: i and i + half
    # departures from Qwen3
    mlp: str = "swiglu"  # swiglu | relu2 (two matrices around a squared ReLU) | experts (below)
    bias: bool = False  # in every linear layer, the head too
    qk_norm: bool = True  # false: q and k are not normalised (Llama)
    qk_gain: bool = True  # gains in the norms of q and k
    rope: str = "full"  # full | half (half of the pairs do not turn; modded-nanogpt's frequencies)
    attn_scale: float = 0.0  # 0: 1 / sqrt(head_dim + rope_head_dim)
    embed_norm: bool = False  # an RMSNorm after the embedding
    value_embed: bool = False  # every 2nd layer adds a vector per token to its values
    bigram_embed: int = 0  # rows of a table of vectors for pairs of tokens (hashed); 0: none
    logit_cap: float = 0.0  # c > 0: logits become c x / sqrt(x^2 + c^2)
    embed_dtype: str = "fp32"  # fp32 | bf16: how the embedding rests, and AdamW's averages for it
    # with mlp = "experts": SwiGLUs, of which each token visits those that a router chooses
    n_expert: int = 0  # in each layer
    n_expert_used: int = 0  # of them visited by a token
    n_expert_shared: int = 1  # more of them, visited by every token
    expert_hidden: int = 0  # width of each; 0: n_hidden / visited ones, up to a multiple of 16
    n_dense: int = 0  # leading layers with a single SwiGLU of n_hidden
    router: str = "sigmoid"  # sigmoid | softmax, of the logits: an expert's score for a token
    router_norm: bool = True  # the scores of a token's experts, its weights, are made to sum to 1
    router_scale: float = 1.0  # a factor on these weights
    n_expert_group: int = 1  # equal groups of the experts ...
    n_group_used: int = 1  # ... of which a token's experts may come from so many (DeepSeek-V3)
    balance_rate: float = 0.001  # each step moves busy experts' bias down, others' up; 0: no rule
    balance_loss: float = 0.0  # weight of an auxiliary loss for even load within each sequence

    def __post_init__(self) -> None:
        def refuse(name: str, expected: str) -> NoReturn:
            raise ValueError(f"{name} = {getattr(self, name)}: expected {expected}")

        for name in ("n_layer", "n_head", "n_embd"):
            if getattr(self, name) < 1:
                refuse(name, "at least 1")
        for name in ("vocab_size", "n_kv_head", "head_dim", "n_hidden", "norm_eps", "embed_std",
                     "q_rank", "kv_rank", "rope_head_dim", "v_head_dim",
                     "bigram_embed"):  # fmt: skip
            if getattr(self, name) < 0:
                refuse(name, "0 or more")
        for name, choices in CHOICES.items():
            if getattr(self, name) not in choices:
                refuse(name, " or ".join(choices))
        head_dim = self.head_dim or self.n_embd // self.n_head
        if self.head_dim == 0 and self.n_embd % self.n_head:
            least = min(self.n_head, self.n_embd)
            near = max(n for n in range(1, least + 1) if self.n_embd % n == 0)
            refuse(
                "n_embd",
                f"a multiple of n_head = {self.n_head}: take n_head = {near} or give head_dim",
            )
        if head_dim % 4:
            raise ValueError(f"head_dim = {head_dim}: expected a multiple of 4")
        if self.n_kv_head and self.n_head % self.n_kv_head:
            refuse("n_head", f"a multiple of n_kv_head = {self.n_kv_head}")
        if self.embed_dtype not in ("fp32", "bf16") or (self.tied and self.embed_dtype != "fp32"):
            refuse(
                "embed_dtype", "fp32, as the head is tied to it" if self.tied else "fp32 or bf16"
            )
        self._check_latent(refuse)
        self._check_experts(refuse)

    def _check_latent(self, refuse: Callable[[str, str], NoReturn]) -> None:
        """Call `refuse` for settings of latent attention that do not fit."""
        latent = self.attention == "latent"
        for name, value in (PLAIN if latent else LATENT).items():
            if getattr(self, name) != value:
                refuse(name, f"{value}, as attention = {self.attention}")
        if latent and self.n_kv_head not in (0, self.n_head):
            refuse("n_kv_head", f"0 or n_head = {self.n_head}, as attention = latent")
        if self.rope_head_dim % 2:
            refuse("rope_head_dim", "an even number")

    def _check_experts(self, refuse: Callable[[str, str], NoReturn]) -> None:
        """Call `refuse` for settings of experts that do not fit."""
        if self.mlp != "experts":
            for name in EXPERTS:
                if getattr(self, name) != getattr(GPTConfig, name):
                    refuse(name, f"{getattr(GPTConfig, name)}, unless mlp = experts")
            return
        E, used, groups = self.n_expert, self.n_expert_used, self.n_expert_group
        for name, low, high in (
            ("n_expert", 2, 1 << 16),
            ("n_expert_used", 1, E),
            ("n_expert_shared", 0, 1 << 10),
            ("n_dense", 0, self.n_layer),
            ("n_expert_group", 1, E // 2),
            ("n_group_used", -(-used * groups // max(E, 1)), groups),
            ("router_scale", 1e-6, 1e6),
            ("balance_rate", 0, 1),
            ("balance_loss", 0, 1e6),
        ):
            if not low <= getattr(self, name) <= high:
                refuse(name, f"{low} to {high}")
        if E % groups:
            refuse("n_expert", f"a multiple of n_expert_group = {groups}")
        if used == 1 and self.router_norm:
            refuse("router_norm", "false with n_expert_used = 1: a lone weight would always be 1")
        for name in ("n_embd", "expert_hidden"):
            if getattr(self, name) % 8:
                refuse(name, "a multiple of 8: grouped products take rows of whole 16 bytes")
        if self.bias:
            refuse("bias", "false: experts have none")

    def resolved(self) -> "GPTConfig":
        """The same config with every 0 that stands for a derived value replaced by that value."""
        if not self.vocab_size:
            raise ValueError("vocab_size = 0: expected the number of token ids")
        hidden = 4 * self.n_embd if self.mlp == "relu2" else -(-8 * self.n_embd // 3 // 64) * 64
        visited = self.n_expert_used + self.n_expert_shared
        share = -(-(self.n_hidden or hidden) // visited // 16) * 16 if self.mlp == "experts" else 0
        head_dim, latent = self.head_dim or self.n_embd // self.n_head, self.attention == "latent"
        rope_head_dim = self.rope_head_dim or head_dim // 2 * latent
        return replace(
            self,
            n_kv_head=self.n_kv_head or self.n_head,
            head_dim=head_dim,
            kv_rank=self.kv_rank or 4 * head_dim * latent,
            rope_head_dim=rope_head_dim,
            v_head_dim=self.v_head_dim or head_dim * latent,
            n_hidden=self.n_hidden or hidden,
            expert_hidden=self.expert_hidden or share,
            embed_std=self.embed_std or (0.02 if self.tied else 1.0),
            attn_scale=self.attn_scale or (head_dim + rope_head_dim) ** -0.5,
        )
