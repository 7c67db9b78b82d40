"""Train on several ranks: torchrun --standalone --nproc_per_node=8 train.py RECIPE KEY=VALUE ...

Takes the arguments of `normuon-train run`. The training loop is in nanonormuon/train.py.
"""

import sys

from nanonormuon.cli.app import entry

if __name__ == "__main__":
    entry(["run", *sys.argv[1:]])
