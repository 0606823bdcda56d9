"""The table of PEFT's methods: a row each, the one place that import, export, `bench` and the parity test read.

A new row needs a spec, the names of its parameters in PEFT's configuration, and where each of PEFT's tensors goes; it
stands in the table of its kind. Checked against PEFT 0.21.2 by tests/peft/test_peft_parity.py; what PEFT does otherwise
than the paper is in tests/peft_differences.py, each with its size. What has no single W' at all is named by
`language.unsupported_methods`.
"""

from __future__ import annotations

from surgery.peft.table.additive import ADDITIVE
from surgery.peft.table.lora import LORA
from surgery.peft.table.method import Method
from surgery.peft.table.rotations import ROTATIONS
from surgery.peft.table.scales_and_biases import SCALES
from surgery.peft.table.sparse import PLACED

METHODS: tuple[Method, ...] = (*LORA, *ADDITIVE, *PLACED, *ROTATIONS, *SCALES)

#: The types of PEFT's that change weights and have no row, each with the reason.
WITHOUT_ROW: dict[str, str] = {
    "ADALORA": "a schedule takes ranks away as it trains, others in each module, and its update is divided by a count "
               "of those that are left, which is kept beside the formula",
    "ADAMSS": "it sorts the rows of W into clusters by k-means when it starts, and each cluster has a rank of its own",
    "FROD": "it starts from a decomposition of all weights of one kind together, and a start here is made of one "
            "weight",
    "OSF": "as it trains, its gradients are kept orthogonal to the largest singular vectors of W, which no formula of "
           "W' says",
    "PEANUT": "its update is a network over W, of any depth and with any of transformers' activation functions",
    "PVERA": "as it trains, it draws noise for each token, as large as the token says; only its mean is one W'",
    "TRAINABLE_TOKENS": "it trains those rows of an embedding that a list of tokens names, and a spec has no lists",
}
