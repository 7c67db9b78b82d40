"""torchrun's entry: torchrun --standalone --nproc_per_node=8 train.py RECIPE SECTION.KEY=VALUE ...

The same arguments as `normuon-train run`. The loop itself is in nanonormuon/train.py.
"""

import os
import sys

from nanonormuon.cli import main

if __name__ == "__main__":
    code = main(["run", *sys.argv[1:]])
    if code and "RANK" in os.environ:
        # a failed rank must be gone at once: taking a process group down can wait for its peers
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)
