"""The demo's text: the Python sources that come with an interpreter, prepared once and cached."""

import logging
import platform
import shutil
import sysconfig
from collections.abc import Iterator
from functools import partial
from hashlib import sha256
from pathlib import Path

from nanonormuon.errors import DataError
from nanonormuon.storage import shards
from nanonormuon.storage.files import cache_directory
from nanonormuon.text.bpe import PATTERN
from nanonormuon.text.prepare import alone, prepare_documents
from nanonormuon.text.sources import Document

log = logging.getLogger(__name__)
INSTALLED = {"site-packages", "dist-packages"}


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


def builtin_python(tokenizer: str = "bpe:4096", val: float = 0.02) -> Path:
    """The demo's data directory: `python_sources`, prepared once into the user's cache.

    It is found by a hash of contents and settings, verified in full each time it is used, and made
    anew if it is damaged. Several processes may call this at once: one prepares, the others wait.
    """
    corpus = list(python_sources())
    key = sha256(f"{shards.FORMAT} {tokenizer} {PATTERN} {val}".encode())
    for document in corpus:
        key.update(sha256(document.data).digest())
    target = cache_directory() / f"python-{key.hexdigest()[:12]}"
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
