"""Text to token ids and back: bytes, the published tiktoken encodings, or BPE trained on your text.

All of them are the same thing, byte-level BPE: a regex splits the text, and within each piece the
adjacent pair whose union has the lowest id is merged until none is left. So a tokenizer here is a
pattern and a table bytes -> id. tiktoken does the encoding, rustbpe the training, and the one form
on disk is a Hugging Face `tokenizer.json`, which transformers, vLLM and llama.cpp read as it is.
"""

import base64
import difflib
import hashlib
import json
import logging
import os
import re
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from nanonormuon.errors import TokenizerError
from nanonormuon.storage.files import replace_file

log = logging.getLogger(__name__)

EOT = "<|endoftext|>"
FILE, CONFIG = "tokenizer.json", "tokenizer_config.json"
MAX_IDS = 9_999_999  # of a trained vocabulary

# The split for trained vocabularies follows GPT-4's: contractions, words with one leading sign,
# numbers, runs of signs, line ends, spaces. Numbers go by two digits, because a small vocabulary
# has better uses for a thousand ids than three-digit numbers. Every pattern of this file does
# without possessive quantifiers and, in our own, without (?i:...): tiktoken's regex engine and the
# one of Hugging Face tokenizers understand `{1,3}+` and the case folding of U+017F differently.
PATTERN = (
    r"'(?:[sdmtSDMT]|[lL][lL]|[vV][eE]|[rR][eE])|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,2}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
GPT2 = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
CL100K = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s+\z|\s*[\r\n]|\s+(?!\S)|\s"
)
O200K = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)

# The published encodings: address, sha256 of the file there, pattern, id of <|endoftext|>.
HOST = "https://openaipublic.blob.core.windows.net/"
PUBLISHED = {
    "gpt2": (
        HOST + "gpt-2/encodings/main/vocab.bpe",
        "1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5",
        GPT2,
        50256,
    ),
    "cl100k_base": (
        HOST + "encodings/cl100k_base.tiktoken",
        "223921b76ee99bde995b7ff738513eef100fb51d18c93597a113bcffe865b2a7",
        CL100K,
        100257,
    ),
    "o200k_base": (
        HOST + "encodings/o200k_base.tiktoken",
        "446a9538cb6c348e3516120d7c08b09f57c36495e2acfffe59a5bf8b0cfb1a2d",
        O200K,
        199999,
    ),
}

# JSON cannot hold bytes, so byte-level BPE files write byte b as the character CHARS[b]: itself
# where it is printable Latin-1, else one from U+0100 on. GPT-2 also numbers its bytes that way.
_PRINTABLE = [*range(33, 127), *range(161, 173), *range(174, 256)]
_BYTE_ORDER = _PRINTABLE + [b for b in range(256) if b not in _PRINTABLE]
CHARS = {
    b: chr(b) if i < len(_PRINTABLE) else chr(256 + i - 188) for i, b in enumerate(_BYTE_ORDER)
}
BYTES = {c: b for b, c in CHARS.items()}

# Long texts are cut where every pattern above has a boundary anyway (after a line that ends in a
# visible character, before one that starts with neither space nor slash), so that one huge file
# uses all cores and little memory. Runs of PIECE white-space characters are cut as well: tiktoken's
# regex engine overflows its stack on a million of them.
PIECE = 65_536
_CUT = re.compile(rf"(?<=\S\n)(?=[^\s/])|(?<=\s{{{PIECE}}})(?=\s)")
_SURROGATES = re.compile("([\ud800-\udfff]+)")


@dataclass(frozen=True, eq=False)
class Tokenizer:
    """A byte-level BPE vocabulary.

    `ranks` gives every token's id, which is also its merge priority: the 256 single bytes have the
    ids 0..255 in some order, merged tokens follow without a hole. `special` holds <|endoftext|>
    alone, which `encode` never produces: in a text it is thirteen ordinary characters.
    """

    name: str
    pattern: str
    ranks: dict[bytes, int] = field(repr=False)
    special: dict[str, int]

    def __post_init__(self) -> None:
        if sorted(self.ranks.values()) != list(range(len(self.ranks))):
            raise TokenizerError(f"tokenizer {self.name}: token ids are not 0..n-1, each once")
        if {t for t, i in self.ranks.items() if i < 256} != {bytes([b]) for b in range(256)}:
            raise TokenizerError(f"tokenizer {self.name}: ids 0..255 are not the 256 single bytes")
        if set(self.special) != {EOT} or self.special[EOT] < len(self.ranks):
            raise TokenizerError(f"tokenizer {self.name}: {EOT} is missing or has a token's id")

    @property
    def eot(self) -> int:
        """Id of <|endoftext|>, which stands before every document."""
        return self.special[EOT]

    @property
    def vocab_size(self) -> int:
        """One more than the largest id."""
        return self.eot + 1

    @cached_property
    def hash(self) -> str:
        """sha256 (hex) of what decides the ids: pattern, table, special tokens; not the name."""
        table = sorted((i, token.hex()) for token, i in self.ranks.items())
        return hashlib.sha256(json.dumps([self.pattern, table, self.special]).encode()).hexdigest()

    @cached_property
    def _encoding(self) -> Any:
        import tiktoken

        return tiktoken.Encoding(
            self.name, pat_str=self.pattern, mergeable_ranks=self.ranks, special_tokens=self.special
        )

    def encode(self, text: str | bytes) -> list[int]:
        """Ids of a text; `decode_bytes` gives its bytes back exactly, whatever they are.

        Bytes that are not UTF-8 become single-byte tokens. A lone surrogate in a `str` stands for
        its three bytes in Python's "surrogatepass" encoding, which are not UTF-8 either.
        """
        return self.encode_job(list(pieces(text))).tolist()

    def encode_job(self, job: list[str | bytes | None]) -> np.ndarray:
        """Ids (n,) uint32 of what `pieces` gives, one after the other; None stands for
        <|endoftext|>. tiktoken lets other threads run meanwhile."""
        parts = [np.zeros(0, np.uint32), *map(self._encode_piece, job)]
        return np.concatenate(parts)

    def _encode_piece(self, piece: str | bytes | None) -> np.ndarray:
        if piece is None:
            return np.array([self.eot], np.uint32)
        if self._is_bytes:
            return np.frombuffer(_bytes(piece), np.uint8).astype(np.uint32)
        if isinstance(piece, bytes):
            return np.array([self.ranks[bytes([b])] for b in piece], np.uint32)
        return self._encoding.encode_to_numpy(piece, disallowed_special=())

    @cached_property
    def _is_bytes(self) -> bool:
        return len(self.ranks) == 256 and all(self.ranks[bytes([b])] == b for b in range(256))

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        """The bytes that `ids` stand for. Raises TokenizerError for an id that no token has."""
        ids = [int(i) for i in ids]
        try:
            return self._encoding.decode_bytes(ids)
        except (KeyError, OverflowError) as error:
            raise TokenizerError(
                f"decode: {error}; {self.name} has ids 0..{len(self.ranks) - 1} and {self.eot}"
            ) from None

    def decode(self, ids: Iterable[int]) -> str:
        """The text that `ids` stand for, with U+FFFD where their bytes are not UTF-8."""
        return self.decode_bytes(ids).decode("utf-8", errors="replace")

    def token_lengths(self) -> np.ndarray:
        """Bytes of text behind each id (vocab_size,); 0 for <|endoftext|>, which is no text."""
        lengths = np.zeros(self.vocab_size, np.int64)
        for token, i in self.ranks.items():
            lengths[i] = len(token)
        return lengths

    def files(self) -> dict[str, bytes]:
        """tokenizer.json and tokenizer_config.json, the same bytes every time."""
        config = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "nanonormuon_name": self.name,
            "bos_token": EOT,
            "eos_token": EOT,
            "add_bos_token": False,
            "add_eos_token": False,
            "clean_up_tokenization_spaces": False,
            "split_special_tokens": True,
        }
        contents = {FILE: _to_json(self), CONFIG: config}
        return {
            n: json.dumps(c, ensure_ascii=False, indent=1).encode() for n, c in contents.items()
        }

    def save(self, directory: str | Path) -> None:
        """Write tokenizer.json and tokenizer_config.json."""
        Path(directory).mkdir(parents=True, exist_ok=True)
        for name, content in self.files().items():
            replace_file(Path(directory, name), content)


def get(spec: str | Path, texts: Iterable[str | bytes] | None = None) -> Tokenizer:
    """The tokenizer that `spec` names.

    `byte`; `gpt2`, `cl100k_base`, `o200k_base` (from tiktoken's cache directory, never from the
    network); `bpe:N`, trained on `texts` to N ids in all; or the path of a saved one.
    """
    spec = str(spec)
    if spec == "byte":
        return Tokenizer("byte", PATTERN, {bytes([b]): b for b in range(256)}, {EOT: 256})
    if spec in PUBLISHED:
        return _from_cache(spec)
    if size := trained_size(spec):
        return _train(size, texts)
    if Path(spec).exists():
        return load(spec)
    near = difflib.get_close_matches(spec, ["byte", *PUBLISHED, "bpe:4096"], 1, cutoff=0.4)
    raise TokenizerError(
        f"tokenizer {spec!r}: neither byte, {', '.join(PUBLISHED)}, bpe:N nor an existing path"
        + (f"; did you mean {near[0]}?" if near else "")
    )


def trained_size(spec: str | Path) -> int | None:
    """N if `spec` is bpe:N, else None. Raises TokenizerError for an N that cannot be."""
    if not (match := re.fullmatch("bpe:([0-9]+)", str(spec))):
        return None
    if len(match[1]) > len(str(MAX_IDS)) or not 257 <= int(match[1]) <= MAX_IDS:
        raise TokenizerError(
            f"tokenizer {spec}: needs at least 257 ids, 256 bytes + {EOT}, and at most {MAX_IDS}"
        )
    return int(match[1])


def load(path: str | Path) -> Tokenizer:
    """Read a tokenizer: a tokenizer.json or the directory that holds it, or a published vocabulary
    file (vocab.bpe, *.tiktoken), known by its sha256.

    What `Tokenizer.save` wrote must equal what it would write for the table in it, so a flipped
    letter anywhere in it is refused with TokenizerError; for others see foreign.py.
    """
    path = Path(path, FILE) if Path(path).is_dir() else Path(path)
    try:
        data = path.read_bytes()
        found = hashlib.sha256(data).hexdigest()
        for name, (_, sha256, _, _) in PUBLISHED.items():
            if found == sha256:
                return _published(name, data)
        content, file = json.loads(data), path.with_name(CONFIG)
        config = json.loads(file.read_bytes()) if file.exists() else {}
        ours = "nanonormuon_name" in config and "nanonormuon_foreign" not in config
        if not ours and not _is_ours(content):
            from nanonormuon.text import huggingface as foreign

            return foreign.read(content, config, path)
        (eot,) = (t["id"] for t in content["added_tokens"])
        pattern = content["pre_tokenizer"]["pretokenizers"][0]["pattern"]["Regex"]
        vocab = content["model"]["vocab"]
        ranks = {bytes(BYTES[c] for c in t): i for t, i in vocab.items() if t != EOT}
        name = config.get("nanonormuon_name", "custom")
        tokenizer = Tokenizer(str(name), str(pattern), ranks, {EOT: eot})
        same = _to_json(tokenizer) == content
    except FileNotFoundError:
        raise TokenizerError(f"{path}: no such file; expected a saved {FILE}") from None
    except (LookupError, TypeError, ValueError, AttributeError, RecursionError) as error:
        if isinstance(error, TokenizerError) and str(path) in str(error):
            raise
        raise TokenizerError(
            f"{path}: damaged, or not byte-level BPE ({type(error).__name__}: {str(error)[:200]})"
        ) from None
    if not same:
        raise TokenizerError(
            f"{path}: merges, ids or settings differ from what its vocabulary says"
        )
    return tokenizer


def _is_ours(content: Any) -> bool:
    """Whether a tokenizer.json without its tokenizer_config.json has the form that we write."""
    steps = content["pre_tokenizer"].get("pretokenizers", [{}])
    known = (PATTERN, GPT2, CL100K, O200K)
    return [t["content"] for t in content["added_tokens"]] == [EOT] and (
        steps[0].get("pattern", {}).get("Regex") in known
    )


def pieces(text: str | bytes) -> Iterator[str | bytes]:
    """Cut a text so that encoding piece by piece gives the ids of the whole.

    Yields `str` (valid Unicode, about PIECE characters) and, where the text is not UTF-8, `bytes`
    to be encoded one by one. Only runs of more than PIECE white-space characters are affected.
    """
    if isinstance(text, str) and (text.isascii() or not _SURROGATES.search(text)):
        parts = [text]
    else:
        # "surrogateescape" turns byte b >= 128 that is not UTF-8 into U+DC00 + b and nothing else.
        parts = _SURROGATES.split(_bytes(text).decode("utf-8", "surrogateescape"))
    for i, part in enumerate(parts):
        if i % 2:
            yield part.encode("utf-8", "surrogateescape")
            continue
        start = 0
        while len(part) - start > PIECE and (cut := _CUT.search(part, start + PIECE)):
            yield part[start : cut.start()]
            start = cut.start()
        if start < len(part):
            yield part[start:]


def _bytes(text: str | bytes) -> bytes:
    return text.encode("utf-8", "surrogatepass") if isinstance(text, str) else bytes(text)


def _from_cache(name: str) -> Tokenizer:
    """Build a published encoding from tiktoken's cache file.

    We read the file ourselves: tiktoken would delete one with a wrong checksum and download anew.
    """
    url, sha256, _, _ = PUBLISHED[name]
    cache = os.environ.get("TIKTOKEN_CACHE_DIR") or os.environ.get("DATA_GYM_CACHE_DIR")
    path = Path(cache or Path(tempfile.gettempdir(), "data-gym-cache"))
    path = path / hashlib.sha1(url.encode()).hexdigest()
    if not path.is_file():
        raise TokenizerError(
            f"tokenizer {name}: {path} is not there and nothing is downloaded here; save {url}"
            " under that name (set TIKTOKEN_CACHE_DIR to use another directory), or anywhere,"
            " and give its path"
        )
    data = path.read_bytes()
    if (found := hashlib.sha256(data).hexdigest()) != sha256:
        raise TokenizerError(
            f"tokenizer {name}: {path} is damaged, sha256 {sha256} expected, {found} found;"
            f" save {url} there anew"
        )
    return _published(name, data)


def _published(name: str, data: bytes) -> Tokenizer:
    """A published encoding from the content of its file."""
    _, _, pattern, eot = PUBLISHED[name]
    lines = data.decode().splitlines()
    if name == "gpt2":  # a list of merges, in the characters of CHARS, after a version line
        tokens = [bytes([b]) for b in _BYTE_ORDER]
        tokens += [bytes(BYTES[c] for c in line if c != " ") for line in lines[1:]]
    else:  # "base64-of-token id" in order of id
        tokens = [base64.b64decode(line.split()[0]) for line in lines]
    return Tokenizer(name, pattern, {t: i for i, t in enumerate(tokens)}, {EOT: eot})


def _train(vocab_size: int, texts: Iterable[str | bytes] | None) -> Tokenizer:
    """Learn vocab_size - 257 merges; the last id is <|endoftext|>. Bytes not UTF-8 are left out.

    A text too short for so many merges gives a smaller vocabulary, named by its true size.
    """
    if texts is None:
        raise TokenizerError(
            f"tokenizer bpe:{vocab_size}: can only be trained, and no text is given"
        )
    import rustbpe

    logging.getLogger("rustbpe").setLevel(logging.WARNING)  # it reports every percent
    trainer = rustbpe.Tokenizer()
    words = (piece for text in texts for piece in pieces(text) if isinstance(piece, str))
    # Batches of 512 pieces of up to 64 Ki characters: what is held in memory stays small.
    trainer.train_from_iterator(words, vocab_size - 1, buffer_size=512, pattern=PATTERN)
    ranks = {bytes(token): i for token, i in trainer.get_mergeable_ranks()}
    if len(ranks) < vocab_size - 1:
        log.warning("bpe: the text has merges for %d ids only, not %d", len(ranks) + 1, vocab_size)
    return Tokenizer(f"bpe:{len(ranks) + 1}", PATTERN, ranks, {EOT: len(ranks)})


def merges(ranks: dict[bytes, int]) -> Iterator[tuple[bytes, bytes]]:
    """The pair that makes each merged token, in order of id.

    tiktoken merges any pair whose union is a token, Hugging Face only listed pairs. They agree when
    each token lists the one pair that BPE itself arrives at, using the tokens with smaller ids.
    """
    for token, rank in sorted(ranks.items(), key=lambda item: item[1])[256:]:
        parts = [token[i : i + 1] for i in range(len(token))]
        while len(parts) > 2:
            found = [ranks.get(a + b, rank) for a, b in pairwise(parts)]
            i = found.index(min(found))
            if found[i] >= rank:
                raise TokenizerError(f"token {rank} is not the union of two earlier tokens")
            parts[i : i + 2] = [parts[i] + parts[i + 1]]
        yield parts[0], parts[1]


def _to_json(tokenizer: Tokenizer) -> dict[str, Any]:
    """The contents of a Hugging Face tokenizer.json."""

    def text(token: bytes) -> str:
        return "".join(CHARS[b] for b in token)

    vocab = {text(t): i for t, i in sorted(tokenizer.ranks.items(), key=lambda item: item[1])}
    plain = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    regex = {"Regex": tokenizer.pattern}
    split = {"type": "Split", "pattern": regex, "behavior": "Isolated", "invert": False}
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False}
    byte_level["trim_offsets"] = True
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [{"id": tokenizer.eot, "content": EOT, **plain, "special": True}],
        "normalizer": None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [split, byte_level]},
        "post_processor": None,
        "decoder": byte_level,
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": False,
            "vocab": vocab | {EOT: tokenizer.eot},
            "merges": [f"{text(a)} {text(b)}" for a, b in merges(tokenizer.ranks)],
        },
    }
