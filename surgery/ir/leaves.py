"""The leaves of expressions, and what stands in them for a while: a row each."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from fractions import Fraction
from typing import Any

from surgery.ir.expression import Expr, NoiseLaw
from surgery.ir.notation_forms import ATOM, as_its_argument, last_name, number, ones, symbol
from surgery.ir.notation_forms import undecided as undecided_notation
from surgery.ir.shape_rules import dropped, exactly, same
from surgery.ir.sizes import Dim, known_shape
from surgery.ir.table import (
    ACTING,
    IN_STEP,
    OF_A_SPEC,
    ON_INPUT,
    Law,
    Linear,
    Memory,
    Operation,
    Orthogonal,
    Source,
    Stage,
    Transpose,
)


def _is_key(node: Expr) -> bool:
    return isinstance(node.data, str) and node.data.count(".") == 1


def _eye(node: Expr, args: list, leaves: Mapping[str, Any]) -> Any:
    import torch

    like = leaves["weight"]
    shape = known_shape(node.shape)
    return torch.eye(shape[-1], dtype=like.dtype, device=like.device).expand(shape)


def _leaf(name: str, doc: str, says: str, holds: Callable[[Expr], bool], **more: Any) -> Operation:
    """A tensor or a number that is there already."""
    return Operation(name, 0, None, None, doc, law=Law(says, holds), **{"memory": Memory.GIVEN, **more})


LEAVES = [
    _leaf("weight", "the frozen W", "[out, in]", lambda n: len(n.shape) == 2 and n.data is None, of_layer=True,
          text="layer.matrix(dtype)", source=Source.LAYER, evaluate=lambda node, args, leaves: leaves["weight"],
          notation=symbol("W")),
    # As a program has it that reads no more of W: no copy of it in the program's dtype is made.
    _leaf("weight_squares", "Σ W² over each row (1) or column (0)", "a vector, and an axis",
          lambda n: len(n.shape) == 1 and n.data in (0, 1), of_layer=True, stage=ACTING,
          text="layer.squares({data}, dtype)", source=Source.LAYER,
          evaluate=lambda node, args, leaves: leaves["weight"].square().sum(node.data)),
    _leaf("bias", "the frozen b", "[out]", lambda n: len(n.shape) == 1 and n.data is None,
          text="layer.offset(dtype)", source=Source.LAYER, evaluate=lambda node, args, leaves: leaves["bias"],
          notation=symbol("b")),
    # Of a start alone, which is computed once: no program reads them.
    _leaf("gradient", "the gradient of the loss in W, of data", "[out, in]",
          lambda n: len(n.shape) == 2 and n.data is None,
          stage=OF_A_SPEC, evaluate=lambda node, args, leaves: leaves["gradient"], notation=symbol("G")),
    _leaf("inputs", "Σ x xᵀ over the layer's inputs, of data", "[in, in]",
          lambda n: len(n.shape) == 2 and n.shape[0] == n.shape[1] and n.data is None,
          stage=OF_A_SPEC, evaluate=lambda node, args, leaves: leaves["inputs"], notation=symbol("C")),
    _leaf("param", "a parameter", "a key: step.name", _is_key, text="leaves[{data!r}]", source=Source.ADAPTER,
          evaluate=lambda node, args, leaves: leaves[node.data], notation=last_name),
    _leaf("places", "places of entries, never trained", "a key: step.name", _is_key, whole=True,
          text="leaves[{data!r}]", source=Source.ADAPTER, evaluate=lambda node, args, leaves: leaves[node.data],
          notation=last_name),
    # Its dense meaning is that of evaluation, unless a draw is given. A program of training reads it as a parameter.
    _leaf("noise", "what is drawn anew in every training step", "a key, a law and a mean",
          lambda n: isinstance(n.data, NoiseLaw), stage=Stage.ELABORATED | Stage.SIMPLIFIED, source=Source.DRAWN,
          evaluate=lambda node, args, leaves: leaves.get(node.data.key, leaves["weight"].new_full(
              known_shape(node.shape), node.data.mean)),
          notation=lambda maths, node: (node.data.key.rpartition(".")[2], ATOM)),
    _leaf("const", "a number", "one number", lambda n: not n.shape and isinstance(n.data, (int, float, Fraction, Dim))
          and not isinstance(n.data, bool), is_inline=True,
          text=lambda node, args: repr(float(node.data)), evaluate=lambda node, args, leaves: float(node.data),
          notation=number),
    _leaf("eye", "the identity, or a stack of them", "square, and no data",
          lambda n: len(n.shape) >= 2 and n.shape[-1] == n.shape[-2] and n.data is None, is_structured=True,
          transpose=Transpose.KNOWN, orthogonal=Orthogonal.ALWAYS, text="layer.eye({shape}, dtype)", evaluate=_eye,
          notation=symbol("I")),
    # It is made and not given: a matrix of one number costs what any other does.
    _leaf("fill", "a tensor of one number", "a float in a shape", lambda n: isinstance(n.data, float) and bool(n.shape),
          memory=Memory.EITHER, transpose=Transpose.KNOWN, text="layer.fill({shape}, {data!r}, dtype)",
          evaluate=lambda node, args, leaves: leaves["weight"].new_full(node.shape, node.data),
          notation=ones),
    _leaf("x", "the input", "[tokens, features], or ids of rows",
          lambda n: len(n.shape) == 2 and n.data in (None, "ids"), stage=ON_INPUT,
          source=Source.INPUT, evaluate=lambda node, args, leaves: leaves["x"]),
    _leaf("value", "what a body reads of the set-up, by number", "a number", lambda n: isinstance(n.data, int),
          stage=IN_STEP, source=Source.SETUP, evaluate=lambda node, args, leaves: leaves[f"value {node.data}"]),
    _leaf("value_at", "places that a body reads of the set-up, by number", "a number",
          lambda n: isinstance(n.data, int), stage=IN_STEP, whole=True, source=Source.SETUP,
          evaluate=lambda node, args, leaves: leaves[f"value {node.data}"]),
    _leaf("kept", "what a backward pass reads of the forward pass, by number", "a number",
          lambda n: isinstance(n.data, int), stage=IN_STEP,
          source=Source.FORWARD, evaluate=lambda node, args, leaves: leaves[f"kept {node.data}"]),
    _leaf("grad", "the gradient of the output", "no data", lambda n: n.data is None, stage=IN_STEP,
          source=Source.BACKWARD, evaluate=lambda node, args, leaves: leaves["grad"]),
]

PASSING = [
    # As long as a condition on sizes is not decided.
    Operation("undecided", None, None, None, "what depends on a condition on sizes that is not decided",
              stage=Stage.ELABORATED | Stage.SIMPLIFIED, law=Law("what it can be", lambda n: bool(n.args)),
              notation=undecided_notation),
    # In the weight there is nothing to drop: it acts on the input of an update.
    Operation("drop", 1, lambda mask, a: exactly(2, "a matrix", dropped(mask, a)), lambda mask, a: a,
              "an update that sees its input through dropout", stage=OF_A_SPEC, sizes=("share", "step"),
              is_transparent=True, linear=Linear.TOGETHER, transpose=Transpose.KNOWN, memory=Memory.VIEW,
              notation=as_its_argument),
    Operation("built", 1, same, lambda a: a, "a matrix that the set-up makes, whatever it is made of", stage=Stage.NONE,
              is_transparent=True),
    # A program's alone. The gradient of a product is new memory, where that of a sum or a view is not.
    Operation("apart", 1, same, lambda a: a * 1, "a parameter, whose gradient has memory of its own", stage=Stage.NONE,
              memory=Memory.NEW),
    Operation("forward", 0, None, None, "a value of the forward pass in a gradient", stage=Stage.NONE,
              law=Law("an expression", lambda n: isinstance(n.data, Expr))),
]
ROWS = [*LEAVES, *PASSING]
