"""A checkpoint as Hugging Face sees it: `config.json` and parameter names.

The default model is transformers' Qwen3 to the letter, and its modules carry Qwen3's names already,
so all that differs is the prefix `model.` on everything but the head.
"""

import math
from dataclasses import asdict, replace
from typing import Any

from nanonormuon.model import GPTConfig


def obstacles(config: GPTConfig) -> list[str]:
    """The settings that transformers' Qwen3 cannot express; empty when it can load the model."""
    plain = GPTConfig()
    names = ("mlp", "bias", "qk_gain", "rope", "embed_norm", "logit_cap")
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
    """The content of config.json, of a resolved config; our own fields are under "nanonormuon"."""
    ours = {"nanonormuon": asdict(config)}
    if obstacles(config):
        return {"model_type": "nanonormuon", "max_position_embeddings": seq_len, **ours}
    return {
        "architectures": ["Qwen3ForCausalLM"],
        "model_type": "qwen3",
        "vocab_size": config.vocab_size,
        "hidden_size": config.n_embd,
        "intermediate_size": config.n_hidden,
        "num_hidden_layers": config.n_layer,
        "num_attention_heads": config.n_head,
        "num_key_value_heads": config.n_kv_head,
        "head_dim": config.head_dim,
        "hidden_act": "silu",
        "attention_bias": False,
        "attention_dropout": 0.0,
        "rms_norm_eps": config.norm_eps,
        "rope_theta": config.rope_theta,  # transformers 4 reads this, 5 the next
        "rope_parameters": {"rope_type": "default", "rope_theta": config.rope_theta},
        "max_position_embeddings": seq_len,
        "tie_word_embeddings": config.tied,
        "use_sliding_window": False,
        "use_cache": True,
        "bos_token_id": eot,
        "eos_token_id": eot,
        "dtype": "float32",
        "torch_dtype": "float32",
        **ours,
    }


def gpt_config(content: dict[str, Any]) -> GPTConfig:
    """config.json as written above -> the model's config. Raises ValueError if it is not ours."""
    try:
        return GPTConfig(**content["nanonormuon"])
    except (KeyError, TypeError) as error:
        raise ValueError(f'config.json: no usable section "nanonormuon" ({error})') from None
