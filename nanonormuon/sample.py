"""Text from a model, token by token, with a cache."""

from collections.abc import Iterator, Sequence
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor

from nanonormuon.errors import TokenizerError
from nanonormuon.model import GPT, Cache
from nanonormuon.text.tokenizer import Tokenizer


def prompts(setting: str) -> list[str]:
    """The prompts in train.sample_prompt, which | separates; || is a | in a prompt."""
    return [part.replace("\0", "|") for part in setting.replace("||", "\0").split("|")]


def cache_bytes(model: GPT) -> int:
    """Bytes of cache per token of a sequence."""
    numbers = sum(heads * width for b in model.layers for heads, width in b.self_attn.cached)
    return numbers * model.compute_dtype.itemsize


@torch.no_grad()
def generate(
    model: GPT,
    prompt: Tensor,
    max_tokens: int,
    temperature: float = 0.9,
    top_k: int = 0,
    top_p: float = 0.95,
    seed: int = 0,
    context: int = 1 << 30,
) -> Iterator[Tensor]:
    """Continue prompt (B, T) int64, T >= 1: yield max_tokens times the next tokens (B,) on the CPU.

    temperature 0 takes the likeliest token. top_k > 0 keeps only that many of the likeliest tokens,
    top_p the fewest of them whose probabilities add up to it. Row i is drawn on the CPU from
    `seed` + i: its text depends neither on the batch nor, given equal logits, on the device.
    context: the length of the windows that the model was trained on; once as many tokens are in
    sight, the older half is dropped.
    """
    random = [torch.Generator().manual_seed(seed + i) for i in range(len(prompt))]
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


def draw(
    logits: Tensor, temperature: float, top_k: int, top_p: float, random: Sequence[torch.Generator]
) -> Tensor:
    """Draw token ids (B,) from logits (B, vocab_size), each row with its own generator."""
    if temperature < 1e-9:  # or the division overflows
        return logits.argmax(-1)
    logits = logits / temperature
    if 0 < top_k < logits.size(-1):
        smallest = logits.topk(top_k).values[:, -1:]
        logits = logits.masked_fill(logits < smallest, -torch.inf)
    probabilities = logits.softmax(-1)
    if top_p < 1:
        ranked, order = probabilities.sort(descending=True)
        before = ranked.cumsum(-1) - ranked  # a token stays if the likelier ones do not reach top_p
        probabilities.scatter_(1, order, ranked.masked_fill(before >= top_p, 0))
    rows = zip(probabilities, random, strict=True)
    return torch.cat([torch.multinomial(row, 1, generator=own) for row, own in rows])


class Text:
    """The printable text of one sample, token by token.

    A character whose bytes are spread over tokens is returned when it is complete, and the possible
    beginning of a stop string is held back until it is ruled out. `ended`: after the end of the
    document, an id without a token (padding of the vocabulary), or a stop string (left out).
    """

    def __init__(self, tokenizer: Tokenizer, stops: Sequence[str] = ()):
        self.tokenizer, self.stops, self.ended = tokenizer, [s for s in stops if s], False
        self.stream = tokenizer.stream()
        self.held, self.tokens = "", 0

    def add(self, token: int | None) -> str:
        """What can be printed after one more token, or, if it is None, when no token follows;
        nothing once the text has ended."""
        if self.ended:
            return ""
        self.tokens += token is not None
        new = None
        if token not in (None, self.tokenizer.eot):
            with suppress(TokenizerError):
                new = self.stream.add(token)
        last = new is None
        text = self.held + (self.stream.finish() if last else new)
        found = [text.index(stop) for stop in self.stops if stop in text]
        if found or last:
            self.ended = True
            return text[: min(found, default=len(text))]
        begun = [n for stop in self.stops for n in range(1, len(stop)) if text.endswith(stop[:n])]
        keep = len(text) - max(begun, default=0)
        self.held = text[keep:]
        return text[:keep]


def write(
    model: GPT, rows: Sequence[Text], prompt: str, max_tokens: int, **settings: Any
) -> Iterator[list[str]]:
    """Continue `prompt` in all rows at once until all texts have ended; for each token, yield the
    rows' new printable pieces. settings: those of `generate`; row i has the seed `seed` + i."""
    tokenizer = rows[0].tokenizer
    ids = [tokenizer.eot, *tokenizer.encode(prompt, "the prompt")]  # as every document begins
    for row in rows:
        row.stream = tokenizer.stream(ids)
    for choices in generate(model, torch.tensor([ids] * len(rows)), max_tokens, **settings):
        yield [row.add(token) for row, token in zip(rows, choices.tolist())]
        if all(row.ended for row in rows):
            return
    yield [row.add(None) for row in rows]
