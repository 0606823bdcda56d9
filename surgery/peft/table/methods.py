"""The table of PEFT's methods: a row each, the one place that import, export, `bench` and the parity test read.

A new row needs a spec, the names of its parameters in PEFT's configuration, and where each of PEFT's tensors goes; it
stands in the table of its kind. Checked against PEFT 0.21.2 by tests/peft/test_peft_parity.py; what PEFT does otherwise
than the paper is in tests/peft_differences.py, each with its size.
"""

from __future__ import annotations

from surgery.peft.table.additive import ADDITIVE
from surgery.peft.table.lora import LORA
from surgery.peft.table.method import Method
from surgery.peft.table.rotations import ROTATIONS
from surgery.peft.table.scales_and_biases import SCALES
from surgery.peft.table.sparse import PLACED

METHODS: tuple[Method, ...] = (*LORA, *ADDITIVE, *PLACED, *ROTATIONS, *SCALES)
