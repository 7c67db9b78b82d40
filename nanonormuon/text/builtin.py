"""The demo's text: Python sources that come with the interpreter, prepared once and cached."""

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
    """The Python files below directories, each a document; by default those of the running
    interpreter's standard library, tens of MB of text that every machine has. `installed`: include
    the packages installed there."""
    outside = {"__pycache__"} | (set() if installed else INSTALLED)
    for index, root in enumerate(roots or [Path(sysconfig.get_paths()["stdlib"])]):
        for path in sorted(root.rglob("*.py"), key=lambda path: path.parts):
            name = path.relative_to(root)
            if outside.isdisjoint(name.parts) and path.is_file() and (content := path.read_bytes()):
                try:
                    content.decode()
                except UnicodeDecodeError:
                    continue  # a few of CPython's tests are in other encodings on purpose
                yield Document(name.as_posix(), index, content)


def library_sources() -> Iterator[Document]:
    """The part of the standard library that a person would read to learn Python.

    Left out are test suites (which repeat their lines, and which some distributions of Python do
    not install), what a build generates, and tables: files with fewer than TABLE words per 1,000
    bytes, such as those of character sets. The rest is alike on every machine with a complete
    installation of one Python version, so the demo's tokens are, too.
    """
    for document in python_sources():
        words = len(re.findall(rb"[A-Za-z_]{2,}", document.data))
        if not LEFT_OUT.search(document.name) and 1000 * words >= TABLE * len(document.data):
            yield document


# name -> documents, validation's share of them
BUILTIN: dict[str, tuple[Callable[[], Iterator[Document]], float]] = {
    "builtin:stdlib": (library_sources, 0.2),
    "builtin:python": (python_sources, 0.02),  # all of it, the demo's text until 0.2
}


def builtin_data(name: str, tokenizer: str = "bpe:4096") -> Path:
    """The data directory of a name in BUILTIN, prepared once into the user's cache.

    It is found by a hash of contents and settings, verified in full each time it is used, and made
    anew if it is damaged. Several processes may call this at once: one prepares, the others wait.
    Raises ConfigError for another name.
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
    # whole, so that validation is that of the published figures under any Python
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
