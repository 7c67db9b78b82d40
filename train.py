"""torchrun's entry: torchrun --standalone --nproc_per_node=8 train.py RECIPE SECTION.KEY=VALUE ...

The same arguments as `normuon-train run`. The loop itself is in nanonormuon/train.py.
"""

import sys

from nanonormuon.cli.app import entry

if __name__ == "__main__":
    entry(["run", *sys.argv[1:]])
