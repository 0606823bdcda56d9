"""Apply specs to a large model's files: the memory that `surgery apply --no-load` takes beside the model's size.

    python examples/apply_large.py                        # 2 GB of random Llama shards, in a temporary folder
    python examples/apply_large.py --gigabytes 8 lora

Writes a Llama of random bfloat16 weights in shards of 1 GB, and applies each spec in a process of its own, whose peak
memory is told. Decompositions are of the smaller weights alone, since those of the others take minutes each.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from pathlib import Path

from merge_large import measured, write_base

SMALL = ["--target", "**.k_proj"]
SPECS = {"lora": [], "dora": [], "pissa": SMALL, "svft": SMALL}


def main() -> None:
    asked = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    asked.add_argument("--gigabytes", type=float, default=2)
    asked.add_argument("--folder", help="where to write")
    asked.add_argument("specs", nargs="*", default=[*SPECS])
    options = asked.parse_args()
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        os.chdir(folder)
        largest = write_base(options.gigabytes)
        size = sum(path.stat().st_size for path in Path("base").iterdir())
        print(f"model      {size / 1e9:.2f} GB, the largest tensor {largest / 1e9:.3f} GB")
        idle, *_ = measured([sys.executable, "-m", "surgery", "plan", "lora", "base", "-q"])
        print(f"plan       {idle / 1e9:.2f} GB of memory: no weight is read")
        for spec in options.specs:
            used, seconds, worked = measured([sys.executable, "-m", "surgery", "apply", spec, "base", "-o", spec,
                                              "--no-load", "-q", *SPECS.get(spec, [])])
            saved = sum(path.stat().st_size for path in Path(spec).iterdir())
            print(f"{spec:10} {used / 1e9:.2f} GB at its peak, {worked:.0f} s of work; "
                  f"the adapter {saved / 1e9:.3f} GB")


if __name__ == "__main__":
    main()
