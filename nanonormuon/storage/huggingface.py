"""Conversion to and from Hugging Face's `config.json` and parameter names.

The default model is exactly transformers' Qwen3, or Llama without q and k norms, or DeepSeek-V3
with latent attention. Hugging Face puts the prefix `model.` on every parameter name except the
head's."""

import math
from dataclasses import asdict, replace
from typing import Any

from nanonormuon.parts.config import GPTConfig

ARCHITECTURES = {
    "qwen3": "Qwen3ForCausalLM",
    "llama": "LlamaForCausalLM",
    "deepseek_v3": "DeepseekV3ForCausalLM",
}
SIZES = {  # our name -> theirs
    "vocab_size": "vocab_size",
    "n_embd": "hidden_size",
    "n_hidden": "intermediate_size",
    "n_layer": "num_hidden_layers",
    "n_head": "num_attention_heads",
    "n_kv_head": "num_key_value_heads",
    "head_dim": "head_dim",
}
LATENT = {  # likewise, of DeepSeek-V3 alone
    "head_dim": "qk_nope_head_dim",
    "rope_head_dim": "qk_rope_head_dim",
    "v_head_dim": "v_head_dim",
    "kv_rank": "kv_lora_rank",
    "q_rank": "q_lora_rank",  # null: 0
}
# the only values of these Hugging Face fields that our model supports
FIXED = {
    "hidden_act": "silu",
    "attention_bias": False,
    "mlp_bias": False,
    "use_sliding_window": False,
    "partial_rotary_factor": 1.0,
    "quantization_config": None,
    "num_nextn_predict_layers": 0,  # DeepSeek-V3's layers that predict further tokens
}


def obstacles(config: GPTConfig) -> list[str]:
    """List the settings that none of ARCHITECTURES, and so transformers, can express."""
    plain = GPTConfig()
    names = ("mlp", "bias", "qk_gain", "rope", "embed_norm", "logit_cap")
    odd = [f"{n} = {getattr(config, n)}" for n in names if getattr(config, n) != getattr(plain, n)]
    resolved = replace(config, vocab_size=config.vocab_size or 1).resolved()
    if not math.isclose(resolved.attn_scale, (resolved.head_dim + resolved.rope_head_dim) ** -0.5):
        odd.append(f"attn_scale = {config.attn_scale}")
    if config.norm_eps == 0:
        odd.append("norm_eps = 0")
    return odd


def to_hf(name: str) -> str:
    """layers.0.mlp.up_proj.weight -> model.layers.0.mlp.up_proj.weight"""
    return name if name.startswith("lm_head.") else f"model.{name}"


def config_json(config: GPTConfig, seq_len: int, eot: int | None) -> dict[str, Any]:
    """Build config.json for a resolved config, with our own fields under "nanonormuon"."""
    ours = {"nanonormuon": asdict(config)}
    if obstacles(config):
        return {"model_type": "nanonormuon", "max_position_embeddings": seq_len, **ours}
    return {**plain_config(config, seq_len, eot), **ours}


def plain_config(
    config: GPTConfig, seq_len: int, eot: int | None, dtype: str = "float32"
) -> dict[str, Any]:
    """Build config.json as transformers writes it, for a resolved config without obstacles."""
    kind = "qwen3" if config.qk_norm else "llama"
    if config.attention == "latent":
        kind = "deepseek_v3"
    own = {
        "qwen3": {"use_sliding_window": False},
        "llama": {"mlp_bias": False},
        "deepseek_v3": {
            "rope_interleave": config.rope_interleave,
            "first_k_dense_replace": config.n_layer,
            "num_nextn_predict_layers": 0,
        },
    }
    return {
        "architectures": [ARCHITECTURES[kind]],
        "model_type": kind,
        **{theirs: getattr(config, ours) or None for ours, theirs in sizes(kind).items()},
        "hidden_act": "silu",
        "attention_bias": False,
        "attention_dropout": 0.0,
        "rms_norm_eps": config.norm_eps,
        "rope_theta": config.rope_theta,  # read by transformers 4; 5 reads rope_parameters
        "rope_parameters": {"rope_type": "default", "rope_theta": config.rope_theta},
        "max_position_embeddings": seq_len,
        "tie_word_embeddings": config.tied,
        "use_cache": True,
        "bos_token_id": eot,
        "eos_token_id": eot,
        "dtype": dtype,
        "torch_dtype": dtype,
        **own[kind],
    }


def sizes(kind: str) -> dict[str, str]:
    """Our name -> theirs, of the sizes in the config.json of a model_type."""
    return {**SIZES, **LATENT} if kind == "deepseek_v3" else SIZES


def gpt_config(content: dict[str, Any]) -> GPTConfig:
    """Parse config.json, our own or one of ARCHITECTURES. Raises ValueError listing everything in
    it that our model does not support."""
    if "nanonormuon" in content:
        try:
            return GPTConfig(**content["nanonormuon"])
        except TypeError as error:
            raise ValueError(f'section "nanonormuon" not usable: {error}') from None
    kind = content.get("model_type")
    if kind not in ARCHITECTURES:
        raise ValueError(f"model_type = {kind!r}: expected {' or '.join(ARCHITECTURES)}")
    rope = {**(content.get("rope_scaling") or {}), **(content.get("rope_parameters") or {})}
    found = {**content, "partial_rotary_factor": rope.get("partial_rotary_factor")}
    odd = [f"{k} = {found[k]!r}" for k, v in FIXED.items() if found.get(k) not in (None, v)]
    if (rope_type := rope.get("rope_type", rope.get("type", "default"))) != "default":
        odd.append(f"rope_type = {rope_type!r}")
    if "sliding_attention" in (content.get("layer_types") or []):
        odd.append("layer_types: sliding_attention")
    if kind == "deepseek_v3":
        dense, layers = (content.get(k) for k in ("first_k_dense_replace", "num_hidden_layers"))
        if type(dense) is not int or dense < (layers or 0):  # its other layers have experts
            odd.append(f"first_k_dense_replace = {dense!r}")
    numbers, optional = {}, {"num_key_value_heads", "head_dim", *({"q_lora_rank"} & content.keys())}
    for ours, theirs in sizes(kind).items():
        size = content.get(theirs)
        if size is None and theirs in optional:
            size = 128 if (kind, theirs) == ("qwen3", "head_dim") else 0  # transformers' defaults
        elif type(size) is not int or size < 1:
            odd.append(f"{theirs} = {size!r}")
        numbers[ours] = size
    if odd:
        raise ValueError(f"this {kind} model does not fit: {', '.join(odd)}")
    return GPTConfig(
        **numbers,
        tied=bool(content.get("tie_word_embeddings", False)),
        rope_theta=float(rope.get("rope_theta", content.get("rope_theta", 10_000.0))),
        norm_eps=float(content.get("rms_norm_eps", 1e-6)),
        qk_norm=kind != "llama",
        attention="latent" if kind == "deepseek_v3" else "full",
        rope_interleave=kind != "deepseek_v3" or bool(content.get("rope_interleave", True)),
    ).resolved()
