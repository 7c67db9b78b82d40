"""The demo's text: the interpreter's Python sources, prepared once and cached."""

import logging
import platform
import re
import shutil
import sysconfig
from collections.abc import Callable, Iterator
from functools import partial
from hashlib import sha256
from pathlib import Path

from nanonormuon.errors import ConfigError, DataError
from nanonormuon.storage import shards
from nanonormuon.storage.files import cache_directory
from nanonormuon.text.bpe import PATTERN
from nanonormuon.text.prepare import alone, prepare_documents
from nanonormuon.text.sources import Document

log = logging.getLogger(__name__)
INSTALLED = {"site-packages", "dist-packages"}
LEFT_OUT = re.compile(
    r"(^|/)(tests?|idle_test|encodings|pydoc_data|config-[^/]*)/|(^|/)(_?test_|_sysconfigdata)[^/]*$"
)
TABLE = 70


def python_sources(roots: list[Path] | None = None, installed: bool = False) -> Iterator[Document]:
    """Yield the Python files below directories, each as a document; by default the standard
    library of this interpreter, tens of MB. `installed`: include installed packages."""
    outside = {"__pycache__"} | (set() if installed else INSTALLED)
    for index, root in enumerate(roots or [Path(sysconfig.get_paths()["stdlib"])]):
        for path in sorted(root.rglob("*.py"), key=lambda path: path.parts):
            name = path.relative_to(root)
            if outside.isdisjoint(name.parts) and path.is_file() and (content := path.read_bytes()):
                try:
                    content.decode()
                except UnicodeDecodeError:
                    continue  # a few of CPython's tests deliberately use other encodings
                yield Document(name.as_posix(), index, content)


def library_sources() -> Iterator[Document]:
    """Yield the part of the standard library that a person would read to learn Python.

    Leaves out test suites (repetitive, and not installed by some distributions), generated files,
    and tables: files with fewer than TABLE words per 1,000 bytes, such as character sets. The rest,
    and so the demo's tokens, is equal on every complete installation of a Python version.
    """
    for document in python_sources():
        words = len(re.findall(rb"[A-Za-z_]{2,}", document.data))
        if not LEFT_OUT.search(document.name) and 1000 * words >= TABLE * len(document.data):
            yield document


# name -> documents, share of validation
BUILTIN: dict[str, tuple[Callable[[], Iterator[Document]], float]] = {
    "builtin:stdlib": (library_sources, 0.2),
    "builtin:python": (python_sources, 0.02),  # all of it: the demo's earlier text
}


def builtin_data(name: str, tokenizer: str = "bpe:4096") -> Path:
    """Return the data directory of a name in BUILTIN, preparing it in the user's cache if needed.

    Its name contains a hash of contents and settings. Every use verifies it in full and rebuilds it
    if damaged. Of several processes one prepares, and the others wait. Raises ConfigError.
    """
    if name not in BUILTIN:
        raise ConfigError(f'data.path = "{name}": expected {" or ".join(BUILTIN)}')
    read, val = BUILTIN[name]
    corpus = list(read())
    key = sha256(f"{shards.FORMAT} {tokenizer} {PATTERN} {val}".encode())
    for document in corpus:
        key.update(sha256(document.data).digest())
    target = cache_directory() / f"{name.partition(':')[2]}-{key.hexdigest()[:12]}"
    names = [f"Python {platform.python_version()} standard library"]
    # whole: published figures depend on this split
    make = partial(prepare_documents, lambda: corpus, names, target, tokenizer, val, whole=True)
    with alone(target.parent, wait=True):
        try:
            make()
        except DataError as error:
            if not (target / shards.MANIFEST).exists():
                raise
            log.warning("prepare: rebuilding the demo's data: %s", error)
            shutil.rmtree(target)
            make()
    return target
