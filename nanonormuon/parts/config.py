"""The model's settings: what model.py builds. Imports nothing but the standard library."""

from dataclasses import dataclass, replace
from typing import NoReturn


@dataclass(frozen=True)
class GPTConfig:
    """The model's knobs; a 0 stands for the value its comment derives."""

    vocab_size: int = 0  # rows of embedding and head; 0: the data's, rounded up to a multiple of 64
    n_layer: int = 12
    n_head: int = 12  # query heads
    n_kv_head: int = 0  # key and value heads; 0: n_head
    n_embd: int = 768  # width of the residual stream
    head_dim: int = 0  # 0: n_embd / n_head
    n_hidden: int = 0  # width of the MLP; 0: 8/3 n_embd up to a multiple of 64; relu2: 4 n_embd
    tied: bool = False  # head = embedding
    rope_theta: float = 10_000.0
    norm_eps: float = 1e-6  # 0: float32's epsilon, torch's default in bfloat16 too
    embed_std: float = 0.0  # of the initial embedding; 0: 1 untied, 0.02 tied
    # departures from Qwen3
    mlp: str = "swiglu"  # swiglu | relu2 (two matrices around a squared ReLU)
    bias: bool = False  # in every linear layer, the head too
    qk_norm: bool = True  # false: q and k are not normalised (Llama)
    qk_gain: bool = True  # gains in the norms of q and k
    rope: str = "full"  # full | half (half of the pairs do not turn; modded-nanogpt's frequencies)
    attn_scale: float = 0.0  # 0: 1 / sqrt(head_dim)
    embed_norm: bool = False  # an RMSNorm after the embedding
    value_embed: bool = False  # every 2nd layer adds a vector per token to its values
    logit_cap: float = 0.0  # c > 0: logits become c x / sqrt(x^2 + c^2)
    embed_dtype: str = "fp32"  # fp32 | bf16: how the embedding rests, and AdamW's averages for it

    def __post_init__(self) -> None:
        def refuse(name: str, expected: str) -> NoReturn:
            raise ValueError(f"{name} = {getattr(self, name)}: expected {expected}")

        for name in ("n_layer", "n_head", "n_embd"):
            if getattr(self, name) < 1:
                refuse(name, "at least 1")
        for name in ("vocab_size", "n_kv_head", "head_dim", "n_hidden", "norm_eps", "embed_std"):
            if getattr(self, name) < 0:
                refuse(name, "0 or more")
        for name, choices in (("mlp", ("swiglu", "relu2")), ("rope", ("full", "half"))):
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

    def resolved(self) -> "GPTConfig":
        """The same config with every 0 that stands for a derived value replaced by that value."""
        if not self.vocab_size:
            raise ValueError("vocab_size = 0: expected the number of token ids")
        hidden = 4 * self.n_embd if self.mlp == "relu2" else -(-8 * self.n_embd // 3 // 64) * 64
        return replace(
            self,
            n_kv_head=self.n_kv_head or self.n_head,
            head_dim=self.head_dim or self.n_embd // self.n_head,
            n_hidden=self.n_hidden or hidden,
            embed_std=self.embed_std or (0.02 if self.tied else 1.0),
            attn_scale=self.attn_scale or (self.head_dim or self.n_embd // self.n_head) ** -0.5,
        )
