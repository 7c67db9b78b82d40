"""Conversion to and from Hugging Face's `config.json` and parameter names.

The default model is exactly transformers' Qwen3, or Llama without q and k norms. Hugging Face puts
the prefix `model.` on every parameter name except the head's."""

import ast
import math
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


# ------------------------------------------------------------------------------------------------
# Which architecture of transformers computes what model.py computes

# A small model and its answer: some logits, as transformers computes them. Every setting that is
# not named here stays as a run has it.
SMALL = {"vocab_size": 64, "n_layer": 2, "n_head": 4, "n_kv_head": 2, "n_embd": 32, "head_dim": 8,
         "n_hidden": 48, "tied": False, "rope_theta": 500.0, "norm_eps": 1e-3, "embed_std": 1.0,
         "embed_dtype": "fp32"}  # fmt: skip
ANSWERS = {
    "qwen3": (-0.51608, 0.2454, 0.43433, 0.05372, -0.24181, -0.1023),
    "llama": (-0.90476, 0.09822, 0.3635, 0.22633, -0.2564, -0.1065),
}


def small(config: GPTConfig) -> GPTConfig:
    """The settings at SMALL sizes; a 0 that stands for no number of its own stays 0."""
    config = replace(config, vocab_size=config.vocab_size or 1).resolved()
    sizes = {name: size for name, size in SMALL.items() if getattr(config, name)}
    scale = config.attn_scale * math.sqrt(config.head_dim / SMALL["head_dim"])
    return replace(config, **sizes, attn_scale=scale)


def filling(name: str, size: int) -> Tensor:
    """Numbers between -0.5 and 0.5 for a weight, equal on every machine."""
    return torch.sin(torch.arange(size).double() ** 2 + crc32(name.encode())).float() / 2


@cache
def architecture(config: GPTConfig) -> str | None:
    """The architecture of transformers that gives the logits that model.py gives for `small`
    settings, over 1,024 tokens; None if there is none.

    Computed, not known from a list: nobody's change of model.py can make it untrue.
    """
    with torch.device("meta"), suppress(Exception):  # a changed model may need other sizes
        model = GPT(config)
        with torch.device("cpu"), torch.no_grad():
            weights = {n: filling(n, p.numel()).view(p.shape) for n, p in model.named_parameters()}
            tokens = torch.arange(1024)[None] ** 2 % config.vocab_size
            found = functional_call(model, weights, (tokens,))[0, (9, 599, 1023), :2].flatten()
        for name, answer in ANSWERS.items():
            if torch.allclose(found, torch.tensor(answer, device="cpu"), rtol=0, atol=1e-4):
                return name
    return None


def obstacles(config: GPTConfig) -> list[str]:
    """List what keeps transformers' architectures from computing a model: settings, or model.py."""
    if architecture(mine := small(config)):
        return []
    plain = small(GPTConfig())
    changed = [n for n, v in asdict(mine).items() if v != getattr(plain, n)]
    odd = [n for n in changed if not architecture(replace(plain, **{n: getattr(mine, n)}))]
    return [f"{n} = {getattr(config, n)}" for n in odd] or ["model.py, as it is here"]


# ------------------------------------------------------------------------------------------------
# The model's source, beside its weights

MODELING = "modeling_nanonormuon.py"


@cache
def modeling() -> bytes:
    """The file from which transformers makes the model: model.py and what it imports of the
    package, as they lie here at the first call, in one, and storage/modeling.txt.

    Raises ConfigError for imports and equal names with which they cannot be put into one file.
    """
    package, begun, texts = Path(__file__).parents[1], set(), []
    names: Counter[str] = Counter()

    def file(module: str) -> Path:
        return package.joinpath(*module.split(".")[1:]).with_suffix(".py")

    def add(module: str) -> None:
        """Append a module's text, after the texts of those that it imports at its top."""
        if module in begun:
            return
        begun.add(module)
        text = (path := file(module)).read_text(encoding="utf-8")
        tree, lines = ast.parse(text), text.splitlines()
        imports = [n for n in ast.walk(tree) if isinstance(n, ast.Import | ast.ImportFrom)]
        imports = [n for n in imports if "nanonormuon" in ast.unparse(n)]
        for node in imports:
            names_it = isinstance(node, ast.ImportFrom) and file(node.module).is_file()
            if not names_it or any(name.asname for name in node.names):
                raise ConfigError(
                    f"{path}, line {node.lineno}: {ast.unparse(node)}: expected from nanonormuon.X "
                    f"import NAME, since {MODELING}, beside the weights, has it all in one file"
                )
            lines[node.lineno - 1 : node.end_lineno] = [""] * (node.end_lineno - node.lineno + 1)
            if node.col_offset:
                lines[node.lineno - 1] = " " * node.col_offset + "pass"
        for node in imports:
            if node in tree.body:
                add(node.module)
        names.update(n.name for n in tree.body if isinstance(n, ast.FunctionDef | ast.ClassDef))
        assigned = [t for n in tree.body if isinstance(n, ast.Assign) for t in n.targets]
        names.update(t.id for t in assigned if isinstance(t, ast.Name))
        texts.append("\n".join(lines))
        for node in imports:
            add(node.module)

    add("nanonormuon.model")
    if twice := [name for name, n in names.items() if n > 1]:
        raise ConfigError(f"{', '.join(twice)}: two of {', '.join(sorted(begun))} define it")
    texts.append(Path(__file__).with_name("modeling.txt").read_text(encoding="utf-8"))
    return "\n\n\n".join(text.strip() for text in texts).encode() + b"\n"


def to_hf(name: str) -> str:
    """layers.0.mlp.up_proj.weight -> model.layers.0.mlp.up_proj.weight"""
    return name if name.startswith("lm_head.") else f"model.{name}"


def config_json(config: GPTConfig, seq_len: int, eot: int | None) -> dict[str, Any]:
    """Build config.json for a resolved config, with our own fields under "nanonormuon"."""
    build = own_config if obstacles(config) else plain_config
    return {**build(config, seq_len, eot), "nanonormuon": asdict(config)}


def own_config(
    config: GPTConfig, seq_len: int, eot: int | None, dtype: str = "float32"
) -> dict[str, Any]:
    """Build config.json for a model that only the file `modeling` computes."""
    file = MODELING.removesuffix(".py")
    classes = {"AutoConfig": "Config", "AutoModelForCausalLM": "ForCausalLM"}
    return {
        "architectures": ["NanonormuonForCausalLM"],
        "model_type": "nanonormuon",
        "auto_map": {auto: f"{file}.Nanonormuon{name}" for auto, name in classes.items()},
        **{theirs: getattr(config, ours) for ours, theirs in SIZES.items()},
        "max_position_embeddings": seq_len,
        "tie_word_embeddings": config.tied,
        "use_cache": True,
        "bos_token_id": eot,
        "eos_token_id": eot,
        "dtype": dtype,
        "torch_dtype": dtype,
        "nanonormuon": asdict(config),
    }


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
