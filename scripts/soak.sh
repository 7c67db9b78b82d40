#!/usr/bin/env bash
# Kill training runs a thousand times and see that nothing is lost: tests/soak.py.
#
#   scripts/soak.sh [KILLS] [DIR]      defaults: 1000, soak
#
# Stopped and started again with the same DIR it goes on. One CPU core is busy for about 3 s per
# kill, an hour in all; DIR stays below 50 MB. The exit code is 1 if a run differed.
set -euo pipefail
cd "$(dirname "$0")/.."
export PYTHONPATH=$PWD OMP_NUM_THREADS=1 OMP_WAIT_POLICY=passive
exec python tests/soak.py "$@"
