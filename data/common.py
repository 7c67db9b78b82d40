"""What the scripts share: their command line, their errors, files of the Hugging Face hub."""

import argparse
import hashlib
import re
import shutil
import sys
import urllib.request
from collections.abc import Callable
from pathlib import Path

from nanonormuon.errors import DataError, exit_code
from nanonormuon.runtime.packages import need
from nanonormuon.storage.run import to_console
from nanonormuon.storage.shards import sha256


def parser(
    doc: str, source: str = "", tokenizer: str = "", out: bool = True
) -> argparse.ArgumentParser:
    """--out DIR (`out`: it is needed), --from PATH where `source` says what that is, --tokenizer
    with this default."""
    parser = argparse.ArgumentParser(
        description=doc, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=out, help="directory for the shards")
    if source:
        parser.add_argument("--from", dest="source", type=Path, nargs="+", help=source)
    if tokenizer:
        parser.add_argument(
            "--tokenizer", default=tokenizer, help="as in normuon-train prepare [%(default)s]"
        )
    return parser


def run(script: Callable[[], None]) -> int:
    """Run a script's work; returns its exit code, after one line for an expected error."""
    to_console()
    try:
        script()
    except OSError as error:
        print(f"error: {error}; with the files at hand: --from PATH", file=sys.stderr)
        return 8
    except ValueError as error:
        if (code := exit_code(error)) is None:
            raise
        print(f"error: {error}", file=sys.stderr)
        return code
    return 0


def download(url: str, file: Path, digest: str) -> None:
    """Fetch one small file and compare its sha256."""
    with urllib.request.urlopen(url, timeout=60) as answer:
        content = answer.read(1 << 26)
    if (found := hashlib.sha256(content).hexdigest()) != digest:
        raise DataError(f"{url}: expected sha256 {digest}, found {found}")
    file.write_bytes(content)


def from_hub(repo: str, name: str, folder: Path, revision: str = "main") -> Path:
    """A file of a data set of the hub in `folder`/`name`.

    It has its name only when complete and, where the hub names a sha256, verified; a file that is
    here and verifies is kept, and a download that broke off goes on. Raises DataError.
    """
    hub, fetching = need("huggingface_hub", repo), need("huggingface_hub.file_download", repo)
    file = folder / name
    try:
        url = hub.hf_hub_url(repo, name, repo_type="dataset", revision=revision)
        found = hub.get_hf_file_metadata(url)
        etag = re.sub("[^0-9A-Za-z]", "", found.etag or "none")
        digest = etag if re.fullmatch("[0-9a-f]{64}", etag) else ""  # small files have another
        if digest and file.is_file() and sha256(file) == digest:
            print(f"{file}: here already, verified")
            return file
        file.parent.mkdir(parents=True, exist_ok=True)
        # hf_hub_download would begin anew, after a kill at any size
        part = file.with_name(f".{file.name}.{etag[:12]}.part")
        with open(part, "ab") as target:
            fetching.http_get(
                url, target, resume_size=target.tell(), expected_size=found.size,
                headers=hub.utils.build_hf_headers(),
            )  # fmt: skip
    except Exception as error:  # whatever a network library raises
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        raise DataError(f"{repo}/{name}: {reason}; with the files at hand: --from PATH") from None
    if digest and (other := sha256(part)) != digest:
        part.unlink()
        raise DataError(f"{repo}/{name}: expected sha256 {digest}, found {other}; run this again")
    part.replace(file)
    print(f"{file}: {file.stat().st_size:,} bytes, {'verified' if digest else 'no sha256 named'}")
    return file


def from_folder(sources: list[Path], name: str, folder: Path) -> Path:
    """The same from files or directories at hand: linked where that is possible, else copied."""
    found = [p for s in sources for p in ([s] if s.is_file() else [s / name]) if p.name == name]
    if not found or not found[0].is_file():
        raise DataError(f"{name}: not in {', '.join(map(str, sources))}")
    file = folder / name
    if file.exists():
        return file
    try:
        file.hardlink_to(found[0])
    except OSError:
        shutil.copyfile(found[0], file)
    return file
