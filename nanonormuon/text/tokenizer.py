"""Makes tokenizers: bytes, published tiktoken encodings, trained BPE, or a tokenizer.json."""

import base64
import difflib
import hashlib
import json
import os
import re
import tempfile
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nanonormuon.errors import DataError, MissingPackage, TokenizerError
from nanonormuon.storage.files import read_file
from nanonormuon.text import bpe
from nanonormuon.text.bpe import BYTES, CL100K, CONFIG, EOT, FILE, GPT2, O200K, PATTERN, Tokenizer

MAX_IDS = 9_999_999  # in a trained vocabulary
DAMAGE = (LookupError, TypeError, ValueError, AttributeError, RecursionError)  # from a damaged file
# maximum bytes: of tokenizer.json (ten million ids take 0.6 GB), and of any other file
LARGEST, LARGEST_OTHER = 1 << 30, 1 << 24


@dataclass(frozen=True)
class Published:
    """One of tiktoken's encodings."""

    address: str  # of the file with its tokens
    sha256: str  # of that file
    pattern: str
    eot: int

    def build(self, name: str, data: bytes) -> Tokenizer:
        """Make the tokenizer from its file's content."""
        lines = data.decode().splitlines()
        if name == "gpt2":  # a version line, then merges in the characters of CHARS
            tokens = [bytes([b]) for b in bpe.BYTE_ORDER]
            tokens += [bytes(BYTES[c] for c in line if c != " ") for line in lines[1:]]
        else:  # "base64-of-token id" in order of id
            tokens = [base64.b64decode(line.split()[0]) for line in lines]
        return bpe.BPE(name, self.pattern, tokens, self.eot)


HOST = "https://openaipublic.blob.core.windows.net/"
GPT2_FILE = "1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5"
CL100K_FILE = "223921b76ee99bde995b7ff738513eef100fb51d18c93597a113bcffe865b2a7"
O200K_FILE = "446a9538cb6c348e3516120d7c08b09f57c36495e2acfffe59a5bf8b0cfb1a2d"
PUBLISHED = {
    "gpt2": Published(HOST + "gpt-2/encodings/main/vocab.bpe", GPT2_FILE, GPT2, 50256),
    "cl100k_base": Published(HOST + "encodings/cl100k_base.tiktoken", CL100K_FILE, CL100K, 100257),
    "o200k_base": Published(HOST + "encodings/o200k_base.tiktoken", O200K_FILE, O200K, 199999),
}


def get(spec: str | Path, texts: Iterable[str | bytes] | None = None) -> Tokenizer:
    """Make a tokenizer: `byte`; `gpt2`, `cl100k_base`, `o200k_base` (from tiktoken's cache, never
    the network); `bpe:N`, with N ids, trained on `texts`; or a path. Raises TokenizerError."""
    spec = str(spec)
    if spec == "byte":
        return bpe.BPE("byte", PATTERN, [bytes([b]) for b in range(256)], 256)
    if spec in PUBLISHED:
        return _from_cache(spec)
    if size := trained_size(spec):
        if texts is None:
            raise TokenizerError(f"tokenizer {spec}: expected a text to train it on")
        return bpe.train(size, texts)
    if Path(spec).exists():
        return load(spec)
    near = difflib.get_close_matches(spec, ["byte", *PUBLISHED], 1, cutoff=0.4)
    if spec.lower().startswith("bpe"):
        near = ["bpe:4096"]
    hint = f"; did you mean {near[0]}?" if near else ""
    names = ", ".join(["byte", *PUBLISHED])
    raise TokenizerError(f"tokenizer {spec!r}: expected {names}, bpe:N or an existing path{hint}")


def trained_size(spec: str | Path) -> int | None:
    """Return N if `spec` is bpe:N, else None. Raises TokenizerError for an impossible N."""
    if not (match := re.fullmatch("bpe:([0-9]+)", str(spec))):
        return None
    if len(match[1]) > len(str(MAX_IDS)) or not 257 <= int(match[1]) <= MAX_IDS:
        raise TokenizerError(f"tokenizer {spec}: expected 257 (bytes and {EOT}) to {MAX_IDS} ids")
    return int(match[1])


def load(path: str | Path) -> Tokenizer:
    """Read a tokenizer.json, the directory that contains it, or a published vocabulary file
    (vocab.bpe, *.tiktoken), recognised by its sha256.

    A file by `BPE.save` must equal what its vocabulary would be saved as; others go to the library
    `tokenizers`. A hash in tokenizer_config.json must match. Raises TokenizerError, OSError.
    """
    path = Path(path, FILE) if Path(path).is_dir() else Path(path)
    try:
        data, config = read_file(path, LARGEST), {}
        found = hashlib.sha256(data).hexdigest()
        for name, published in PUBLISHED.items():
            if published.sha256 == found:
                return published.build(name, data)
        with suppress(FileNotFoundError):
            config = json.loads(read_file(path.with_name(CONFIG), LARGEST_OTHER))
        found = _read(json.loads(data), config, path)
        expected = config.get("nanonormuon_hash", found.hash)
        if found.hash != expected:
            problem = f"hash {found.hash}, expected {expected} ({CONFIG})"
            raise TokenizerError(f"{problem}; restore the file")
        # the name appears in messages and files
        found.name = "".join(c if c.isprintable() else "?" for c in found.name)
        found.path = path
        return found
    except FileNotFoundError:
        raise TokenizerError(f"{path}: no such file; expected a saved {FILE}") from None
    except MissingPackage:
        raise
    except DAMAGE as error:
        problem = f"damaged or of an unknown format ({type(error).__name__}: {str(error)[:200]})"
        problem = str(error).removeprefix(f"{path}: ") if isinstance(error, DataError) else problem
        raise TokenizerError(f"{path}: {problem}") from None


def _read(content: Any, config: Any, path: Path) -> Tokenizer:
    """Make a tokenizer from the content of tokenizer.json and of tokenizer_config.json."""
    if "nanonormuon_foreign" not in config:
        # without nanonormuon_name it may be ours or not
        with suppress(*() if "nanonormuon_name" in config else DAMAGE):
            return bpe.read(content, str(config.get("nanonormuon_name", "custom")))
    from nanonormuon.text import huggingface  # few runs need it

    return huggingface.read(content, config, path)


def _from_cache(name: str) -> Tokenizer:
    """Make a published encoding from tiktoken's cache. tiktoken itself would download a file that
    is missing or has a wrong checksum."""
    published = PUBLISHED[name]
    cache = os.environ.get("TIKTOKEN_CACHE_DIR") or os.environ.get("DATA_GYM_CACHE_DIR")
    path = Path(cache or Path(tempfile.gettempdir(), "data-gym-cache"))
    path = path / hashlib.sha1(published.address.encode()).hexdigest()
    try:
        data = read_file(path, LARGEST_OTHER) if path.exists() else b""
    except ValueError as error:
        raise TokenizerError(f"tokenizer {name}: {error}") from None
    if (found := hashlib.sha256(data).hexdigest()) != published.sha256:
        state = f"damaged, sha256 {found}" if data else "missing"
        problem = f"{path} is {state}: expected sha256 {published.sha256}, never downloaded"
        hint = "under this name (TIKTOKEN_CACHE_DIR sets its place), or anywhere, and give its path"
        raise TokenizerError(f"tokenizer {name}: {problem}; save {published.address} {hint}")
    return published.build(name, data)
