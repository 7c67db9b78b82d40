"""Conversion to and from Hugging Face's `config.json` and parameter names.

The default model is transformers' Qwen3; Llama without q and k norms; DeepSeek-V3 with latent
attention. With experts it is Qwen3-MoE (softmax router), dots1 (sigmoid router: Qwen3's attention,
DeepSeek-V3's experts) or, with latent attention, DeepSeek-V3. Hugging Face's parameter names have
the prefix `model.`, except the head's, and stacked experts are stored one by one.
"""

import ast
import re
from collections import Counter
from contextlib import suppress
from dataclasses import asdict, replace
from functools import cache
from pathlib import Path
from typing import Any
from zlib import crc32

import torch
from torch import Tensor
from torch.func import functional_call

from nanonormuon.errors import ConfigError
from nanonormuon.model import GPT
from nanonormuon.parts.config import GPTConfig

ARCHITECTURES = {
    "qwen3": "Qwen3ForCausalLM",
    "llama": "LlamaForCausalLM",
    "qwen3_moe": "Qwen3MoeForCausalLM",
    "dots1": "Dots1ForCausalLM",
    "deepseek_v3": "DeepseekV3ForCausalLM",
}
# our setting -> the field in config.json, in its order
SIZES = {
    "vocab_size": "vocab_size",
    "n_embd": "hidden_size",
    "n_hidden": "intermediate_size",
    "n_layer": "num_hidden_layers",
    "n_head": "num_attention_heads",
    "n_kv_head": "num_key_value_heads",
    "head_dim": "head_dim",
}
LATENT = {  # for DeepSeek-V3 only
    "head_dim": "qk_nope_head_dim",
    "rope_head_dim": "qk_rope_head_dim",
    "v_head_dim": "v_head_dim",
    "kv_rank": "kv_lora_rank",
    "q_rank": "q_lora_rank",  # null: 0
}
SIZES_OF = dict.fromkeys(ARCHITECTURES, SIZES) | {"deepseek_v3": SIZES | LATENT}
OTHERS = {"tied": "tie_word_embeddings", "rope_theta": "rope_theta", "norm_eps": "rms_norm_eps"}
OF_EXPERTS = {  # for every architecture with experts
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
# Qwen3-MoE's values of settings for which it has no fields; it has no balancing biases
QWEN3_MOE = {"router": "softmax", "balance_rate": 0.0, "n_expert_shared": 0, "router_scale": 1.0,
             "n_expert_group": 1}  # fmt: skip
# the only values of these Hugging Face fields that our model supports
FIXED = {
    "decoder_sparse_step": 1,
    "hidden_act": "silu",
    **dict.fromkeys(("attention_bias", "mlp_bias", "use_sliding_window"), False),
    "rope_type": "default",
    "partial_rotary_factor": 1.0,
    "quantization_config": None,
    "num_nextn_predict_layers": 0,  # DeepSeek-V3's layers that predict further tokens
    "scoring_func": "sigmoid",  # this one and the next only in DeepSeek's files
    "moe_layer_freq": 1,
}


# ---------------------------------------------- Which architecture of transformers matches model.py

# A small model of each architecture, and some logits that transformers computes for it
SMALL = {"vocab_size": 64, "n_layer": 2, "n_head": 4, "n_kv_head": 2, "n_embd": 32, "head_dim": 8,
         "n_hidden": 48, "rope_theta": 500.0, "norm_eps": 1e-3}  # fmt: skip
SMALL_LATENT = {"attention": "latent", "n_kv_head": 4, "q_rank": 12, "kv_rank": 16,
                "rope_head_dim": 4, "v_head_dim": 8}  # fmt: skip
SMALL_EXPERTS = {"mlp": "experts", "n_expert": 4, "n_expert_used": 2, "expert_hidden": 16,
                 "n_dense": 1, "router_scale": 2.5}  # fmt: skip
SETTINGS: dict[str, dict[str, Any]] = {
    "qwen3": {},
    "llama": {"qk_norm": False},
    "qwen3_moe": SMALL_EXPERTS | QWEN3_MOE,
    "dots1": SMALL_EXPERTS,
    "deepseek_v3": SMALL_LATENT,
    "deepseek_v3 with experts": SMALL_LATENT | SMALL_EXPERTS,
}
ANSWERS = {
    "qwen3": (-0.51608, 0.2454, 0.43433, 0.05372, -0.24181, -0.1023),
    "llama": (-0.90476, 0.09822, 0.3635, 0.22633, -0.2564, -0.1065),
    "qwen3_moe": (-0.96682, 0.61163, -0.65631, 0.13579, -0.80436, -0.18817),
    "dots1": (-0.72749, 0.61369, -0.13195, -0.0061, -0.95598, -0.31335),
    "deepseek_v3": (-0.52582, 1.03921, -0.2222, 0.91118, 0.53849, 0.47541),
    "deepseek_v3 with experts": (0.81174, 2.32418, 0.48143, 2.19827, 0.00225, 0.69935),
}


def kind_of(config: GPTConfig) -> str:
    """Return the model_type that fits the model best; see `obstacles`."""
    if config.attention == "latent":
        return "deepseek_v3"
    if config.mlp == "experts":
        return "dots1" if config.router == "sigmoid" else "qwen3_moe"
    return "qwen3" if config.qk_norm else "llama"


def filling(name: str, size: int) -> Tensor:
    """Generate a weight's values, from -0.5 to 0.5, equal on every machine."""
    return torch.sin(torch.arange(size).double() ** 2 + crc32(name.encode())).float() / 2


@cache
def agrees(name: str) -> bool:
    """Whether model.py computes the logits of ANSWERS, on 1,024 tokens; not if it was changed."""
    with torch.device("meta"), suppress(Exception):  # a changed model may not run at these sizes
        model = GPT(GPTConfig(**SMALL | SETTINGS[name]).resolved())
        numbers = dict(model.named_parameters()) | dict(model.named_buffers())
        with torch.device("cpu"), torch.no_grad():
            weights = {n: filling(n, p.numel()).view(p.shape) for n, p in numbers.items()}
            tokens = torch.arange(1024)[None] ** 2 % SMALL["vocab_size"]
            found = functional_call(model, weights, (tokens,))[0, (9, 599, 1023), :2].flatten()
            return torch.allclose(found, torch.tensor(ANSWERS[name]), rtol=0, atol=1e-4)
    return False


def obstacles(config: GPTConfig) -> list[str]:
    """List the settings that get lost in transformers' config.json, or a changed model.py."""
    config, kind = replace(config, vocab_size=config.vocab_size or 1).resolved(), kind_of(config)
    read = asdict(gpt_config(exported_config(config, 1, None)))
    ignored = {"embed_std", "embed_dtype", "balance_loss"}  # of training alone
    ignored |= {"qk_gain"} if kind == "llama" else set()
    ignored |= {"balance_rate"} if config.router == "sigmoid" else set()
    odd = [n for n, value in asdict(config).items() if n not in ignored and value != read[n]]
    if config.mlp == "experts" and kind != "qwen3_moe" and not config.n_expert_shared:
        odd.append("n_expert_shared")
    both = kind == "deepseek_v3" and config.mlp == "experts"
    if not odd and not agrees(f"{kind} with experts" if both else kind):
        return ["a changed model.py"]
    return [f"{name} = {getattr(config, name)}" for name in odd]


# ----------------------------------------------------------- The model's source, beside its weights

MODELING = "modeling_nanonormuon.py"
# indent and module of an import from this package
NAMES = r"\w+(?:, \w+)*|\((?:\s*\w+,)+\s*\w*\s*\)"
IMPORT = rf"^( *)from (nanonormuon\.[\w.]+) import (?:{NAMES})(?: *#.*)?$"


@cache
def modeling() -> bytes:
    """Build the file from which transformers loads the model: model.py, the package's files that it
    imports, and storage/modeling.txt, joined.

    Raises ConfigError if imports or names prevent joining them.
    """
    package = Path(__file__).parents[1]
    begun: list[str] = []
    texts: list[str] = []

    def add(module: str) -> None:
        """Append a module's text, after the modules that it imports at its top."""
        if module in begun:
            return
        begun.append(module)
        path = package.joinpath(*module.split(".")[1:]).with_suffix(".py")
        expected = f"expected from nanonormuon.FILE import NAME: {MODELING} joins the model's files"
        if not path.is_file():
            raise ConfigError(f"{path}: no such file; {expected}")
        text = path.read_text(encoding="utf-8")
        imports = re.findall(IMPORT, text, re.MULTILINE)
        for indent, name in imports:
            if not indent:
                add(name)
        # a function needs a statement
        text = re.sub(IMPORT, lambda m: m[1] and m[1] + "pass", text, flags=re.MULTILINE)
        if other := re.search(r"^ *(from|import) nanonormuon.*", text, re.MULTILINE):
            raise ConfigError(f"{path}: {other[0].strip()}: {expected}")
        # its own operators: a second registration would replace this package's
        texts.append(text.replace('"nanonormuon::', '"nanonormuon_source::').strip())
        for _, name in imports:
            add(name)

    add("nanonormuon.model")
    body = ast.parse("\n".join(texts)).body
    names = Counter(n.name for n in body if isinstance(n, ast.FunctionDef | ast.ClassDef))
    assigned = [t for n in body if isinstance(n, ast.Assign) for t in n.targets]
    names.update(t.id for t in assigned if isinstance(t, ast.Name))
    if twice := [name for name, n in names.items() if n > 1]:
        raise ConfigError(f"{', '.join(twice)}: defined twice in {', '.join(sorted(begun))}")
    texts.append(Path(__file__).with_name("modeling.txt").read_text(encoding="utf-8").strip())
    return "\n\n\n".join(texts).encode() + b"\n"


def to_hf(name: str) -> str:
    """Translate a parameter's name. "#" is the index in a stack of experts (tensors.entries)."""
    name = re.sub(r"\.experts\.(\w+)$", r".experts.#.\1.weight", name)
    return name if name.startswith("lm_head.") else f"model.{name}"


def carried(config: GPTConfig) -> bool:
    """Whether checkpoints contain the model's source because transformers lacks its architecture.
    Not with experts: the source cannot read experts that are stored one by one."""
    return bool(obstacles(config)) and config.mlp != "experts"


def config_json(config: GPTConfig, seq_len: int, eot: int | None) -> dict[str, Any]:
    """Build a checkpoint's config.json for a resolved config, which it holds as "nanonormuon"."""
    if (own := carried(config)) or not obstacles(config):
        content = exported_config(config, seq_len, eot, own)
    else:
        content = {"model_type": "nanonormuon", "max_position_embeddings": seq_len}
    return content | {"nanonormuon": asdict(config)}


def exported_config(
    config: GPTConfig, seq_len: int, eot: int | None, own: bool = False, dtype: str = "float32"
) -> dict[str, Any]:
    """Build config.json for a resolved config: as transformers does, without the settings in
    `obstacles`, or, if `own`, for the model's source (`modeling`)."""
    usage = {
        "max_position_embeddings": seq_len,
        "tie_word_embeddings": config.tied,
        "use_cache": True,
        **dict.fromkeys(("bos_token_id", "eos_token_id"), eot),
        **dict.fromkeys(("dtype", "torch_dtype"), dtype),
    }
    if own:
        file = MODELING.removesuffix(".py")
        classes = {"AutoConfig": "Config", "AutoModelForCausalLM": "ForCausalLM"}
        return {
            "architectures": ["NanonormuonForCausalLM"],
            "model_type": "nanonormuon",
            "auto_map": {auto: f"{file}.Nanonormuon{name}" for auto, name in classes.items()},
            **{theirs: getattr(config, ours) for ours, theirs in SIZES.items()},
            **usage,
            "nanonormuon": asdict(config),
        }
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
        **{theirs: getattr(config, ours) or None for ours, theirs in SIZES_OF[kind].items()},
        "hidden_act": "silu",
        "attention_bias": False,
        "attention_dropout": 0.0,
        "rms_norm_eps": config.norm_eps or None,  # 0 is the dtype's, in torch
        "rope_theta": config.rope_theta,  # for transformers 4; version 5 reads rope_parameters
        "rope_parameters": {"rope_type": "default", "rope_theta": config.rope_theta},
        **usage,
        **more,
    }


def gpt_config(content: dict[str, Any]) -> GPTConfig:
    """Parse config.json, our own or of ARCHITECTURES. Raises ValueError listing what we lack."""
    if "nanonormuon" in content:
        try:
            return GPTConfig(**content["nanonormuon"]).resolved()
        except TypeError as error:
            raise ValueError(f'invalid section "nanonormuon": {error}') from None
    kind = content.get("model_type")
    if kind not in ARCHITECTURES:
        raise ValueError(f"model_type = {kind!r}: expected {' or '.join(ARCHITECTURES)}")
    rope = {**(content.get("rope_scaling") or {}), **(content.get("rope_parameters") or {})}
    found = {"num_experts": content.get("num_local_experts"), **content, **rope}  # transformers 5's
    found["rope_type"] = rope.get("rope_type", rope.get("type"))
    odd = [f"{k} = {found[k]!r}" for k, v in FIXED.items() if found.get(k) not in (None, v)]
    if "sliding_attention" in (found.get("layer_types") or []):
        odd.append("layer_types: sliding_attention")
    fields, sparse = SIZES_OF[kind] | OTHERS, kind in EXPERTS
    # transformers' defaults are ours, but for these
    absent = {name: getattr(GPTConfig, name) for name in (*OTHERS, "n_kv_head", "rope_interleave")}
    absent["head_dim"] = 128 if kind == "qwen3" else 0
    if kind in ("qwen3_moe", "dots1"):  # DeepSeek-V3's are those of its largest model
        sizes = ("n_expert", "n_expert_used", "expert_hidden")  # which no file leaves out
        absent |= {name: getattr(GPTConfig, name) for name in EXPERTS[kind] if name not in sizes}
        absent |= {"router_norm": False, "n_expert_shared": 0}
    settings: dict[str, Any] = {"qk_norm": kind != "llama"}
    if kind == "deepseek_v3":
        settings["attention"], fields["rope_interleave"] = "latent", "rope_interleave"
        dense, layers = found.get("first_k_dense_replace"), found.get("num_hidden_layers")
        sparse = type(dense) is not int or type(layers) is not int or dense < layers
        if "q_lora_rank" in found:
            found["q_lora_rank"] = found["q_lora_rank"] or 0
    if sparse:
        fields |= EXPERTS[kind]
        settings["mlp"] = "experts"
    if kind == "qwen3_moe":
        dense = found.get("mlp_only_layers") or []
        settings |= QWEN3_MOE | {"n_dense": len(dense)}
        if dense != list(range(len(dense))):
            odd.append(f"mlp_only_layers = {dense!r}")
    for ours, theirs in fields.items():
        value, expected = found.get(theirs), type(getattr(GPTConfig, ours))
        value = absent.get(ours) if value is None else value
        if type(value) not in ((float, int) if expected is float else (expected,)):
            odd.append(f"{theirs} = {value!r}")
        else:
            settings[ours] = expected(value)
    if odd:
        raise ValueError(f"not supported in a {kind} model: {', '.join(odd)}")
    return GPTConfig(**settings).resolved()
