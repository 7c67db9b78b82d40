"""FineWeb as GPT-2 tokens, in the shards that modded-nanogpt publishes and trains on.

    python data/fineweb.py --out data/fineweb10B --shards 8            # 1.6 GB + 0.2 GB to validate
    python data/fineweb.py --out data/fineweb100B --which 100B --shards 100
    python data/fineweb.py --out data/fineweb10B --from DIR            # files that are here already

| --which | repository | training shards |
|---|---|---|
| 10B | kjj0/fineweb10B-gpt2 | 103 |
| 100B | kjj0/fineweb100B-gpt2 | 1,030 |
| edu-10B | kjj0/finewebedu10B-gpt2 | 99 |

A shard has 100M tokens, 200 MB (the last of a set fewer), and so has the validation shard. The
track3 recipes read 18 of them, track3-adamw 27. Downloads go on where they broke off.
"""

import sys

import common

from nanonormuon.storage.shards import check_ids, read_shard

SETS = {
    "10B": ("kjj0/fineweb10B-gpt2", "fineweb", 103),
    "100B": ("kjj0/fineweb100B-gpt2", "fineweb", 1030),
    "edu-10B": ("kjj0/finewebedu10B-gpt2", "finewebedu", 99),
}


def main() -> None:
    parser = common.parser(__doc__, "directory or files to take the shards from")
    parser.add_argument("--which", choices=SETS, default="10B", help="[%(default)s]")
    parser.add_argument("--shards", type=int, default=8, help="training shards [%(default)s]")
    options = parser.parse_args()
    repo, prefix, most = SETS[options.which]
    if not 1 <= options.shards <= most:
        parser.error(f"--shards {options.shards}: {repo} has 1 to {most}")
    options.out.mkdir(parents=True, exist_ok=True)
    names = [f"{prefix}_val_000000.bin"]
    names += [f"{prefix}_train_{i:06d}.bin" for i in range(1, options.shards + 1)]
    total = 0
    for name in names:
        if options.source:
            file = common.from_folder(options.source, name, options.out)
        else:
            file = common.from_hub(repo, name, options.out)
        tokens = read_shard(file)
        check_ids(tokens, 50_257, file)
        total += len(tokens)
    print(f"{total:,} tokens in {len(names)} shards, the first for validation")
    print(f"next: normuon-train run gpt2-124m data.path={options.out} data.tokenizer=gpt2")


if __name__ == "__main__":
    sys.exit(common.run(main))
