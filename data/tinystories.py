"""TinyStories (arXiv 2305.07759), the version written by GPT-4 alone: short stories of few words.

    python data/tinystories.py --out data/tinystories                        # downloads 2.2 GB
    python data/tinystories.py --out data/tinystories --small                # 22 MB, to try
    python data/tinystories.py --out data/tinystories --from stories.txt     # no network

2.7 million stories, 2.2 GB of text; with bpe:4096 about 0.55 billion tokens, 1.1 GB on disk. Every
story is a document; 0.5 % of them are held out by their hash. The downloaded text is kept in
OUT/.download until the shards are finished.
"""

import shutil
import sys

import common

from nanonormuon.text.prepare import prepare

REPO, SEPARATOR = "roneneldan/TinyStories", "<|endoftext|>"
TRAIN, SMALL = "TinyStoriesV2-GPT4-train.txt", "TinyStoriesV2-GPT4-valid.txt"


def main() -> None:
    parser = common.parser(__doc__, "the text, if it is here already", tokenizer="bpe:4096")
    parser.add_argument("--small", action="store_true", help="the published validation part alone")
    options = parser.parse_args()
    folder = options.out / ".download"
    if not (files := options.source):
        files = [common.from_hub(REPO, SMALL if options.small else TRAIN, folder)]
    prepare(files, options.out, options.tokenizer, 0.005, separator=SEPARATOR)
    shutil.rmtree(folder, ignore_errors=True)
    print(f"next: normuon-train run demo data.path={options.out}")


if __name__ == "__main__":
    sys.exit(common.run(main))
