"""Byte-level BPE as other people's tokenizer.json files have it: GPT-2's, Llama 3's, Qwen's,
SmolLM's and their kind.

tiktoken does the encoding here too, so a file is accepted only where it provably gives the same ids
as `tokenizers` would; what differs is named. Ids need not follow the order of merges.
"""

import hashlib
import json
import logging
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from nanonormuon.errors import TokenizerError  # fmt: skip
from nanonormuon.text.tokenizer import BYTES, CHARS, CONFIG, EOT, FILE, GPT2, Tokenizer, merges

log = logging.getLogger(__name__)

# GPT-2's split after every digit has been taken out: white space before one is a piece as a whole
DIGITS = r"'(?:[sdmt]|ll|ve|re)|\p{N}| ?\p{L}+| ?[^\s\p{L}\p{N}]+|\s+(?=\p{N})|\s+(?!\S)|\s+"
ENDS = (EOT, "<|end_of_text|>", "<|eot_id|>", "<|im_end|>", "</s>", "<eos>")


@dataclass(frozen=True, eq=False)
class ForeignTokenizer(Tokenizer):
    """`ranks` and `special` are tiktoken's: the order of merges; `table` has the ids."""

    content: dict[str, Any] = field(repr=False)
    table: dict[int, bytes] = field(repr=False)  # id -> bytes, special tokens too
    ids: np.ndarray = field(repr=False)  # of each rank
    end: int  # the id that stands before every document

    @property
    def eot(self) -> int:
        return self.end

    @property
    def vocab_size(self) -> int:
        return max(self.table) + 1

    @cached_property
    def hash(self) -> str:
        parts = [self.content, self.end]
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()

    def encode_job(self, job: list[str | bytes | None]) -> np.ndarray:
        return self.ids[super().encode_job(job)]

    def _encode_piece(self, piece: str | bytes | None) -> np.ndarray:
        return (
            np.array([len(self.ranks)], np.uint32)
            if piece is None
            else super()._encode_piece(piece)
        )

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        try:
            return b"".join(self.table[int(i)] for i in ids)
        except KeyError as error:
            raise TokenizerError(f"decode: id {error} is none of {self.name}'s") from None

    def token_lengths(self) -> np.ndarray:
        lengths = np.zeros(self.vocab_size, np.int64)
        for token, rank in self.ranks.items():
            lengths[self.ids[rank]] = len(token)
        return lengths

    def files(self) -> dict[str, bytes]:
        end = self.table[self.end].decode()
        config = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "nanonormuon_name": self.name,
            "nanonormuon_foreign": True,
            "bos_token": end,
            "eos_token": end,
            "clean_up_tokenization_spaces": False,
            "split_special_tokens": True,
        }
        contents = {FILE: self.content, CONFIG: config}
        return {
            n: json.dumps(c, ensure_ascii=False, indent=1).encode() for n, c in contents.items()
        }


def read(content: dict[str, Any], config: dict[str, Any], path: Path) -> ForeignTokenizer:
    """A tokenizer from what a tokenizer.json and the tokenizer_config.json beside it hold. Raises
    TokenizerError with the setting that cannot be followed, LookupError and such if damaged."""

    def refuse(what: str) -> TokenizerError:
        return TokenizerError(f"{path}: {what}; only byte-level BPE can be read exactly")

    model = content["model"]
    if model.get("type") != "BPE":
        raise refuse(f'model type "{model.get("type")}"')
    for key in ("dropout", "continuing_subword_prefix", "end_of_word_suffix", "byte_fallback"):
        if model.get(key):
            raise refuse(f"{key} = {model[key]}")
    pattern = _pattern(content["pre_tokenizer"], refuse)
    if (normalizer := content.get("normalizer")) is not None:
        if normalizer.get("type") != "NFC":
            raise refuse(f"normalizer {normalizer.get('type')}")
        log.warning("%s: its NFC normalisation is left out, so that text stays as it is", path)

    added = {str(t["content"]): int(t["id"]) for t in content["added_tokens"]}
    vocab = {str(t): int(i) for t, i in model["vocab"].items() if t not in added}
    table = {i: bytes(BYTES[c] for c in t) for t, i in vocab.items()}
    table |= {i: t.encode() for t, i in added.items()}
    if len(table) != len(vocab) + len(added) or min(table) < 0 or max(table) >= 1 << 24:
        raise refuse("ids that are not unique and small")
    single = sorted((vocab[CHARS[b]], bytes([b])) for b in range(256))
    ranks = {token: i for i, (_, token) in enumerate(single)}
    listed: dict[bytes, set[tuple[bytes, bytes]]] = {}
    last = 0
    for merge in model["merges"]:
        left, right = merge.split(" ") if isinstance(merge, str) else merge
        pair = bytes(BYTES[c] for c in left), bytes(BYTES[c] for c in right)
        token = pair[0] + pair[1]
        if ranks.setdefault(token, len(ranks)) < last:
            raise refuse(f"merges that come back to {left + right!r}")
        last = ranks[token]
        listed.setdefault(token, set()).add(pair)
    for token, pair in zip(list(ranks)[256:], merges(ranks)):
        pairs = {(token[:i], token[i:]) for i in range(1, len(token))}
        every = {(a, b) for a, b in pairs if a in ranks and b in ranks}  # tiktoken's own rule
        if listed[token] not in ({pair}, every):
            raise refuse(f"a merge of {token!r} that BPE would not arrive at")
    unreachable = len(vocab) - len(ranks)
    if unreachable and model.get("ignore_merges"):
        raise refuse(f"{unreachable} tokens that no merge makes")
    named = config.get("eos_token")
    named = named.get("content") if isinstance(named, dict) else named
    end = next((added[t] for t in (named, *ENDS) if t in added), None)
    if end is None:
        raise refuse(f"no token that ends a text, like {EOT}, among {list(added)[:5]}")
    ids = np.array([vocab["".join(CHARS[b] for b in token)] for token in ranks] + [end], np.uint32)
    name = str(config.get("nanonormuon_name") or path.resolve().parent.name)
    return ForeignTokenizer(name, pattern, ranks, {EOT: len(ranks)}, content, table, ids, end)


def _pattern(pre_tokenizer: dict[str, Any], refuse: Any) -> str:
    """One regex for the split that a pre_tokenizer describes."""
    steps = pre_tokenizer.get("pretokenizers", [pre_tokenizer])
    *before, last = steps
    if last.get("type") != "ByteLevel" or last.get("add_prefix_space"):
        raise refuse("a pre_tokenizer that does not end in ByteLevel without add_prefix_space")
    own = last.get("use_regex", True)
    if own and not before:
        return GPT2
    first = before[0] if len(before) == 1 else {}
    if own and first.get("type") == "Digits" and first.get("individual_digits"):
        return DIGITS
    isolated = first.get("behavior") == "Isolated" and not first.get("invert")
    if not own and first.get("type") == "Split" and isolated:
        return str(first["pattern"]["Regex"])
    raise refuse(f"a pre_tokenizer of {', '.join(str(s.get('type')) for s in steps)}")
