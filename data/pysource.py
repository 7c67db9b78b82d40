"""Python source code that is on this machine: no network, no licence to accept.

    python data/pysource.py --out data/python                              # the standard library
    python data/pysource.py --out data/python --site-packages              # and what is installed
    python data/pysource.py --out data/python --dir ~/projects ~/src       # only these directories

The standard library has about 30 MB (9M tokens of bpe:4096), a well-filled site-packages several
hundred. Encoding takes a second for about 10 MB on one core.
"""

import sys
import sysconfig
from pathlib import Path

import common

from nanonormuon.text.builtin import python_sources
from nanonormuon.text.prepare import prepare_documents


def main() -> None:
    parser = common.parser(__doc__, tokenizer="bpe:4096")
    parser.add_argument("--val", type=float, default=0.02, help="share held out [%(default)s]")
    parser.add_argument("--site-packages", action="store_true", help="installed packages too")
    parser.add_argument("--dir", type=Path, nargs="+", default=[], help="these directories instead")
    options = parser.parse_args()
    roots = options.dir or [Path(sysconfig.get_paths()["stdlib"])]
    if options.site_packages:
        roots.append(Path(sysconfig.get_paths()["purelib"]))

    def read():  # installed packages come from their own root, once
        for index, root in enumerate(roots):
            inside = root != Path(sysconfig.get_paths()["stdlib"])
            for document in python_sources([root], installed=inside):
                yield type(document)(document.name, index, document.data)

    names = [root.resolve().name for root in roots]
    manifest = prepare_documents(read, names, options.out, options.tokenizer, options.val)
    tokens, size = (manifest["train"][key] + manifest["val"][key] for key in ("tokens", "bytes"))
    print(f"{size:,} bytes, {tokens:,} tokens; next: normuon-train run data.path={options.out}")


if __name__ == "__main__":
    sys.exit(common.run(main))
