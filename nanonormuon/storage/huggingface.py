"""Conversion to and from Hugging Face's `config.json` and parameter names.

The default model is exactly transformers' Qwen3, or Llama without q and k norms, or DeepSeek-V3
with latent attention. With experts it is Qwen3-MoE if their scores are a softmax, else dots1, whose
attention is Qwen3's and whose experts are DeepSeek-V3's; DeepSeek-V3 itself if attention is latent.
Hugging Face puts the prefix `model.` on every parameter name except the head's, and stores stacked
experts one by one."""

import math
import re
from dataclasses import asdict, replace
from typing import Any

from nanonormuon.parts.config import GPTConfig

ARCHITECTURES = {
    "qwen3": "Qwen3ForCausalLM",
    "llama": "LlamaForCausalLM",
    "qwen3_moe": "Qwen3MoeForCausalLM",
    "dots1": "Dots1ForCausalLM",
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
OF_EXPERTS = {  # of all kinds
    "n_expert_used": "num_experts_per_tok",
    "expert_hidden": "moe_intermediate_size",
    "router_norm": "norm_topk_prob",
}
OF_DEEPSEEK = OF_EXPERTS | {
    "n_expert": "n_routed_experts",
    "n_expert_shared": "n_shared_experts",
    "n_dense": "first_k_dense_replace",
    "router_scale": "routed_scaling_factor",
    "n_expert_group": "n_group",
    "n_group_used": "topk_group",
}
EXPERTS = {
    "qwen3_moe": OF_EXPERTS | {"n_expert": "num_experts", "balance_loss": "router_aux_loss_coef"},
    "dots1": OF_DEEPSEEK,
    "deepseek_v3": OF_DEEPSEEK,
}
# settings that Qwen3-MoE has, but not the fields for; a bias moved by balance_rate is another model
QWEN3_MOE = {"router": "softmax", "balance_rate": 0.0, "n_expert_shared": 0, "router_scale": 1.0,
             "n_expert_group": 1}  # fmt: skip
# the only values of these Hugging Face fields that our model supports
FIXED = {
    "decoder_sparse_step": 1,
    "hidden_act": "silu",
    "attention_bias": False,
    "mlp_bias": False,
    "use_sliding_window": False,
    "partial_rotary_factor": 1.0,
    "quantization_config": None,
    "num_nextn_predict_layers": 0,  # DeepSeek-V3's layers that predict further tokens
    "scoring_func": "sigmoid",  # these two in DeepSeek's files alone
    "moe_layer_freq": 1,
}


def kind_of(config: GPTConfig) -> str:
    """The architecture of Hugging Face's that is the model, but for `obstacles`."""
    if config.attention == "latent":
        return "deepseek_v3"
    if config.mlp == "experts":
        return "dots1" if config.router == "sigmoid" else "qwen3_moe"
    return "qwen3" if config.qk_norm else "llama"


def obstacles(config: GPTConfig) -> list[str]:
    """List the settings that `kind_of` the model, and so transformers, cannot express."""
    kind, names = kind_of(config), ("mlp", "bias", "qk_gain", "rope", "embed_norm", "logit_cap")
    needed = {name: getattr(GPTConfig, name) for name in names}
    if config.mlp == "experts":
        needed |= {"mlp": "experts", "qk_norm": True}
        needed |= QWEN3_MOE if kind == "qwen3_moe" else {"router": "sigmoid"}
    odd = [f"{name} = {getattr(config, name)}" for name in needed
           if getattr(config, name) != needed[name]]  # fmt: skip
    if config.mlp == "experts" and kind != "qwen3_moe" and not config.n_expert_shared:
        odd.append("n_expert_shared = 0 with router = sigmoid")
    resolved = replace(config, vocab_size=config.vocab_size or 1).resolved()
    if not math.isclose(resolved.attn_scale, (resolved.head_dim + resolved.rope_head_dim) ** -0.5):
        odd.append(f"attn_scale = {config.attn_scale}")
    if config.norm_eps == 0:
        odd.append("norm_eps = 0")
    return odd


def to_hf(name: str) -> str:
    """layers.0.mlp.up_proj.weight -> model.layers.0.mlp.up_proj.weight. The "#" in the name of a
    stack of experts stands for an expert's number (storage.tensors.entries)."""
    name = re.sub(r"\.experts\.(\w+)$", r".experts.#.\1.weight", name)
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
    kind = kind_of(config)
    more: dict[str, Any] = {"mlp_bias": False} if kind == "llama" else {"use_sliding_window": False}
    if kind == "deepseek_v3":
        more = {"rope_interleave": config.rope_interleave, "num_nextn_predict_layers": 0,
                "first_k_dense_replace": config.n_layer}  # fmt: skip
    if config.mlp == "experts":
        more |= {theirs: getattr(config, ours) for ours, theirs in EXPERTS[kind].items()}
        dense = list(range(config.n_dense))
        more |= {"mlp_only_layers": dense} if kind == "qwen3_moe" else {"sliding_window": None}
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
        **more,
    }


def sizes(kind: str) -> dict[str, str]:
    """Our name -> theirs, of the sizes in the config.json of a model_type."""
    return {**SIZES, **LATENT} if kind == "deepseek_v3" else SIZES


def gpt_config(content: dict[str, Any]) -> GPTConfig:
    """Parse config.json, our own or of one of ARCHITECTURES. Raises ValueError listing everything
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
    numbers, optional = {}, {"num_key_value_heads", "head_dim", *({"q_lora_rank"} & content.keys())}
    for ours, theirs in sizes(kind).items():
        size = content.get(theirs)
        if size is None and theirs in optional:
            size = 128 if (kind, theirs) == ("qwen3", "head_dim") else 0  # transformers' defaults
        elif type(size) is not int or size < 1:
            odd.append(f"{theirs} = {size!r}")
        numbers[ours] = size
    latent, sparse = {}, kind in EXPERTS
    if kind == "deepseek_v3":
        interleave = bool(content.get("rope_interleave", True))
        latent = {"attention": "latent", "rope_interleave": interleave}
        dense, layers = (content.get(k) for k in ("first_k_dense_replace", "num_hidden_layers"))
        sparse = type(dense) is not int or type(layers) is not int or dense < layers
    experts = experts_config(kind, content, odd) if sparse else {}
    if odd:
        raise ValueError(f"this {kind} model does not fit: {', '.join(odd)}")
    return GPTConfig(
        **numbers,
        tied=bool(content.get("tie_word_embeddings", False)),
        rope_theta=float(rope.get("rope_theta", content.get("rope_theta", 10_000.0))),
        norm_eps=float(content.get("rms_norm_eps", 1e-6)),
        qk_norm=kind != "llama",
        **latent,
        **experts,
    ).resolved()


def experts_config(kind: str, content: dict[str, Any], odd: list[str]) -> dict[str, Any]:
    """Parse what config.json says of experts, and add what our model does not support to `odd`."""
    found = {"mlp": "experts", **(QWEN3_MOE if kind == "qwen3_moe" else {"router": "sigmoid"})}
    content = {"num_experts": content.get("num_local_experts"), **content}  # transformers 5's name
    absent = {"router_norm": False, "n_expert_shared": 0}  # transformers' defaults, unlike ours
    for ours, theirs in EXPERTS[kind].items():
        default = absent.get(ours, getattr(GPTConfig, ours))
        value = content.get(theirs)
        if value is None and kind != "deepseek_v3":  # whose defaults are those of 671B parameters
            value = default
        if type(value) is not type(default) and not (type(default) is float and type(value) is int):
            odd.append(f"{theirs} = {value!r}")
        found[ours] = value
    dense = content.get("mlp_only_layers") or []
    if kind == "qwen3_moe":
        found["n_dense"] = len(dense)
    if dense != list(range(len(dense))):
        odd.append(f"mlp_only_layers = {dense!r}")
    return found
