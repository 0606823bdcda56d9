"""`plan` reads a configuration and no weight: a model of seventy billion parameters takes the memory of the libraries
alone."""

import json
import subprocess
import sys
from pathlib import Path

# As many as Llama-3-70B has, in a quarter of its layers, each twice as wide.
BLOCKS, WIDE, KEYS, INNER, WORDS = 20, 16384, 2048, 57344, 128256
LLAMA_70B = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": WIDE,
             "intermediate_size": INNER, "num_hidden_layers": BLOCKS, "num_attention_heads": 128,
             "num_key_value_heads": 16, "vocab_size": WORDS, "dtype": "bfloat16", "tie_word_embeddings": False}
# The peak of this process alone; what the system keeps for `getrusage` may be that of the process which started it.
RUN = """
import re, sys
from surgery.cli.main import main
try:
    main()
finally:
    print(re.search(r"VmHWM:\\s+(\\d+) kB", open("/proc/self/status").read())[1], file=sys.stderr)
"""


def test_seventy_billion_parameters_are_planned_in_a_gibibyte(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(LLAMA_70B))
    result = subprocess.run([sys.executable, "-c", RUN, "plan", "sora", str(tmp_path), "--json"], capture_output=True,
                            text=True)
    plan = json.loads(result.stdout)
    block = 2 * WIDE**2 + 2 * KEYS * WIDE + 3 * INNER * WIDE + 2 * WIDE
    assert plan["base"] == BLOCKS * block + 2 * WORDS * WIDE + WIDE > 70e9
    assert plan["memory_bytes"]["base"] == 2 * plan["base"] and len(plan["modules"]) == 7 * BLOCKS
    assert int(result.stderr) * 1024 < 2**30
