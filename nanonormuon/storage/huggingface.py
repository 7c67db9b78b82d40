"""Conversion to and from Hugging Face's `config.json` and parameter names.

The default model is exactly transformers' Qwen3, or Llama without q and k norms. Hugging Face puts
the prefix `model.` on every parameter name except the head's."""

import math
from dataclasses import asdict, replace
from typing import Any

from nanonormuon.parts.config import GPTConfig

ARCHITECTURES = {"qwen3": "Qwen3ForCausalLM", "llama": "LlamaForCausalLM"}
SIZES = {  # our name -> theirs
    "vocab_size": "vocab_size",
    "n_embd": "hidden_size",
    "n_hidden": "intermediate_size",
    "n_layer": "num_hidden_layers",
    "n_head": "num_attention_heads",
    "n_kv_head": "num_key_value_heads",
    "head_dim": "head_dim",
}
# the only values of these Hugging Face fields that our model supports
FIXED = {
    "hidden_act": "silu",
    "attention_bias": False,
    "mlp_bias": False,
    "use_sliding_window": False,
    "partial_rotary_factor": 1.0,
    "quantization_config": None,
}


def obstacles(config: GPTConfig) -> list[str]:
    """List the settings that neither Qwen3 nor Llama, and so transformers, can express."""
    plain = GPTConfig()
    names = ("mlp", "bias", "qk_gain", "rope", "embed_norm", "value_embed", "logit_cap")
    odd = [f"{n} = {getattr(config, n)}" for n in names if getattr(config, n) != getattr(plain, n)]
    resolved = replace(config, vocab_size=config.vocab_size or 1).resolved()
    if not math.isclose(resolved.attn_scale, resolved.head_dim**-0.5):
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
    return {
        "architectures": [ARCHITECTURES[kind]],
        "model_type": kind,
        **{theirs: getattr(config, ours) for ours, theirs in SIZES.items()},
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
        **({"use_sliding_window": False} if config.qk_norm else {"mlp_bias": False}),
    }


def gpt_config(content: dict[str, Any]) -> GPTConfig:
    """Parse config.json, our own or a Qwen3 or Llama model's. Raises ValueError listing everything
    in it that our model does not support."""
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
    sizes = {}
    for ours, theirs in SIZES.items():
        size = content.get(theirs)
        if size is None and theirs in ("num_key_value_heads", "head_dim"):
            size = 128 if (kind, theirs) == ("qwen3", "head_dim") else 0  # transformers' defaults
        elif type(size) is not int or size < 1:
            odd.append(f"{theirs} = {size!r}")
        sizes[ours] = size
    if odd:
        raise ValueError(f"this {kind} model does not fit: {', '.join(odd)}")
    return GPTConfig(
        **sizes,
        tied=bool(content.get("tie_word_embeddings", False)),
        rope_theta=float(rope.get("rope_theta", content.get("rope_theta", 10_000.0))),
        norm_eps=float(content.get("rms_norm_eps", 1e-6)),
        qk_norm=kind == "qwen3",
    ).resolved()
