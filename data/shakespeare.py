"""Tiny Shakespeare (1.1 MB, public domain), one token per character, split as nanoGPT splits it.

    python data/shakespeare.py --out data/shakespeare-char                    # downloads 1.1 MB
    python data/shakespeare.py --out data/shakespeare-char --from input.txt   # no network

Gives 1,003,855 training tokens (the first 90 %) and 111,541 for validation; a document separator
stands before each. Seconds on any machine.
"""

import sys
import tempfile
from pathlib import Path

import common

from nanonormuon.errors import DataError
from nanonormuon.storage.shards import sha256
from nanonormuon.text.prepare import prepare

URL = "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"
SHA256 = "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"


def main() -> None:
    options = common.parser(__doc__, "the text, if it is here already").parse_args()
    with tempfile.TemporaryDirectory() as folder:
        file = options.source[0] if options.source else Path(folder, "input.txt")
        if not options.source:
            common.download(URL, file, SHA256)
        elif (found := sha256(file)) != SHA256:
            raise DataError(
                f"{file}: expected sha256 {SHA256}, found {found}: not Tiny Shakespeare"
            )
        prepare([file], options.out, "byte", 0.1)
    print(f"next: normuon-train run shakespeare-char data.path={options.out}")


if __name__ == "__main__":
    sys.exit(common.run(main))
