"""Any text data set of the Hugging Face hub, through the Parquet files that the hub makes of each.

    python data/hf_dataset.py wikitext --config wikitext-2-raw-v1 --out data/wikitext
    python data/hf_dataset.py HuggingFaceFW/fineweb-edu --config sample-10BT --files 2 --out edu
    python data/hf_dataset.py NAME --list                                  # configurations, files
    python data/hf_dataset.py NAME --out data/x --from a.parquet b.parquet # no network

It costs the download of --files files (the first of the split; all without it), which are kept in
OUT/.download until the shards are finished, and a second of a core for about 10 MB of text.
"""

import shutil
import sys
from collections import Counter

import common

from nanonormuon.errors import DataError
from nanonormuon.runtime.packages import need
from nanonormuon.text.prepare import prepare

REVISION = "refs/convert/parquet"  # CONFIG/SPLIT/0000.parquet, for every data set


def published(name: str) -> list[str]:
    hub = need("huggingface_hub", name)
    try:
        files = hub.HfApi().list_repo_files(name, repo_type="dataset", revision=REVISION)
    except Exception as error:  # whatever a network library raises
        raise DataError(f"{name}: {' '.join(str(error).split())[:300]}") from None
    return sorted(file for file in files if file.endswith(".parquet"))


def main() -> None:
    parser = common.parser(__doc__, "Parquet files at hand", tokenizer="bpe:4096", out=False)
    parser.add_argument("name", help="owner/name of the data set, or name")
    parser.add_argument("--list", action="store_true", help="show what there is, and stop")
    parser.add_argument("--config", default="default", help="[%(default)s]")
    parser.add_argument("--split", default="train", help="[%(default)s]")
    parser.add_argument("--files", type=int, default=0, help="at most so many; 0: all")
    parser.add_argument("--text-field", default="text", help="column of the text [%(default)s]")
    parser.add_argument("--val", type=float, default=0.005, help="share held out [%(default)s]")
    options = parser.parse_args()
    if options.out is None and not options.list:
        parser.error("--out DIR is needed")
    files = options.source
    if not files:
        all_files = published(options.name)
        counts = Counter(file.rpartition("/")[0] for file in all_files)
        if options.list:
            for folder, count in counts.items():
                print(f"--config {folder.replace('/', ' --split ', 1)}: {count} files")
            return
        wanted = f"{options.config}/{options.split}"
        names = [file for file in all_files if file.rpartition("/")[0] == wanted]
        if not names:
            raise DataError(f"{options.name}: no {wanted}, found {', '.join(counts) or 'nothing'}")
        folder, names = options.out / ".download", names[: options.files or None]
        print(f"{len(names)} files of {counts[wanted]}")
        files = [common.from_hub(options.name, file, folder, REVISION) for file in names]
    prepare(files, options.out, options.tokenizer, options.val, text_field=options.text_field)
    shutil.rmtree(options.out / ".download", ignore_errors=True)
    print(f"next: normuon-train run demo data.path={options.out}")


if __name__ == "__main__":
    sys.exit(common.run(main))
