"""`plan` reads a configuration and no weight: a model of seventy billion parameters takes the memory of the libraries
alone."""

import json
import subprocess
import sys
from pathlib import Path

LLAMA_70B = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 8192,
             "intermediate_size": 28672,
             "num_hidden_layers": 80, "num_attention_heads": 64, "num_key_value_heads": 8, "vocab_size": 128256,
             "dtype": "bfloat16", "tie_word_embeddings": False}
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
    shapes = [(8192, 8192), (1024, 8192), (1024, 8192), (28672, 8192), (28672, 8192), (8192, 28672)]
    assert plan["base"] == 80 * (2 * 8192**2 + sum(m * n for m, n in shapes[1:]) + 2 * 8192) + 2 * 128256 * 8192 + 8192
    assert plan["memory_bytes"]["base"] == 2 * plan["base"] and len(plan["modules"]) == 7 * 80
    assert int(result.stderr) * 1024 < 2**30
