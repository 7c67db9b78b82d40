#!/usr/bin/env bash
# What a machine with a CUDA GPU should be asked, usually in under 8 minutes. Needs the package
# installed with its test requirements.
#
#     scripts/gpu_check.sh OUT_FOLDER
#
# OUT_FOLDER/results.json holds every part's exit code, seconds and JSON or last line, also when the
# script is stopped half way; a part that fails does not stop the others. Fails if one of them did.
set -uo pipefail
: "${1:?usage: scripts/gpu_check.sh OUT_FOLDER}"
out=$(mkdir -p "$1" && cd "$1" && pwd) || exit 1
cd "$(dirname "$0")/.." || exit 1
python -c 'import torch; assert torch.cuda.is_available(), "no CUDA GPU"' || exit 1
export NANONORMUON_CACHE="$out/cache"
rm -f "$out/parts.txt"

results() {
    python - "$out" <<'END'
import json, pathlib, sys

out, found = pathlib.Path(sys.argv[1]), {}
for line in (out / "parts.txt").read_text().splitlines():
    name, code, seconds = line.split()
    text = (out / f"{name}.log").read_text(errors="replace").strip()
    said = (text.splitlines() or [""])[-1]
    for candidate in (text, said):
        try:
            said = json.loads(candidate)
            break
        except ValueError:
            pass
    found[name] = {"exit_code": int(code), "seconds": int(seconds), "said": said}
(out / "results.json").write_text(json.dumps(found, indent=1) + "\n")
failed = [name for name, part in found.items() if part["exit_code"]]
print(f"{len(found) - len(failed)} of {len(found)} parts passed: {out / 'results.json'}", *failed)
sys.exit(bool(failed))
END
}
trap results EXIT

run() { # NAME SECONDS COMMAND...
    local name=$1 limit=$2 start=$SECONDS
    shift 2
    echo "== $name: $*"
    timeout "$limit" "$@" > "$out/$name.log" 2>&1
    echo "$name $? $((SECONDS - start))" | tee -a "$out/parts.txt"
}
small="train.compile=on data.seq_len=256 train.sample_tokens=0 train.steps=20 train.eval_every=0 train.save_every=0"
run doctor 120 normuon-train doctor --json
run tests 120 python -m pytest -q tests/test_normuon.py tests/test_model.py tests/test_gpu.py
run optimizer 90 python scripts/bench_optimizer.py --device cuda
run demo 90 normuon-train run demo train.sample_tokens=0 --out "$out/demo"
run ddp 60 torchrun --standalone --nproc_per_node=1 train.py demo $small --out "$out/ddp"
run fsdp 60 torchrun --standalone --nproc_per_node=1 train.py demo $small train.parallel=fsdp --out "$out/fsdp"
# 300 steps of the 124M model on whatever Python lies here: throughput and memory, no result to quote
run data 120 python data/pysource.py --out "$out/python" --tokenizer bpe:4096 --site-packages
run step 120 python scripts/bench_train.py gpt2-124m data.path="$out/python" train.batch_tokens=65536
run gpt2 180 normuon-train run gpt2-124m data.path="$out/python" train.batch_tokens=65536 train.steps=300 \
    train.compile=on train.sample_tokens=0 data.val_tokens=1048576 --out "$out/gpt2"
