"""The model's settings. Imports nothing but the standard library."""

from dataclasses import dataclass, replace
from typing import NoReturn

CHOICES = {
    "attention": ("full", "latent"),
    "mlp": ("swiglu", "relu2", "experts"),
    "rope": ("full", "half"),
    "router": ("sigmoid", "softmax"),
    "embed_dtype": ("fp32", "bf16"),
}
EXPERTS = ("n_expert", "n_expert_used", "n_expert_shared", "expert_hidden", "n_dense", "router",
           "router_norm", "router_scale", "n_expert_group", "n_group_used", "balance_rate",
           "balance_loss")  # fmt: skip
# values that full attention requires of latent attention's settings, and those that latent
# attention requires: it normalises the latents instead of q and k, always with gains
LATENT = {"q_rank": 0, "kv_rank": 0, "rope_head_dim": 0, "v_head_dim": 0, "rope_interleave": True}
PLAIN = {"qk_norm": True, "qk_gain": True, "bias": False, "value_embed": False,
         "key_shift": False}  # fmt: skip


@dataclass(frozen=True)
class GPTConfig:
    """The model's settings; 0 stands for a value that the comment derives."""

    vocab_size: int = 0  # rows of embedding and head; 0: the data's, rounded up to a multiple of 64
    n_layer: int = 12  # number of blocks
    n_head: int = 12  # query heads
    n_kv_head: int = 0  # key and value heads; 0: n_head
    n_embd: int = 768  # width of the residual stream
    head_dim: int = 0  # width of a head (latent attention: its part without RoPE); 0: n_embd/n_head
    n_hidden: int = 0  # width of the MLP; 0: 4 n_embd if relu2, else 8/3 n_embd rounded up to 64s
    tied: bool = False  # the head shares the embedding's weights
    rope_theta: float = 10_000.0  # base of RoPE's wavelengths
    norm_eps: float = 1e-6  # epsilon of the RMSNorms; 0: float32's, torch's default
    embed_std: float = 0.0  # standard deviation of the initial embedding; 0: 1 untied, 0.02 tied
    attention: str = "full"  # full | latent (DeepSeek-V3's)
    q_rank: int = 0  # latent attention: width of the queries' latent; 0: no such latent
    kv_rank: int = 0  # latent attention: width of the keys' and values' latent; 0: 4 head_dim
    rope_head_dim: int = 0  # latent attention: width of a head's part with RoPE; 0: head_dim / 2
    v_head_dim: int = 0  # latent attention: width of a value; 0: head_dim
    rope_interleave: bool = True  # latent attention: RoPE pairs neighbours; false: the two halves
    # departures from Qwen3
    mlp: str = "swiglu"  # swiglu | relu2 (squared ReLU, no gate) | experts (a mixture of SwiGLUs)
    bias: bool = False  # biases in every linear layer, including the head
    qk_norm: bool = True  # normalise q and k per head; false: as Llama
    qk_gain: bool = True  # learnable gains in the norms of q and k
    rope: str = "full"  # full | half (modded-nanogpt: half of the pairs are not rotated)
    attn_scale: float = 0.0  # factor on attention logits; 0: 1 / sqrt(head_dim + rope_head_dim)
    embed_norm: bool = False  # an RMSNorm after the embedding
    value_embed: bool = False  # every second layer adds a learnt vector per token to its values
    bigram_embed: int = 0  # rows of a table of learnt vectors for pairs of tokens (hashed); 0: none
    key_shift: bool = False  # half of the key heads show a token the key of the one before it
    logit_cap: float = 0.0  # c > 0: soft cap on the logits, c x / sqrt(x^2 + c^2); 0: none
    embed_dtype: str = "fp32"  # fp32 | bf16: dtype of the embedding and its optimizer state
    # with mlp = "experts"
    n_expert: int = 0  # experts per layer
    n_expert_used: int = 0  # experts that the router chooses for each token
    n_expert_shared: int = 1  # further experts, used by every token
    expert_hidden: int = 0  # width of an expert; 0: n_hidden / experts used, rounded up to 16s
    n_dense: int = 0  # first layers, which have a single MLP instead of experts
    router: str = "sigmoid"  # sigmoid | softmax: how router logits become an expert's scores
    router_norm: bool = True  # normalise the scores of a token's experts to sum to 1
    router_scale: float = 1.0  # factor on the weights of a token's experts
    n_expert_group: int = 1  # equal groups into which the experts are divided (DeepSeek-V3)
    n_group_used: int = 1  # groups from which a token's experts may come
    balance_rate: float = 0.001  # step size of the routers' balancing biases; 0: no biases
    balance_loss: float = 0.0  # weight of the auxiliary load-balancing loss

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            least = 1 if name in ("n_layer", "n_head", "n_embd") else 0
            if name in CHOICES:
                if value not in CHOICES[name]:
                    self._refuse(name, " or ".join(CHOICES[name]))
            elif value < least and name != "attn_scale":
                self._refuse(name, "at least 1" if least else "0 or more")
        head_dim = self.head_dim or self.n_embd // self.n_head
        if self.head_dim == 0 and self.n_embd % self.n_head:
            most = min(self.n_head, self.n_embd)
            near = max(n for n in range(1, most + 1) if self.n_embd % n == 0)
            hint = f"set n_head = {near}, or set head_dim"
            self._refuse("n_embd", f"a multiple of n_head = {self.n_head}: {hint}")
        if not self.rope_theta:
            self._refuse("rope_theta", "more than 0")
        if self.key_shift and (self.n_kv_head or self.n_head) < 2:
            expected = "false with a single key head: none would be left without a shift"
            self._refuse("key_shift", expected)
        if head_dim % 4:
            raise ValueError(f"head_dim = {head_dim}: expected a multiple of 4")
        if self.n_kv_head and self.n_head % self.n_kv_head:
            self._refuse("n_head", f"a multiple of n_kv_head = {self.n_kv_head}")
        if self.tied and self.embed_dtype != "fp32":
            self._refuse("embed_dtype", "fp32 with tied = true")
        self._check_latent()
        self._check_experts()

    def _refuse(self, name: str, expected: str) -> NoReturn:
        raise ValueError(f"{name} = {getattr(self, name)}: expected {expected}")

    def _check_latent(self) -> None:
        latent = self.attention == "latent"
        for name, value in (PLAIN if latent else LATENT).items():
            if getattr(self, name) != value:
                self._refuse(name, f"{value} with attention = {self.attention}")
        if latent and self.n_kv_head not in (0, self.n_head):
            self._refuse("n_kv_head", f"0 or n_head = {self.n_head} with attention = latent")
        if self.rope_head_dim % 2:
            self._refuse("rope_head_dim", "an even number")

    def _check_experts(self) -> None:
        if self.mlp != "experts":
            for name in EXPERTS:
                if getattr(self, name) != getattr(GPTConfig, name):
                    self._refuse(name, f"{getattr(GPTConfig, name)}, unless mlp = experts")
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
                self._refuse(name, f"{low} to {high}")
        if E % groups:
            self._refuse("n_expert", f"a multiple of n_expert_group = {groups}")
        if used == 1 and self.router_norm:
            self._refuse("router_norm", "false with n_expert_used = 1, whose weight it makes 1")
        for name in ("n_embd", "expert_hidden"):
            if getattr(self, name) % 8:
                self._refuse(name, "a multiple of 8: grouped matmuls need rows aligned to 16 bytes")
        if self.bias:
            self._refuse("bias", "false with mlp = experts")

    def resolved(self) -> "GPTConfig":
        """Replace every 0 that stands for a derived value by the value."""
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
