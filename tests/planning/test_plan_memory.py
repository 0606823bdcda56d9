"""`plan` reads a configuration and no weight: a model of seventy billion parameters takes no more than a small
one, beside the libraries."""

import json
import re
from pathlib import Path

import forked

from surgery.cli.main import main

# As many as Llama-3-70B has, in a quarter of its layers, each twice as wide.
BLOCKS, WIDE, KEYS, INNER, WORDS = 20, 16384, 2048, 57344, 128256
LLAMA_70B = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": WIDE,
             "intermediate_size": INNER, "num_hidden_layers": BLOCKS, "num_attention_heads": 128,
             "num_key_value_heads": 16, "vocab_size": WORDS, "dtype": "bfloat16", "tie_word_embeddings": False}


def resident(what: str) -> int:
    """Bytes of this process: `VmRSS`, as it is, or `VmHWM`, at its peak, which of a copy is at first what it began with."""
    return 1024 * int(re.search(rf"{what}:\s+(\d+) kB", Path("/proc/self/status").read_text())[1])


def planned(folder: Path) -> None:
    before = resident("VmRSS")
    try:
        main(["plan", "sora", str(folder), "--json"])
    finally:
        (folder / "taken").write_text(str(resident("VmHWM") - before))


def test_seventy_billion_parameters_are_planned_in_little_memory(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(LLAMA_70B))
    plan = json.loads(forked.run(lambda: planned(tmp_path)))
    block = 2 * WIDE**2 + 2 * KEYS * WIDE + 3 * INNER * WIDE + 2 * WIDE
    assert plan["base"] == BLOCKS * block + 2 * WORDS * WIDE + WIDE > 70e9
    assert plan["memory_bytes"]["base"] == 2 * plan["base"] and len(plan["modules"]) == 7 * BLOCKS
    assert int((tmp_path / "taken").read_text()) < 2**28
