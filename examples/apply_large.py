"""Apply specs to a large model's files: the memory that `surgery apply --no-load` takes beside the model's size.

    python examples/apply_large.py                        # 2 GB of random Llama shards, in a temporary folder
    python examples/apply_large.py --gigabytes 8 lora
    python examples/apply_large.py --layers 80 --zeros lora     # the shape of Llama 3 70B, 141 GB that take no disk
    python examples/apply_large.py --layers 2 dora              # two layers of it, of random numbers

Writes a Llama of bfloat16 weights in shards, and plans and applies each spec in a process of its own, whose peak memory
is told. Decompositions are of the smaller weights alone, since those of the others take minutes each. `--zeros`: the
shards are files of holes, which read as zeros; a spec that divides by a norm of W has no start there.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from pathlib import Path

from merge_large import SHARD, llama, measured, write_base

SMALL = ["--target", "**.k_proj"]
SPECS = {"lora": [], "dora": [], "pissa": SMALL, "svft": SMALL}
LLAMA_70B = dict(hidden_size=8192, intermediate_size=28672, num_attention_heads=64, num_key_value_heads=8,
                 vocab_size=128256, rope_theta=500000.0)
SHARD_70B = 5 * 10**9  # thirty files of it, as it is published
SURGERY = [sys.executable, "-m", "surgery"]


def main() -> None:
    asked = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    asked.add_argument("--gigabytes", type=float, default=2)
    asked.add_argument("--layers", type=int, help="so many of the 80 layers of Llama 3 70B")
    asked.add_argument("--zeros", action="store_true", help="holes in the place of random numbers")
    asked.add_argument("--folder", help="where to write")
    asked.add_argument("specs", nargs="*", default=[*SPECS])
    options = asked.parse_args()
    if options.folder:
        Path(options.folder).mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        os.chdir(folder)
        if options.layers:
            largest = write_base(LLAMA_70B | dict(num_hidden_layers=options.layers), SHARD_70B, options.zeros)
        else:
            largest = write_base(llama(options.gigabytes), SHARD, options.zeros)
        files = [path.stat() for path in Path("base").iterdir()]
        print(f"model      {sum(f.st_size for f in files) / 1e9:.2f} GB in {len(files) - 2} shards, the largest tensor "
              f"{largest / 1e9:.3f} GB; on the disk {512 * sum(f.st_blocks for f in files) / 1e9:.2f} GB")
        for spec in options.specs:
            used, seconds, worked = measured([*SURGERY, "plan", spec, "base", "-q", *SPECS.get(spec, [])])
            print(f"plan       {spec}: {used / 1e9:.2f} GB of memory, {worked:.0f} s of work; no weight is read")
            used, seconds, worked = measured([*SURGERY, "apply", spec, "base", "-o", spec, "--no-load", "-q",
                                              *SPECS.get(spec, [])])
            saved = sum(path.stat().st_size for path in Path(spec).iterdir())
            print(f"{spec:10} {used / 1e9:.2f} GB at its peak, {seconds:.0f} s, of which the processors worked "
                  f"{worked:.0f} s; the adapter {saved / 1e9:.3f} GB")


if __name__ == "__main__":
    main()
