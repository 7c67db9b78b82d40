"""Tiny Shakespeare (1.1 MB, public domain), one token per character, split as nanoGPT splits it.

    python data/shakespeare.py --out data/shakespeare-char                    # downloads 1.1 MB
    python data/shakespeare.py --out data/shakespeare-char --from input.txt   # no network

Gives 1,003,855 training tokens (the first 90 %) and 111,541 for validation; a document separator
stands before each. Seconds on any machine.
"""

import argparse
import hashlib
import sys
import tempfile
import urllib.request
from pathlib import Path

from nanonormuon.data import DataError
from nanonormuon.log import to_console
from nanonormuon.prepare import prepare

URL = "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"
SHA256 = "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=Path, required=True, help="directory for the shards")
    parser.add_argument("--from", dest="source", type=Path, help="the text, if it is here already")
    options = parser.parse_args()
    to_console()
    try:
        with tempfile.TemporaryDirectory() as folder:
            file = options.source or Path(folder) / "input.txt"
            if options.source is None:
                with urllib.request.urlopen(URL, timeout=60) as answer:
                    file.write_bytes(answer.read(1 << 24))
            found = hashlib.sha256(file.read_bytes()).hexdigest()
            if found != SHA256:
                raise DataError(f"{file}: sha256 {found}, expected {SHA256}: not Tiny Shakespeare")
            prepare([file], options.out, "byte", 0.1)
    except OSError as error:
        print(f"error: {error}; with the text at hand: --from FILE", file=sys.stderr)
        return 8
    except DataError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    print(f"next: normuon-train run shakespeare-char data.path={options.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
