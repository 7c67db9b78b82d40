"""Any tokenizer.json that the `tokenizers` library loads.

Byte-level BPE (GPT-2's, Llama 3's, Qwen's) encodes any bytes reversibly. Other kinds
(SentencePiece's BPE and Unigram, WordPiece) encode only UTF-8, and their tokens have no bytes of
their own: whether a blank before a word belongs to the text depends on its context.
"""

import hashlib
import json
import logging
import re
from collections.abc import Iterable, Iterator
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from nanonormuon.errors import TokenizerError
from nanonormuon.runtime.packages import need
from nanonormuon.text.bpe import BYTES, MAX_ID, LostText, Tokenizer, gave_up, warn_once

log = logging.getLogger(__name__)

# tokens that may end a text if tokenizer_config.json names none
ENDS = "<|endoftext|>", "<|end_of_text|>", "<|eot_id|>", "<|im_end|>", "</s>", "<eos>"
ENDS += "[EOS]", "[SEP]"


class ByteLevel(Tokenizer):
    """Byte-level BPE, encoded by `tokenizers`; special tokens in a text are ordinary text."""

    foreign = True

    def __init__(self, name: str, content: dict[str, Any], end: str, library: Any) -> None:
        self.name, self.end, self.content, self._library = name, end, content, library
        self._tokens, added = vocabulary(content), content["added_tokens"]
        self.eot, self.vocab_size = self._tokens[end], max(self._tokens.values()) + 1
        self.special_ids = {self.eot, *(t["id"] for t in added if t["special"])}

    @cached_property
    def table(self) -> dict[int, bytes]:
        added = {t["id"] for t in self.content["added_tokens"]}
        return {
            i: token.encode() if i in added else bytes(BYTES[c] for c in token)
            for token, i in self._tokens.items()
        }

    @cached_property
    def hash(self) -> str:
        """sha256 (hex) of tokenizer.json's content and the end-of-text id."""
        parts = [self.content, self.eot]
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()

    def encode_text(self, text: str) -> list[int]:
        return self._library.encode_batch_fast([text], add_special_tokens=False)[0].ids

    def normalize(self, text: str) -> str:
        normalizer = self._library.normalizer
        return normalizer.normalize_str(text) if normalizer else text


class OtherKind(ByteLevel):
    """A tokenizer whose tokens can only be decoded in context."""

    byte_ids: ClassVar[dict[int, int]] = {}

    def pieces(self, text: str | bytes) -> Iterator[str | bytes]:
        """Yield the whole text, since a cut could add a blank, or, if it is not UTF-8, the text up
        to the first invalid byte and the rest."""
        text = text.encode("utf-8", "surrogatepass") if isinstance(text, str) else text
        try:
            yield text.decode()
        except UnicodeDecodeError as error:
            yield from (text[: error.start].decode(), text[error.start :])

    @cached_property
    def _marks(self) -> re.Pattern[str]:
        """Matches what decoding may add or remove: blanks and their symbol, marks of word parts,
        and two letters, because WordPiece's decoder turns "do not" into "don't"."""
        model = self.content["model"]
        marks = [model.get("continuing_subword_prefix"), model.get("end_of_word_suffix")]
        marks += ["o'"] if model.get("type") == "WordPiece" else []
        return re.compile(rf"[\s\u2581{re.escape(''.join(filter(None, marks)))}]+")

    @cached_property
    def _unknown(self) -> str:
        """The text of the token for unknown characters, or else what no text contains."""
        model = self.content["model"]
        if model.get("type") == "Unigram" and model.get("unk_id") is not None:
            return model["vocab"][model["unk_id"]][0]
        return model.get("unk_token") or "\ud800"

    def check(self, text: str, ids: np.ndarray) -> None:
        """Find the parts of the decoded text between unknown characters, in order."""
        back, at = self._library.decode(ids.tolist(), skip_special_tokens=False), 0
        whole = self._marks.sub("", self.normalize(text))
        if whole != self._marks.sub("", text):
            warn_once(f"{self}: its normalizer changes the text")
        if self._unknown in back:
            warn_once(f"{self}: it drops unknown characters")
        whole = f"\0{whole}\0"
        for part in f"\0{back}\0".split(self._unknown):
            part = self._marks.sub("", part)
            if (found := whole.find(part, at)) < 0:
                lost = LostText(whole[at:], part)
                letters = [i for i, c in enumerate(text) if not self._marks.match(c)]
                near = [*letters, len(text)][: at + lost.offset][-1]
                lost.offset = len(text[:near].encode())
                raise lost
            at = found + len(part)

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        ids = [int(i) for i in ids]
        for i in ids:
            if not 0 <= i < self.vocab_size or self._library.id_to_token(i) is None:
                raise TokenizerError(f"decode: {self.name} has no token {i}")
        return self._library.decode(ids, skip_special_tokens=False).encode()

    @cached_property
    def lengths(self) -> None:
        why = "because its tokens have no length in bytes"
        warn_once(f"tokenizer {self.name}: no bits per byte for a part of a split, {why}")


def vocabulary(content: dict[str, Any]) -> dict[str, int]:
    """Map tokens, including added ones, to ids in the content of any tokenizer.json. Raises
    LookupError, TypeError or ValueError if it is damaged."""
    tokens = content["model"]["vocab"]
    if not isinstance(tokens, dict):  # Unigram: [token, score] in order of id
        tokens = {token: i for i, (token, _) in enumerate(tokens)}
    return tokens | {t["content"]: t["id"] for t in content["added_tokens"]}


def read(content: dict[str, Any], config: dict[str, Any], path: Path) -> Tokenizer:
    """Make a tokenizer from the content of tokenizer.json and tokenizer_config.json. Raises
    TokenizerError, or LookupError, TypeError, ValueError, AttributeError if it is damaged."""
    tokenizers = need("tokenizers", f"{path}: another program's tokenizer")
    tokens, model = vocabulary(content), content["model"]
    ids = sorted(tokens.values())
    if len(set(ids)) < len(ids) or ids[0] < 0 or ids[-1] > MAX_ID:
        raise TokenizerError(f"expected unique ids from 0 to {MAX_ID}")
    if model.get("dropout"):
        raise TokenizerError(f"dropout = {model['dropout']}: encoding would be random")
    if prefix := model.get("continuing_subword_prefix"):
        # tokenizers 0.23 removes the prefix without a check and may abort the process
        pairs = [m.split(" ") if isinstance(m, str) else m for m in model.get("merges", ())]
        if not all(second.startswith(prefix) for _, second in pairs):
            raise TokenizerError(f"expected {prefix!r} at the start of each merge's second part")
    named = config.get("eos_token")
    named = named.get("content") if isinstance(named, dict) else named
    end = next((t for t in (named, *ENDS) if t in tokens), None)
    if end is None:
        added = [t["content"] for t in content["added_tokens"]][:20]
        looked_for = f"eos_token = {named!r} in tokenizer_config.json, or one of {', '.join(ENDS)}"
        raise TokenizerError(f"no token that ends a text ({looked_for}) among the added {added}")
    try:
        library = tokenizers.Tokenizer.from_str(json.dumps(content))
    except BaseException as error:
        if not gave_up(error):
            raise
        raise ValueError(f"tokenizers {tokenizers.__version__}: {error}") from None
    for token in content["added_tokens"]:
        if library.token_to_id(token["content"]) != token["id"]:
            raise ValueError(f"added token {token['content']!r} has another id in the vocabulary")
    library.no_truncation()
    library.no_padding()
    library.encode_special_tokens = True  # as ordinary text
    kind = ByteLevel if _is_byte_level(content, tokens) else OtherKind
    name = str(config.get("nanonormuon_name") or path.resolve().parent.name)
    return kind(name, content, end, library)


def _is_byte_level(content: dict[str, Any], tokens: dict[str, int]) -> bool:
    """Whether all tokens, except added ones, are bytes in the characters of CHARS."""
    model, splits = content["model"], content.get("pre_tokenizer") or {}
    last = splits.get("pretokenizers", [splits])[-1]
    added = {t["content"] for t in content["added_tokens"]}
    return (
        last.get("type") == (content.get("decoder") or {}).get("type") == "ByteLevel"
        and not last.get("add_prefix_space")
        and not model.get("continuing_subword_prefix")
        and not model.get("end_of_word_suffix")
        and tokens.keys() >= BYTES.keys() >= set("".join(tokens.keys() - added))
    )
