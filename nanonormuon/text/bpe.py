"""Byte-level BPE, and the interface of every tokenizer.

A regex splits the text. Within each piece, the adjacent pair whose union has the lowest id is
merged until no pair is left, so a vocabulary is a pattern and a table bytes -> id. tiktoken encodes
and rustbpe trains. On disk it is a Hugging Face `tokenizer.json`.
"""

import hashlib
import json
import logging
import re
from collections.abc import Iterable, Iterator, Sequence
from functools import cache, cached_property
from itertools import islice, pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import rustbpe
import tiktoken

from nanonormuon.errors import TokenizerError
from nanonormuon.storage.files import replace_file

log = logging.getLogger(__name__)

EOT = "<|endoftext|>"
FILE, CONFIG = "tokenizer.json", "tokenizer_config.json"
MAX_ID = (1 << 24) - 1  # tables have a row per id

# PATTERN, for trained vocabularies, follows GPT-4's: contractions, words with one leading symbol,
# numbers, runs of symbols, line ends, spaces. Numbers are split into pairs of digits: a small
# vocabulary has better uses for a thousand ids than three-digit numbers. The patterns avoid
# possessive quantifiers, and PATTERN avoids (?i:...): tiktoken's regex engine and Hugging Face
# tokenizers' treat `{1,3}+` and the case folding of U+017F differently.
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

# JSON cannot hold bytes, so byte-level BPE files write byte b as the character CHARS[b]: printable
# Latin-1 as itself, others from U+0100 on. GPT-2 also orders its byte ids like this.
_PRINTABLE = [*range(33, 127), *range(161, 173), *range(174, 256)]
BYTE_ORDER = _PRINTABLE + [b for b in range(256) if b not in _PRINTABLE]
CHARS = {b: chr(b) if i < len(_PRINTABLE) else chr(256 + i - 188) for i, b in enumerate(BYTE_ORDER)}
BYTES = {c: b for b, c in CHARS.items()}

# Long texts are cut where every pattern above has a boundary anyway (after a line that ends in a
# visible character, before one that starts with neither space nor slash), so that a huge file uses
# all cores and little memory. A run of letters, or of neither letters nor digits, may have no such
# place. It is cut at RUN characters, since tiktoken's regex engine overflows its stack on a million
# blanks; for training at LONGEST, the maximum length of a trained token.
PIECE, RUN, LONGEST = 65_536, 65_536, 512
_CUT = re.compile(r"(?<=\S\n)(?=[^\s/])")
_RUN = re.compile(r"[^\W\d_]+|[\W_]+")
_SURROGATES = re.compile("([\ud800-\udfff]+)")


class Piece(NamedTuple):
    """A part of a document. text: `str`, or `bytes` that are not UTF-8; offset: in bytes."""

    text: str | bytes
    name: str  # of the document
    offset: int


def pieces(text: str | bytes) -> Iterator[str | bytes]:
    """Cut a text into pieces whose ids are those of the whole, except for runs of at least RUN / 2
    characters. Yields `str` (about PIECE characters) and, for what is not UTF-8, `bytes`."""
    data = text.encode("utf-8", "surrogatepass") if isinstance(text, str) else text
    # "surrogateescape" only turns bytes b >= 128 that are not UTF-8 into U+DC00 + b
    for i, part in enumerate(_SURROGATES.split(data.decode("utf-8", "surrogateescape"))):
        if i % 2:
            yield part.encode("utf-8", "surrogateescape")
            continue
        start = 0
        while start < len(part):
            cut = _CUT.search(part, start + PIECE)
            end = cut.start() if cut else len(part)
            yield from cut_runs(part[start:end], RUN)
            start = end


def cut_runs(text: str, length: int) -> Iterator[str]:
    """Cut runs in a text so that they are shorter than `length`, but none below half of it."""
    start, step = 0, length // 2
    for at in range(step, len(text) - step + 1, step):
        if _RUN.fullmatch(text, at, at + step):
            yield text[start:at]
            start = at
    yield text[start:]


# --------------------------------------------------------------------------------- the interface


class LostText(ValueError):
    """The ids of `whole` decode to `found`, which differs from `offset` on."""

    def __init__(self, whole: bytes | str, found: bytes | str) -> None:
        differ = (i for i, (a, b) in enumerate(zip(whole, found)) if a != b)
        self.offset = at = next(differ, min(len(whole), len(found)))
        lost = f"expected {whole[at : at + 20]!r}, found {found[at : at + 20]!r}"
        hint = f"restore {FILE} or use another tokenizer"
        super().__init__(f"encoding loses text: {lost}; {hint}")


def gave_up(error: BaseException) -> bool:
    """Whether an error means that `check`, tiktoken or tokenizers refuses a text or file. The
    latter raise ValueError, a plain Exception or a Rust panic, which is only a BaseException."""
    kinds = LostText, ValueError, Exception
    return type(error) in kinds or type(error).__name__ == "PanicException"


@cache
def warn_once(message: str) -> None:
    log.warning("%s", message)


class Tokenizer:
    """The interface of every tokenizer. A subclass sets these attributes and adds `encode_text`;
    one whose tokens have no bytes of their own overrides what uses `table`."""

    name: str  # for messages
    path: Path | None = None  # the file that it was read from, for messages
    hash: str  # sha256 (hex) of all that determines the ids, without the name
    end = EOT  # the token before every document
    eot: int  # the id of `end`
    vocab_size: int  # one more than the largest id
    table: dict[int, bytes]  # the bytes of each id
    special_ids: set[int]  # ids that stand for no text
    content: dict[str, Any]  # of tokenizer.json
    foreign = False  # whether another program made the file; stored in tokenizer_config.json
    pieces = staticmethod(pieces)  # cuts a text where it may be encoded in parts

    def encode_text(self, text: str) -> Any:
        """Return the ids of a text, unchecked. Releases the GIL."""
        raise NotImplementedError

    def normalize(self, text: str) -> str:
        """Return the text that `text` is encoded as."""
        return text

    def check(self, text: str, ids: np.ndarray) -> None:
        """Raise LostText unless `ids` cover the text. Each is a part of it, so lengths suffice."""
        if (whole := self.normalize(text)) != text:
            warn_once(f"{self}: its normalizer changes the text")
        # the second comparison is for added tokens, which match the text before normalization
        if self.lengths[ids].sum() != len(whole.encode()) and (
            self.normalize(found := self.decode(ids)) != whole
        ):
            raise LostText(whole.encode(), found.encode())

    def cut(self, text: str | bytes, name: str) -> Iterator[Piece]:
        """Cut a document into pieces that know their places."""
        offset = 0
        for part in self.pieces(text):
            yield Piece(part, name, offset)
            offset += len(part.encode() if isinstance(part, str) else part)

    def encode_piece(self, piece: Piece) -> np.ndarray:
        """Encode a piece to ids (n,) uint32. Raises TokenizerError, naming document and offset, for
        text that ids cannot represent."""
        try:
            if isinstance(piece.text, str):
                ids = np.asarray(self.encode_text(piece.text), np.uint32)
                self.check(piece.text, ids)
                return ids
            if self.byte_ids:
                return np.array([self.byte_ids[b] for b in piece.text], np.uint32)
            hint = "cannot be encoded; convert the text or use a byte-level tokenizer"
            raise ValueError(f"byte 0x{piece.text[0]:02x} is not UTF-8 and {hint}")
        except BaseException as error:
            if not gave_up(error):
                raise
            document = f"{piece.name}: " if piece.name else ""
            offset = piece.offset + getattr(error, "offset", 0)
            raise TokenizerError(f"{document}offset {offset}: {error} ({self})") from None

    def encode_job(self, job: Iterable[Piece | None]) -> np.ndarray:
        """Encode pieces to ids (n,) uint32; None, before a document, becomes `eot`."""
        eot, nothing = np.array([self.eot], np.uint32), np.zeros(0, np.uint32)
        parts = (eot if piece is None else self.encode_piece(piece) for piece in job)
        return np.concatenate([nothing, *parts])

    @cached_property
    def byte_ids(self) -> dict[int, int]:
        """The token of each single byte."""
        return {token[0]: i for i, token in self.table.items() if len(token) == 1}

    def encode(self, text: str | bytes, name: str = "") -> list[int]:
        """Encode a text, which messages call `name`. A lone surrogate stands for its three bytes in
        "surrogatepass" encoding. Bytes that are not UTF-8 become single-byte tokens, or raise
        TokenizerError if the vocabulary has none."""
        return self.encode_job(self.cut(text, name)).tolist()

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        """Decode ids to bytes. Raises TokenizerError for an unknown id."""
        try:
            return b"".join(self.table[int(i)] for i in ids)
        except KeyError as error:
            known = f"{self.name} has {len(self.table)} ids below {self.vocab_size}"
            raise TokenizerError(f"decode: id {error}: {known}") from None

    def decode(self, ids: Iterable[int]) -> str:
        """Decode ids to text, with U+FFFD for bytes that are not UTF-8."""
        return self.decode_bytes(ids).decode("utf-8", errors="replace")

    def stream(self, before: Sequence[int] = ()) -> "Stream":
        """Make a decoder of single tokens that follow the tokens `before`."""
        return Stream(self, before)

    @cached_property
    def lengths(self) -> np.ndarray | None:
        """Bytes of text of each id (vocab_size,), 0 for special tokens; None if tokens have none,
        so that a part's bits per byte are unknown."""
        lengths = np.zeros(self.vocab_size, np.int64)
        for i in self.table.keys() - self.special_ids:
            lengths[i] = len(self.table[i])
        return lengths

    def files(self) -> dict[str, bytes]:
        """Return the content of tokenizer.json and tokenizer_config.json."""
        config = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "nanonormuon_name": self.name,
            "nanonormuon_hash": self.hash,
            **({"nanonormuon_foreign": True} if self.foreign else {}),
            **dict.fromkeys(("bos_token", "eos_token"), self.end),
            **dict.fromkeys(("add_bos_token", "add_eos_token"), False),
            "clean_up_tokenization_spaces": False,
            "split_special_tokens": True,
        }
        return {
            name: json.dumps(content, ensure_ascii=False, indent=1).encode()
            for name, content in ((FILE, self.content), (CONFIG, config))
        }

    def save(self, directory: str | Path) -> None:
        """Write tokenizer.json and tokenizer_config.json."""
        Path(directory).mkdir(parents=True, exist_ok=True)
        for name, content in self.files().items():
            replace_file(Path(directory, name), content)

    def __str__(self) -> str:
        return f"tokenizer {self.name}" + (f", {self.path}" if self.path else "")


class Stream:
    """Decodes tokens one at a time, in the context of those shown last. Holds back what may be the
    start of a character, which decodes to U+FFFD."""

    def __init__(self, tokenizer: Tokenizer, before: Sequence[int]) -> None:
        self.tokenizer, self.window = tokenizer, list(before)
        while tokenizer.eot in self.window:  # a text begins after the last end-of-text token
            del self.window[: self.window.index(tokenizer.eot) + 1]
        self._mark()

    def add(self, token: int) -> str:
        """Return the text that a token completes. Raises TokenizerError for an unknown id."""
        text = self.tokenizer.decode([*self.window, token])
        self.window.append(token)
        whole = text.rstrip("\ufffd")
        new = whole[self.shown :]
        self.shown += len(new)
        if whole == text:  # what follows needs only the tokens since the last mark as context
            del self.window[: self.context]
            self._mark()
        return new

    def finish(self) -> str:
        """Return the text that is held back."""
        return self.tokenizer.decode(self.window)[self.shown :]

    def _mark(self) -> None:
        """Take the whole window as shown, even if it ends within a character, as a prompt may."""
        self.context = len(self.window)
        self.shown = len(self.tokenizer.decode(self.window))  # characters


# ----------------------------------------------------------------------------------- byte-level BPE


class BPE(Tokenizer):
    """A byte-level BPE vocabulary.

    tokens: in order of id, which is also their merge priority: the 256 single bytes in some order,
    then the merged tokens. The only special token is <|endoftext|>, which `encode` never produces:
    in a text it is thirteen ordinary characters.
    """

    def __init__(self, name: str, pattern: str, tokens: Iterable[bytes], eot: int) -> None:
        self.name, self.pattern, self.eot = name, pattern, eot
        self.ranks = {token: i for i, token in enumerate(tokens)}
        if {t for t, i in self.ranks.items() if i < 256} != {bytes([b]) for b in range(256)}:
            raise TokenizerError(f"tokenizer {name}: ids 0..255 are not the 256 single bytes")
        if type(eot) is not int or not len(self.ranks) <= eot <= MAX_ID:
            expected = f"expected {len(self.ranks)} to {MAX_ID}"
            raise TokenizerError(f"tokenizer {name}: {EOT} has the id {eot}, {expected}")
        self.vocab_size, self.special_ids = eot + 1, {eot}
        self.table = {i: token for token, i in self.ranks.items()} | {eot: EOT.encode()}

    @cached_property
    def hash(self) -> str:
        """sha256 (hex) of pattern, table and special token."""
        table = [(i, token.hex()) for token, i in self.ranks.items()]
        parts = [self.pattern, table, {EOT: self.eot}]
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()

    @cached_property
    def _encoding(self) -> tiktoken.Encoding:
        table = {"mergeable_ranks": self.ranks, "special_tokens": {EOT: self.eot}}
        return tiktoken.Encoding(self.name, pat_str=self.pattern, **table)

    def encode_text(self, text: str) -> np.ndarray:
        return self._encoding.encode_to_numpy(text, disallowed_special=())

    @property
    def content(self) -> dict[str, Any]:
        text = {token: "".join(CHARS[b] for b in token) for token in self.table.values()}
        plain = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
        regex = {"Regex": self.pattern}
        split = {"type": "Split", "pattern": regex, "behavior": "Isolated", "invert": False}
        byte_level = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False}
        byte_level["trim_offsets"] = True
        unset = "dropout", "unk_token", "continuing_subword_prefix", "end_of_word_suffix"
        return {
            "version": "1.0",
            "truncation": None,
            "padding": None,
            "added_tokens": [{"id": self.eot, "content": EOT, **plain, "special": True}],
            "normalizer": None,
            "pre_tokenizer": {"type": "Sequence", "pretokenizers": [split, byte_level]},
            "post_processor": None,
            "decoder": byte_level,
            "model": {
                "type": "BPE",
                **dict.fromkeys(unset),
                **dict.fromkeys(("fuse_unk", "byte_fallback", "ignore_merges"), False),
                "vocab": {text[token]: i for i, token in self.table.items()},
                "merges": [f"{text[a]} {text[b]}" for a, b in merges(self.ranks)],
            },
        }


def merges(ranks: dict[bytes, int]) -> Iterator[tuple[bytes, bytes]]:
    """Yield the pair that makes each merged token, in order of id.

    tiktoken merges any pair whose union is a token, Hugging Face only listed pairs. They agree if
    each token lists the pair at which BPE arrives with the tokens of smaller ids.
    """
    for token, rank in islice(ranks.items(), 256, None):
        parts = [token[i : i + 1] for i in range(len(token))]
        found = [ranks.get(a + b, rank) for a, b in pairwise(parts)]
        while len(parts) > 2:
            i = found.index(min(found))
            if found.pop(i) >= rank:
                raise TokenizerError(f"token {rank} is not the union of two earlier tokens")
            parts[i : i + 2] = [parts[i] + parts[i + 1]]
            for j in range(max(0, i - 1), min(i + 1, len(found))):
                found[j] = ranks.get(parts[j] + parts[j + 1], rank)
        yield parts[0], parts[1]


def read(content: dict[str, Any], name: str) -> BPE:
    """Read a tokenizer.json that `BPE.save` wrote. Raises TokenizerError, LookupError, TypeError,
    ValueError or AttributeError for any other content."""
    (eot,) = (t["id"] for t in content["added_tokens"])
    pattern = content["pre_tokenizer"]["pretokenizers"][0]["pattern"]["Regex"]
    vocab = content["model"]["vocab"]
    texts = sorted(vocab.keys() - {EOT}, key=vocab.get)
    found = BPE(name, str(pattern), (bytes(BYTES[c] for c in t) for t in texts), eot)
    if found.content != content:
        raise TokenizerError("merges, ids or settings do not match its vocabulary")
    single = dict(islice(found.ranks.items(), 256))
    # raises ValueError for an invalid regex here rather than with the first text
    tiktoken.Encoding(name, pat_str=found.pattern, mergeable_ranks=single, special_tokens={})
    return found


def train(vocab_size: int, texts: Iterable[str | bytes]) -> BPE:
    """Learn vocab_size - 257 merges from UTF-8 text; the last id is <|endoftext|>. A short text
    gives a smaller vocabulary, named by its size. Tokens: up to LONGEST characters."""
    logging.getLogger("rustbpe").setLevel(logging.WARNING)  # it logs every percent
    trainer = rustbpe.Tokenizer()
    valid = (piece for text in texts for piece in pieces(text) if isinstance(piece, str))
    words = (word for piece in valid for word in cut_runs(piece, LONGEST))
    # holds only 512 pieces of up to 64 Ki characters in memory
    trainer.train_from_iterator(words, vocab_size - 1, buffer_size=512, pattern=PATTERN)
    tokens = [bytes(token) for token, _ in trainer.get_mergeable_ranks()]  # in order of id
    size = len(tokens) + 1
    if size < vocab_size:
        log.warning("bpe: the text suffices for %d ids only, not %d", size, vocab_size)
    return BPE(f"bpe:{size}", PATTERN, tokens, size - 1)
