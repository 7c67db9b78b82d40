#!/usr/bin/env bash
# One run on several nodes of a SLURM cluster; docs/multinode.md explains what it relies on.
#
#     sbatch scripts/slurm_two_nodes.sh RUN gpt2-350m data.path=/shared/data/fineweb10B
#     sbatch --nodes=4 --gpus-per-node=4 scripts/slurm_two_nodes.sh RUN RECIPE KEY=VALUE...
#
# PORT=n  of the store on the first node; 29500 if not given
#
# RUN, the checkout and its .venv are on a file system that all nodes share. Repeat the command after
# an interruption: RUN goes on. Five minutes before the job's time is over the run finishes its step
# and saves.
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=32
#SBATCH --time=12:00:00
#SBATCH --signal=B:TERM@300
set -euo pipefail
arguments=("${@:2}" train.parallel=hsdp --out "$1")
[[ ! -e $1/config.toml ]] || arguments+=(--resume)
[[ ! -d .venv ]] || PATH=$PWD/.venv/bin:$PATH
read -r first < <(scontrol show hostnames "$SLURM_JOB_NODELIST")

# One launcher gets one signal, and its ranks tell all others. SLURM would signal launchers and ranks:
# each rank would get two, of which the second ends it at once.
stop() {
    srun --overlap --nodes=1 --ntasks=1 --nodelist="$first" \
        pkill -TERM -f "[r]dzv-id=$SLURM_JOB_ID" || true
}
trap stop TERM
# shellcheck disable=SC2016 # each node fills in its own values
srun --wait=60 bash -c 'exec torchrun --nnodes="$SLURM_NNODES" --node-rank="$SLURM_NODEID" \
    --nproc-per-node="${SLURM_GPUS_ON_NODE:-gpu}" --rdzv-id="$SLURM_JOB_ID" \
    --master-addr="$0" --master-port="${PORT:-29500}" --shutdown-timeout=280 \
    train.py "$@"' "$first" "${arguments[@]}" &
until wait $! && exit; do
    kill -0 $! 2> /dev/null || exit 1 # else a signal has interrupted the wait
done
