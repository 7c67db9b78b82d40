#!/usr/bin/env bash
# What a machine with a CUDA GPU should be asked: at most 20 minutes, usually 10. Needs the package
# and its test requirements, torch 2.11 or later, and no network.
#
#     scripts/gpu_check.sh OUT_FOLDER
#     GPU_CHECK_SMALL=1 scripts/gpu_check.sh OUT_FOLDER    # a dry pass on a CPU, two minutes
#
# A part that fails or takes too long does not stop the others. The command repeated does what is
# missing: OUT_FOLDER/done has a file per part that has passed. The last lines are a table, also in
# OUT_FOLDER/table.txt; OUT_FOLDER/results.json has every part's exit code, seconds and result,
# OUT_FOLDER/NAME.log what it printed. Fails if a part did.
set -uo pipefail
: "${1:?usage: scripts/gpu_check.sh OUT_FOLDER}"
out=$(mkdir -p "$1/done" && cd "$1" && pwd) || exit 1
cd "$(dirname "$0")/.." || exit 1
export NANONORMUON_CACHE="$out/cache" PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"
until=$((SECONDS + ${GPU_CHECK_SECONDS:-1200}))
trap 'python scripts/gpu_results.py table "$out"; exit $?' EXIT

part() { # NAME SECONDS COMMAND...
    local name=$1 limit=$(($2 * patience)) start=$SECONDS code
    shift 2
    [[ -e $out/done/$name ]] && return
    if ((until - start < 15)); then
        echo "124 0" > "$out/$name.code"
        echo "not started: no time is left; repeat the command" | tee "$out/$name.log"
        return
    fi
    echo "== $name: $*"
    timeout -k 10 $((limit < until - start ? limit : until - start)) "$@" > "$out/$name.log" 2>&1
    code=$?
    echo "$code $((SECONDS - start))" | tee "$out/$name.code"
    if ((code == 0)); then touch "$out/done/$name"; else tail -n 3 "$out/$name.log"; fi
}

train() { python -m nanonormuon run "$@"; }
ranks() { python -m torch.distributed.run --standalone --nproc_per_node=1 train.py "$@"; }
short() { # FOLDER SETTINGS...: a run that is taken up if a part of it is there
    local folder=$1 resume=()
    shift
    if [[ -e $folder/config.toml ]]; then resume=(--resume); fi
    train "$@" train.sample_tokens=0 --out "$folder" ${resume[@]+"${resume[@]}"}
}
losses() { # 50 steps of one model in float32: on the CPU, and on the device eager and compiled
    local same=(demo "data.path=$out/text" train.dtype=fp32 train.steps=$steps train.log_every=1
        train.eval_every=0 train.save_every=0 train.micro_batch=4 "${tiny[@]}")
    short "$out/losses-cpu" "${same[@]}" train.device=cpu train.compile=off || return
    short "$out/losses-eager" "${same[@]}" train.device=$device train.compile=off || return
    short "$out/losses-compiled" "${same[@]}" train.device=$device train.compile=$compiled || return
    python scripts/gpu_results.py losses 0.01 "$out/losses-cpu" "$out/losses-eager" "$out/losses-compiled"
}
gpt2() { # 124M on the machine's Python sources, a vocabulary of 4,096: below this loss
    short "$out/gpt2" gpt2-124m "data.path=$out/text" data.val_tokens=$val model.vocab_size=0 "${large[@]}" &&
        python scripts/gpu_results.py below $goal "$out/gpt2"
}
export -f train ranks short losses gpt2
export out

if [[ ${GPU_CHECK_SMALL:-} ]]; then
    device=cpu compiled=off steps=4 val=2048 goal=9 tokens=32 patience=4
    text="--dir scripts --tokenizer bpe:300"
    tests="tests/test_layouts.py -k group_of_one"
    tiny=(model.n_layer=1 model.n_head=2 model.n_embd=32 data.seq_len=32 train.batch_tokens=256)
    large=("${tiny[@]}" model.n_kv_head=0 train.steps=3 train.eval_every=3 train.save_every=3
        train.device=cpu train.compile=off)
    speed=("${tiny[@]}" model.head_dim=16 train.compile=off --steps 2)
    optimizer=(--small)
else
    python -c 'import torch; assert torch.cuda.is_available(), "no CUDA GPU"' || exit 1
    device=cuda compiled=on steps=50 val=1048576 goal=3.2 tokens=512 patience=1
    text="--site-packages --tokenizer bpe:4096"
    tests="tests/test_gpu.py tests/test_layouts.py tests/test_normuon.py tests/test_model.py"
    tiny=() large=(train.batch_tokens=65536 train.steps=300 train.eval_every=100 train.save_every=100
        train.compile=on)
    speed=(train.compile=on --steps 6)
    optimizer=(--device cuda)
fi
declare -p device compiled steps val goal tiny large > "$out/settings.sh"

one=(demo "data.path=$out/text" train.steps=10 train.sample_tokens=0 train.eval_every=0
    train.save_every=0 "train.device=$device" "${tiny[@]}")
part doctor 60 python -m nanonormuon doctor --json
part text 150 python data/pysource.py --out "$out/text" $text
part tests 240 python -m pytest -q -m "not full and not slow" $tests
rm -rf "$out/ddp" "$out/fsdp"
part ddp 90 bash -c 'ranks "$@" --out "$out/ddp"' ddp "${one[@]}" train.compile=off
part fsdp 150 bash -c 'ranks "$@" --out "$out/fsdp"' fsdp "${one[@]}" train.parallel=fsdp \
    "train.compile=$compiled"
part losses 240 bash -c 'source "$out/settings.sh"; losses'
for recipe in gpt2-124m gpt2-350m track3-normuon; do
    part "$recipe" 200 python scripts/bench_train.py "$recipe" "data.path=$out/text" data.val_tokens=0 \
        "train.device=$device" "${speed[@]}"
done
part optimizer 120 python scripts/bench_optimizer.py "${optimizer[@]}"
part gpt2 240 bash -c 'source "$out/settings.sh"; gpt2'
part sampling 60 python -m nanonormuon sample "$out/gpt2" --prompt "def " --max-tokens $tokens --seed 1
