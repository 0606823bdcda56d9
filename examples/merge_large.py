"""Merge an adapter into a large model's files: memory and time, beside `cp -r` of the same folder.

    python examples/merge_large.py                        # 8 GB of random Llama shards, in a temporary folder
    python examples/merge_large.py --gigabytes 2 --jobs 2 --kill 3

Writes a Llama of random bfloat16 weights in shards of 1 GB, saves a rank-16 LoRA for it, and merges it with `surgery
merge` in a process of its own, whose peak memory is told. `--kill N`: the merge is killed N times at random moments and
run again, and the files must come out the same, bit for bit.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import save_file

SHARD = 1 << 30
MERGE = [sys.executable, "-m", "surgery", "merge", "adapter", "-q"]


def main() -> None:
    asked = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    asked.add_argument("--gigabytes", type=float, default=8)
    asked.add_argument("--jobs", type=int, default=1)
    asked.add_argument("--kill", type=int, default=0)
    asked.add_argument("--spec", default="lora")
    asked.add_argument("--folder", help="where to write; three times the size is needed (four with --kill)")
    options = asked.parse_args()
    if options.folder:
        Path(options.folder).mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        os.chdir(folder)
        largest = write_base(llama(options.gigabytes))
        write_adapter(options.spec)
        size = sum(path.stat().st_size for path in Path("base").iterdir())
        print(f"model      {size / 1e9:.2f} GB, the largest tensor {largest / 1e9:.3f} GB")
        _, copied, worked = measured(["sh", "-c", "cp -r base copy && sync"])
        print(f"cp, sync   {copied:.1f} s, of which the processor worked {worked:.1f} s")
        shutil.rmtree("copy")
        idle, *_ = measured([sys.executable, "-m", "surgery", "plan", options.spec, "base", "-q"])
        used, seconds, worked = measured([*MERGE, "-o", "merged", "--jobs", str(options.jobs)])
        print(f"merge      {seconds:.1f} s, of which the processors worked {worked:.1f} s: read, computed, written, "
              "flushed to the disk, read back")
        print(f"memory     {used / 1e9:.2f} GB at its peak; `surgery plan`, which reads no weight: {idle / 1e9:.2f} GB")
        if options.kill:
            killed(options.kill, options.jobs, seconds)


def llama(gigabytes: float) -> dict:
    """The shape of a Llama of about so many gigabytes, in the words of its configuration."""
    hidden = 4096 if gigabytes >= 4 else 2048
    shape = dict(hidden_size=hidden, intermediate_size=7 * hidden // 2, num_attention_heads=32, num_key_value_heads=8,
                 vocab_size=128256 if gigabytes >= 4 else 32000, num_hidden_layers=1)
    one, two = (sum(map(bytes_of, shapes_of(shape | dict(num_hidden_layers=n)).values())) for n in (1, 2))
    return shape | dict(num_hidden_layers=max(1, round((gigabytes * 1e9 - one) / (two - one)) + 1))


def shapes_of(shape: dict) -> dict[str, tuple[int, ...]]:
    """The shapes of a Llama's tensors by their names."""
    from transformers import LlamaConfig, LlamaForCausalLM

    with torch.device("meta"):
        model = LlamaForCausalLM(LlamaConfig(**shape))
    return {name: tuple(tensor.shape) for name, tensor in model.named_parameters()}


def bytes_of(shape: tuple[int, ...]) -> int:
    return 2 * torch.Size(shape).numel()


def write_base(shape: dict, shard: int = SHARD, zeros: bool = False) -> int:
    """A Llama of that shape in `base`, made shard by shard; the bytes of its largest tensor."""
    from transformers import LlamaConfig

    LlamaConfig(**shape, architectures=["LlamaForCausalLM"], dtype="bfloat16").save_pretrained("base")
    shapes = shapes_of(shape)
    write_shards(shapes, shard, write_zeros if zeros else write_random)
    return max(map(bytes_of, shapes.values()))


def write_shards(shapes: dict[str, tuple[int, ...]], most: int, write: Callable[[dict, str], None]) -> None:
    """Files of so many bytes at most (of one tensor at least), and the index of them."""
    shards: list[dict] = [{}]
    for name, shape in shapes.items():
        if shards[-1] and sum(map(bytes_of, shards[-1].values())) + bytes_of(shape) > most:
            shards.append({})
        shards[-1][name] = shape
    where = {}
    for i, forms in enumerate(shards):
        file = f"model-{i + 1:05}-of-{len(shards):05}.safetensors"
        write(forms, f"base/{file}")
        where |= dict.fromkeys(forms, file)
    total = sum(map(bytes_of, shapes.values()))
    Path("base/model.safetensors.index.json").write_text(
        json.dumps({"metadata": {"total_size": total}, "weight_map": where}, indent=2))


def write_random(forms: dict[str, tuple[int, ...]], path: str) -> None:
    save_file({n: (0.02 * torch.randn(s)).bfloat16() for n, s in forms.items()}, path, {"format": "pt"})


def write_zeros(forms: dict[str, tuple[int, ...]], path: str) -> None:
    """A file with a header, and a hole in the place of its numbers: it reads as zeros and takes no room on a disk."""
    header, end = {}, 0
    for name, shape in forms.items():
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [end, end + bytes_of(shape)]}
        end += bytes_of(shape)
    text = json.dumps(header).encode()
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + end)


def write_adapter(spec: str) -> None:
    """A moved adapter, made on a skeleton: its tensors start from no weight."""
    import surgery
    from surgery.models.loading import skeleton
    from surgery.runtime.apply import prepare
    from surgery.runtime.save import save

    surgeon = prepare(skeleton("base"), surgery.load(spec))
    values = {name: 0.02 * torch.randn(tensor.shape) for name, tensor in surgeon.named_tensors().items()}
    save(surgeon, "adapter", base_model="base", state=values)


def measured(command: list[str]) -> tuple[int, float, float]:
    """The largest resident memory of a process, in bytes, its seconds, and those that it worked."""
    code = ("import resource, subprocess, sys\nsubprocess.run(sys.argv[1:], check=True, stdout=subprocess.DEVNULL)\n"
            "used = resource.getrusage(resource.RUSAGE_CHILDREN)\n"
            "print(used.ru_maxrss, used.ru_utime + used.ru_stime)")
    begin = time.monotonic()
    found = subprocess.run([sys.executable, "-c", code, *command], check=True, capture_output=True, text=True)
    memory, worked = found.stdout.split()
    return int(memory) * (1 if sys.platform == "darwin" else 1024), time.monotonic() - begin, float(worked)


def killed(times: int, jobs: int, seconds: float) -> None:
    """Kill a merge at random moments; what goes on after each, and what one does that was not killed, is the same."""
    draw = random.Random(0)
    for _ in range(times):
        running = subprocess.Popen([*MERGE, "-o", "again", "--jobs", str(jobs)], stdout=subprocess.DEVNULL)
        try:
            running.wait(draw.uniform(3, max(4, seconds)))
        except subprocess.TimeoutExpired:
            running.kill()
            running.wait()
            left = [p for p in Path().glob(".surgery-*/journal")]
            steps = len(left[0].read_text().splitlines()) - 1 if left else 0
            print(f"killed     with {steps} steps noted")
        else:
            same("done before it was killed")
            shutil.rmtree("again")
    _, seconds, _ = measured([*MERGE, "-o", "again", "--jobs", str(jobs)])
    same(f"run again  {seconds:.1f} s")


def same(what: str) -> None:
    subprocess.run(["diff", "-r", "merged", "again"], check=True)
    print(f"{what}, the same bit for bit")


if __name__ == "__main__":
    main()
