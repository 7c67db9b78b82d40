"""Text from a model: from a run directory alone, token by token, with a KV cache."""

import codecs
import json
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from nanonormuon import checkpoint, hf
from nanonormuon.model import GPT, Cache
from nanonormuon.tokenizer import Tokenizer, TokenizerError
from nanonormuon.tokenizer import load as load_tokenizer


def find_checkpoint(path: Path) -> Path:
    """A run directory -> its newest verified checkpoint; a checkpoint -> itself, verified."""
    if (path / "manifest.json").exists():
        checkpoint.verify(path)
        return path
    if not (path / "checkpoints").is_dir():
        raise checkpoint.CheckpointError(
            f"{path}: neither a run directory (it has no checkpoints/) nor a checkpoint"
        )
    return checkpoint.newest(path / "checkpoints")[0]


def load_model(path: Path, dtype: torch.dtype, device: torch.device) -> GPT:
    """The model of a verified checkpoint."""
    config = hf.gpt_config(json.loads((path / "config.json").read_text()))
    model = GPT(config, dtype)
    checkpoint.load_weights(model, path)
    return model.to(device).eval()


def context_of(path: Path) -> int:
    """Tokens that a checkpoint's model was trained to look back on."""
    return json.loads((path / "config.json").read_text())["max_position_embeddings"]


def load_run(path: Path, dtype: torch.dtype, device: torch.device) -> tuple[GPT, Tokenizer, Path]:
    """Model, tokenizer and checkpoint of a run. Raises CheckpointError for what is damaged."""
    path = find_checkpoint(path)
    if not (path / "tokenizer.json").exists():
        raise checkpoint.CheckpointError(
            f"{path}: holds no tokenizer (it was trained on shards that came without one): set "
            "data.tokenizer in the run, for instance to gpt2"
        )
    return load_model(path, dtype, device), load_tokenizer(path), path


@torch.no_grad()
def generate(
    model: GPT,
    prompt: Tensor,
    max_tokens: int,
    temperature: float = 0.8,
    top_k: int = 0,
    top_p: float = 1.0,
    seed: int = 0,
    context: int = 1 << 30,
) -> Iterator[Tensor]:
    """prompt (B, T) int64, T >= 1 -> up to max_tokens times the next tokens (B,), on the CPU.

    temperature 0 takes the likeliest token. top_k > 0 keeps so many of the likeliest tokens, top_p
    the fewest that together have that probability. The draw is made on the CPU: one seed, one text,
    on every device with the same logits. context: tokens that the model was trained to look back
    on; when they are full, the older half is forgotten.
    """
    random = torch.Generator().manual_seed(seed)
    device = model.embed_tokens.weight.device
    seen, cache, tokens = prompt, None, prompt
    size = min(context, prompt.size(1) + max_tokens)
    for _ in range(max_tokens):
        if cache is None or cache.length == size:
            tokens = seen if seen.size(1) < size else seen[:, -max(1, size // 2) :]
            cache = Cache(model, prompt.size(0), size)
        logits = model(tokens.to(device), cache=cache)[:, -1].cpu()
        choice = draw(logits, temperature, top_k, top_p, random)
        yield choice
        tokens = choice[:, None]
        seen = torch.cat([seen, tokens], 1)


def draw(logits: Tensor, temperature: float, top_k: int, top_p: float, random) -> Tensor:
    """logits (B, vocab_size) -> (B,) token ids."""
    if temperature == 0:
        return logits.argmax(-1)
    logits = logits / temperature
    if 0 < top_k < logits.size(-1):
        smallest = logits.topk(top_k).values[:, -1:]
        logits = logits.masked_fill(logits < smallest, -torch.inf)
    probabilities = logits.softmax(-1)
    if top_p < 1:
        ranked, order = probabilities.sort(descending=True)
        before = ranked.cumsum(-1) - ranked  # a token stays if those ahead of it do not suffice
        probabilities.scatter_(1, order, ranked.masked_fill(before >= top_p, 0))
    return torch.multinomial(probabilities, 1, generator=random)[:, 0]


def stream(
    model: GPT,
    tokenizer: Tokenizer,
    prompt: str,
    max_tokens: int,
    temperature: float = 0.8,
    top_k: int = 0,
    top_p: float = 1.0,
    seed: int = 0,
    context: int = 1 << 30,
) -> Iterator[str]:
    """The continuation of `prompt` in printable pieces, up to the end of the document. A character
    whose bytes are spread over tokens comes when it is complete."""
    ids = torch.tensor([[tokenizer.eot, *tokenizer.encode(prompt)]])  # as every document begins
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    for choice in generate(model, ids, max_tokens, temperature, top_k, top_p, seed, context):
        if int(choice) == tokenizer.eot:
            break
        try:
            token = tokenizer.decode_bytes([int(choice)])
        except TokenizerError:  # an id without a token: a row that pads the vocabulary
            break
        if text := decoder.decode(token):
            yield text
    if rest := decoder.decode(b"", final=True):
        yield rest
