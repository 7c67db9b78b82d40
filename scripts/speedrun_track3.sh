#!/usr/bin/env bash
# From a bare machine with 1 to 8 NVIDIA GPUs to a verdict on modded-nanogpt's track 3.
#
#     scripts/speedrun_track3.sh [RECIPE [TRIALS]]      track3-normuon, 10 trials
#
# DRY=1   print the commands and the cost, run none; needs no GPU, and takes 8 if it finds none
# GPUS=n  how many; all that nvidia-smi lists if not given. A batch of 512 sequences divides among
#         8, 4, 2 or 1, so that the largest of these is used
# FROM=DIR   FineWeb's shards are there already: link or copy them instead of downloading
# OUT=DIR    for the runs; runs/RECIPE if not given
#
# Repeat the command after an interruption: downloads and trials go on where they broke off. Needs
# Python 3.11 and disk: 0.2 GB per shard (18 of them, 27 for track3-adamw), 1.4 GB per checkpoint.
#
# Cost: the recipe's FLOP (1.4e18 for 3,250 steps) at 35 % of an H100's 989 TFLOP/s in bf16, which is
# what modded-nanogpt's own script reaches with 0.15 s per step on eight: 1.1 GPU-hours per trial, 11
# for ten, which is 11 hours on one GPU and 1.4 on eight. Not measured here.
set -euo pipefail
recipe=${1:-track3-normuon} trials=${2:-10}
cd "$(dirname "$0")/.."
file=nanonormuon/recipes/$recipe.toml
fail() { echo "error: $1" >&2; exit 2; }
known=$(basename -s .toml nanonormuon/recipes/track3-* | grep -v -e '-mini$' | xargs) # not the twin
[[ " $known " == *" $recipe "* ]] || fail "no recipe $recipe: expected one of $known"
[[ $trials =~ ^[1-9][0-9]*$ ]] || fail "$trials trials: expected a number"
found=${GPUS:-$(nvidia-smi -L 2> /dev/null | grep -c '^GPU' || true)}
[[ ${DRY:-} == 1 && -z ${GPUS:-} && $found == 0 ]] && found=8
[[ $found =~ ^[1-9][0-9]*$ ]] || fail "$found GPUs: expected 1 to 8 (nvidia-smi -L, or GPUS=n)"
for ranks in 8 4 2 1; do ((ranks > found)) || break; done
((ranks == found)) || echo "using $ranks of $found GPUs" >&2
steps=$(sed -n 's/^steps = //p' "$file")
shards=$(((steps + 189) / 190)) # 190 whole batches of 524,288 tokens in each of 100M
out=${OUT:-runs/$recipe}
flop=$(sed -n 's/^# cost .* = \([0-9.e]*\) FLOP.*/\1/p' "$file")
LC_ALL=C awk -v flop="$flop" -v n="$trials" -v ranks="$ranks" 'BEGIN {
    hours = flop * n / (0.35 * 989e12) / 3600
    printf "about %.1f GPU-hours (H100, 35 %% of 989 TFLOP/s in bf16) for %d trials of %s FLOP: ", \
        hours, n, flop
    printf "%.1f h on 1 GPU, %.1f h on 8, %.1f h on the %d used\n", hours, hours / 8, hours / ranks, ranks
}' >&2

do_() {
    printf '%q ' "$@" && echo
    [[ ${DRY:-} == 1 ]] || "$@"
}
if [[ ${DRY:-} == 1 ]] || ! python -c 'import nanonormuon, huggingface_hub' 2> /dev/null; then
    [[ -d .venv ]] || do_ python3 -m venv .venv
    do_ .venv/bin/pip install -q -r requirements.txt
    PATH=$PWD/.venv/bin:$PATH
fi
do_ python data/fineweb.py --out data/fineweb10B --shards "$shards" ${FROM:+--from "$FROM"}
do_ normuon-train doctor
do_ normuon-train trials "$recipe" --n "$trials" --target 3.28 --ranks "$ranks" --out "$out"
