"""How a weight acts on activations: apply(E, x) is x Eᵀ and matrix(E) is E, for every kind of E in the tables."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache, lru_cache

import torch
from operands import MIXED, NAMES, every_call, expression, n, tensors
from torch import Tensor

from surgery.codegen import apply_to_activations
from surgery.codegen.apply_to_activations import apply, matrix, turned
from surgery.codegen.fuse_blocks import blockwise
from surgery.codegen.fuse_low_rank import thinly
from surgery.codegen.images_and_ids import enter_in_parts, split_dropout
from surgery.ir.builders import summands, total
from surgery.ir.dense import dense
from surgery.ir.expression import Expr, in_evaluation, walk
from surgery.ir.operations import PRIMITIVES, make
from surgery.ir.sizes import TOKENS
from surgery.ir.verifier import CHEAPEST, LOWERED, MATERIALISED, verify
from surgery.rewrite.cheaper_forms import CHEAP, JOINED, cheapest
from surgery.rewrite.low_rank import factors, low_rank_turn
from surgery.rewrite.normal_form import RULES, is_orthogonal, is_skew

EXACT = 1e-10

# What the operations of activations mean for a linear layer in evaluation, naively.
MEANING = {
    "x": lambda node, leaves: leaves["x"],
    "param": lambda node, leaves: leaves[node.data],
    "places": lambda node, leaves: leaves[node.data],
    "weight": lambda node, leaves: leaves["weight"],
    "const": lambda node, leaves: torch.tensor(float(node.data), dtype=torch.float64),
    "fill": lambda node, leaves: torch.full(node.shape, node.data, dtype=torch.float64),
    "eye": lambda node, leaves: torch.eye(node.shape[-1], dtype=torch.float64).expand(node.shape),
    "frozen": lambda node, leaves, a: a @ leaves["weight"].mT,
    "frozen_back": lambda node, leaves, a: a @ leaves["weight"],
    "run": lambda node, leaves, a, m: a @ m.mT,
    "dropout": lambda node, leaves, a: a,
    "drop": lambda node, leaves, a: a,
    "split": lambda node, leaves, a: a.unflatten(-1, node.data),
    "join": lambda node, leaves, a: a.flatten(-2),
    "swap": lambda node, leaves, a: a.reshape(-1, *node.data).permute(0, 1, 3, 2, 4).reshape(a.shape),
}


def value(expr: Expr, leaves: dict[str, Tensor]) -> Tensor:
    """The value of a lowered expression."""
    values: dict[Expr, Tensor] = {}
    for node in walk(expr):
        args = [values[a] for a in node.args]
        if node.op in MEANING:
            values[node] = MEANING[node.op](node, leaves, *args)
        else:
            values[node] = PRIMITIVES[node.op].value(node.data, args, leaves["weight"])
    return values[expr]


# ---------------------------------------------------------------------------------------------------- matrices

@lru_cache
def matrices() -> tuple[Expr, ...]:
    """Every matrix that one primitive makes, alone and beside the frozen weight; the rules' examples; mixed ones."""
    texts = (*MIXED, *(rule.example for rule in (*RULES, *JOINED, *CHEAP)))
    found = dict.fromkeys(each for e in (*map(expression, texts), *every_call()) for each in _with_weight(e))
    return tuple(dict.fromkeys(map(cheapest, found)))


def _with_weight(e: Expr) -> Iterator[Expr]:
    yield from (e, _dropped(e)) if len(e.shape) == 2 else ()
    if e.shape == (n, n):
        weight = NAMES["W"]
        yield from (make("matmul", e, weight), make("matmul", weight, e), make("add", weight, _dropped(e)),
                    make("matmul", make("add", e, weight), _dropped(e)))


def _dropped(e: Expr) -> Expr:
    return Expr("drop", (e,), (0.5, "add_own"), e.shape)


@cache
def meant(e: Expr) -> Tensor:
    """The dense value of a matrix."""
    return dense(e, LEAVES)


def compare(result: Expr, e: Expr, a: Tensor, wanted: Tensor) -> None:
    """A lowered expression against its dense value, where that is finite."""
    found = value(result, {**LEAVES, "x": a})
    assert found.shape == wanted.shape, f"{result} for {e}"
    if wanted.isfinite().all():
        error = (found - wanted).norm() / (1 + wanted.norm())
        assert error <= EXACT, f"{result} for {e} is off by {error:.1e}"


LEAVES = tensors(1)  # positive ones, so that a square root is finite


def activations(e: Expr) -> tuple[Expr, Tensor]:
    """The input leaf of a matrix, and rows for it."""
    return Expr("x", (), None, (TOKENS, e.shape[1])), torch.randn(5, e.shape[1], dtype=torch.float64)


@torch.no_grad()
def test_a_matrix_acts_on_activations():
    for e in matrices():
        x, a = activations(e)
        y = apply(e, x)
        compare(verify(y, LOWERED), e, a, a @ meant(e).mT)


@torch.no_grad()
def test_factors_that_keep_to_blocks_are_joined():
    """Any run of them, and any sum, beside anything else; what has none is left as it is, and was tried above."""
    texts = ("block_diag(S) @ block_diag(Z) @ W",
             "W @ block_diag(S) @ kron(I(2), shuffle(2, 3)) @ block_diag(Z) @ diag(d)",
             "(W + p @ q.T) @ kron(I(4), K @ K) @ diag(d)",
             "diag(d) @ block_diag(S) @ P @ Q.T @ block_diag(cayley(skew(S)))",
             "(diag(d) + block_diag(S) @ diag(d)) @ W",
             "W @ (I(12) + diag(d) @ kron(I(2), shuffle(2, 3)) + 2 * block_diag(S))")
    for e in (*matrices(), *(each for text in texts for each in _with_weight(cheapest(expression(text))))):
        joined = blockwise(e := cheapest(e))
        if joined is not e:
            x, a = activations(e)
            compare(verify(apply(joined, x), LOWERED), e, a, a @ meant(e).mT)
    assert blockwise(NAMES["W"]) is NAMES["W"]
    for text in texts[1:]:
        e = cheapest(expression(text))
        assert blockwise(e) is not e


@torch.no_grad()
def test_low_rank_terms_are_made_of_two_thin_matrices():
    """Whatever their factors are made of; what has none is left as it is, and was tried above."""
    for e in matrices():
        x, a = activations(e)
        for thin in {thinly(e, trained) for trained in (frozenset(), frozenset({"own.P", "own.d"}))} - {e}:
            compare(verify(apply(thin, x), LOWERED), e, a, a @ meant(e).mT)
    assert thinly(NAMES["W"], frozenset()) is NAMES["W"]
    both = cheapest(expression("W + P @ Q.T + g * (diag(d) @ p @ q.T)"))
    keys = [frozenset(f"own.{name}" for name in names) for names in ("PQgdpq", "PQ", "")]
    assert [len(list(summands(thinly(both, trained)))) for trained in keys] == [2, 3, 2]


@torch.no_grad()
def test_a_matrix_acts_on_inputs_of_every_kind():
    """Where the layer alone knows how to read its input; each part that is seen through dropout by itself."""
    for e in matrices():
        x, a = activations(e)
        y = enter_in_parts(e, x)
        compare(verify(y, LOWERED), e, a, a @ meant(e).mT)


@torch.no_grad()
def test_a_matrix_is_built():
    for e in matrices():
        compare(verify(matrix(e), MATERIALISED), e, torch.empty(0), meant(e))
        compare(verify(turned(e), CHEAPEST), e, torch.empty(0), meant(e).mT)
    for text in ("block_diag(S) @ shuffle(3, 4)", "shuffle(3, 4) @ block_diag(S)",
                 "block_diag(S) @ kron(I(2), shuffle(2, 3)) @ block_diag(Z)"):
        e = cheapest(expression(text))
        compare(matrix(e), e, torch.empty(0), meant(e))
        assert not any(node.op == "shuffle" for node in walk(matrix(e))), f"a permutation is built in {text}"


@torch.no_grad()
def test_dropout_parts_add_up():
    for e in matrices():
        kept, dropped = split_dropout(e)
        parts = [*([] if kept is None else [kept]), *dropped]
        compare(total(parts, e.shape), e, torch.empty(0), meant(e))
        assert kept is None or not any(node.op == "drop" for node in walk(kept))


def test_every_row_was_tried():
    assert set(apply_to_activations._APPLY) <= {e.op for e in matrices()}


# --------------------------------------------------------------------------------------------------- structure


@torch.no_grad()
def test_what_is_said_of_a_matrix_is_so():
    """Skew, orthogonal, low-rank, the identity plus low-rank: of any that the tables say it of."""
    said = dict.fromkeys(("skew", "orthogonal", "low-rank", "turn"), 0)
    one = torch.eye(n, dtype=torch.float64)
    for e in (e for e in matrices() if e.shape == (n, n)):
        whole, (u, v) = dense(in_evaluation(e), LEAVES), factors(e) or low_rank_turn(e) or (None, None)
        for word, holds, off in (
            ("skew", is_skew(e), lambda: whole + whole.mT),
            ("orthogonal", is_orthogonal(e), lambda: whole @ whole.mT - one),
            ("low-rank", factors(e) is not None, lambda: dense(make("matmul", u, v), LEAVES) - whole),
            ("turn", low_rank_turn(e) is not None, lambda: one + dense(make("matmul", u, v), LEAVES) - whole)):
            if holds and whole.isfinite().all():
                said[word] += 1
                assert off().norm() <= EXACT * (1 + whole.norm()), f"{e} is not {word}"
    assert min(said.values()) > 2, said
