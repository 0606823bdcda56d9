"""Operands with sizes, for stating an identity in the language: `skew(A).T`, `P @ Q.T`.

A, B are square, F is wide and G tall; P, Q, p, q are thin; d, e vectors; S, Z stacks of square blocks, H one of oblong
blocks; K, L, M small matrices; g, h scalars; `at` are places; W is the frozen weight (square here), V one that is not;
N is nothing, seen through dropout. `expression` reads a text over them;
`every_call` calls each primitive on all that its shape rule takes.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache
from itertools import product
from math import prod

import torch
from torch import Tensor

from surgery.ir.builders import fill
from surgery.ir.dense import dense
from surgery.ir.expression import Expr
from surgery.ir.operations import FUNCTIONS, OPERATORS, PRIMITIVES, ShapeError, eye, make
from surgery.language.parser import parse_expression
from surgery.semantics.evaluate import evaluate

n = 12
SHAPES = {
    "A": (n, n), "B": (n, n), "F": (n, 8), "G": (8, n), "P": (n, 2), "Q": (n, 2), "p": (n, 1), "q": (n, 1), "d": (n,),
    "e": (n,),
    "S": (4, 3, 3), "Z": (4, 3, 3), "H": (4, 3, 2), "K": (3, 3), "L": (4, 4), "M": (3, 2), "g": (), "h": (),
}
OPERANDS = {name: Expr("param", (), f"own.{name}", shape) for name, shape in SHAPES.items()}
PLACES = Expr("places", (), "own.at", (n,))
NAMES = {**OPERANDS, "n": n, "at": PLACES, "W": Expr("weight", (), None, (n, n)),
         "N": Expr("drop", (fill(0, (n, n)),), (0.5, "add_own"), (n, n))}

# Formulas in which several identities meet.
MIXED = (
    "cayley(P @ Q.T - Q @ P.T) @ (diag(d) @ W + p @ q.T)", "reflect(P) @ reflect(Q).T @ (W + P @ Q.T) @ diag(d)",
    "W @ block_diag(cayley(skew(S)))", "kron(K, L) @ W @ kron(L, K)", "kron(K @ K, I(4)) + kron(I(4), M @ M.T)",
    "P @ Q.T @ P @ Q.T", "P @ (Q.T @ W)", "(W @ P) @ Q.T", "(g * W).T @ (h * diag(d))", "W * (P @ Q.T)",
    "(P @ Q.T) * (p @ q.T) + W", "W - P @ (P.T @ W)", "block_diag(S) @ block_diag(Z) @ W", "A @ W + W @ B",
    "W @ A @ P @ Q.T", "diag(d / row_norm(W + P @ Q.T)) @ (W + P @ Q.T)", "block_diag(H) @ F.T", "kron(M, L) @ F.T",
    "(g / h) * I(n) @ W + 0.5", "F @ G + W", "tanh(P @ Q.T) + F @ G", "diag(A @ d) @ W", "(W + g * N) @ A",
    "A @ (N + g * N + W)", "W - N", "cayley(W - W.T)",
    # norms in parts: of gains, blocks and turns around what an update made of the weight
    "diag(row_norm(block_diag(S) @ (diag(d) @ W + P @ Q.T)))",
    "diag(col_norm(reflect(P) @ (W + p @ q.T) @ block_diag(S)))",
    "diag(row_norm(kron(I(4), K) @ (W + P @ Q.T) @ diag(d)))",
    "norm(diag(d) @ (block_diag(S) @ W + P @ Q.T) @ diag(e)) * A",
    "diag(col_norm(diag(d / row_norm(W @ diag(e) + P @ Q.T)) @ (W @ diag(e) + P @ Q.T)))",
    "diag(row_norm((W @ diag(d)) @ block_diag(expm(skew(S)))))",
    "diag(row_norm(block_diag(S) @ diag(e) @ (block_diag(Z) @ W @ diag(d) + p @ q.T)))",
    # low-rank terms, and what stands in and beside their factors
    "W @ (P @ Q.T) + g * (diag(d) @ P @ Q.T @ block_diag(S))",
    "skew(P @ Q.T) @ skew(P @ Q.T) @ W + W", "(I(n) + ones(n, n) / n) @ (W + p @ q.T + g)",
    "P @ ((W + P @ Q.T) @ Q).T @ W", "W * (1 + p @ q.T)", "columns(cayley(P @ Q.T), 2) @ Q.T",
    # contractions: of products, of Kronecker products, of blocks, in trains
    'reshape(einsum("nab,nm->namb", H, I(4)), n, 8)', 'reshape(einsum("ab,cd->acbd", K, L), n, n) @ W',
    'reshape(einsum("nab,ncd->acbd", S, Z), 9, 9)', 'einsum("ia,bj,ab->ij", P, Q.T, reshape(g * ones(2, 2), 2, 2)) @ W',
    'reshape(einsum("abr,rc->abc", S, K), 12, 3)', 'einsum("ij,jk,kl->il", P.T, A, Q)', 'einsum("ij,kl->jl", A, B)',
    'reshape(einsum("ab,cd->cadb", K, L), n, n)', 'reshape(einsum("ab,cd->acdb", K, L), n, n)',
    "g * W.T - W", "(W + W.T) @ diag(d)",
    # a row that is turned is contiguous, and does not lie as a column does
    "kron(reshape(q, 1, n).T, reshape(p, 1, n))", 'reshape(einsum("ba,fc->abfc", K, I(2)), 3, n)',
    "(A > B) * W + (d @ e <= g) * W", "(0.5 >= A) * (A < g) * B",
    # places
    "columns(I(n), at) @ A @ rows(I(n), at) + W", "(W + P @ Q.T) @ columns(I(n), range(3, 5)) @ Q.T",
    "rows(diag(d) @ W + P @ Q.T, at)", "columns(block_diag(S) @ W, range(2, 6)) @ rows(kron(K, L), range(2, 6))",
    "diag(row_norm(W + P @ rows(I(n), range(4, 6))))", "rows(diag(d), at) @ columns(diag(e), at)",
    # parts of what acts by itself: a Toeplitz matrix, blocks, and those turned
    "columns(rows(circulant(reshape(P, 1, 1, 24)), n), n) @ W", "rows(columns(circulant(reshape(P, 1, 1, 24)), n), n).T",
    "columns(block_diag(S).T @ A, range(2, 9)) @ rows(kron(K, L), range(1, 8))", "rows(circulant(reshape(A, 3, 4, 12)), n).T",
    "detach(P @ Q.T) + P @ Q.T", "W @ P @ (g * Q.T) + A @ P @ Q.T",
)


def expression(text: str) -> Expr:
    """What a text says of the operands."""
    return evaluate(parse_expression(text), NAMES)


OF_STARTS = {"numbers"}  # which no formula says, and no program computes
EINSUMS = (
    'einsum("ij,jk->ik", A, B)', 'einsum("ij,kj->ki", A, F.T)', 'einsum("ij->ji", F)', 'einsum("ij->i", F)',
    'einsum("nab,nbc->nac", S, Z)', 'einsum("ab,cd->acbd", K, L)', 'einsum("nab,ncd->acbd", S, Z)',
    'einsum("i,i->", d, e)', 'einsum("ij,i,j->ij", A, d, e)', 'einsum("nab,nm->namb", H, I(4))',
)


@lru_cache
def every_call() -> tuple[Expr, ...]:
    """Each primitive that a spec can use, on every choice of shapes that it takes."""
    spec_can = {name for name, row in PRIMITIVES.items() if row.public}
    assert spec_can == FUNCTIONS - {"I", "ones", "indices"} | set(OPERATORS.values()) | {"neg", "T", "literal"}
    return tuple(call for name in sorted(spec_can) for call in _calls(name))


def _calls(name: str) -> Iterator[Expr]:
    """One of each shape in the first place, and another in the next ones, with each choice of sizes."""
    row = PRIMITIVES[name]
    if name == "einsum":
        yield from map(expression, EINSUMS)
        return
    if name in OF_STARTS:
        return
    first, other = ([NAMES[each] for each in names] + [eye(n)] for names in ("AFGPdSHKLMg", "BFGQeZHKLMhW"))
    places = [[PLACES] if i in row.places else values for i, values in enumerate([first, other, other][:row.arity])]
    for *chosen, sizes in product(*places, _sizes(name)):
        try:
            call = make(name, *chosen, data=sizes)
        except ShapeError:
            continue
        if PLACES not in chosen or prod(row.into(call)) >= n:  # there are so many places
            yield call


def _sizes(name: str) -> list[tuple | None]:
    """Choices of the whole numbers that a primitive takes (the rows of a matrix of numbers)."""
    names = PRIMITIVES[name].sizes
    if name == "literal":
        return [((1.0, -2.0, 0.5), (3.0, 0.0, 1.0))]
    given = [(2,), (3,), (n, n), (2, 3), (4, 3), (n * n,), (4, 3, n), (3, 2, 2)]
    return [sizes for sizes in given if len(sizes) == len(names) or names[0].startswith("*")] if names else [None]


def tensors(seed: int, alike: bool = False) -> dict[str, Tensor]:
    """Random values for all operands, positive ones for an odd seed; if `alike`, Q is P (and so on),
    and some are zero."""
    generator = torch.Generator().manual_seed(seed)
    shapes = {"weight": (n, n), **{leaf.data: leaf.shape for leaf in OPERANDS.values()}}
    values = {key: torch.randn(shape, generator=generator, dtype=torch.float64) for key, shape in shapes.items()}
    values = {key: value.abs() if seed % 2 else value for key, value in values.items()}
    if alike:
        values |= {f"own.{b}": values[f"own.{a}"].clone() for a, b in ("AB", "PQ", "pq", "de", "SZ", "gh")}
        values["own.p"][:3], values["own.d"][:3], values["own.A"][0] = 0, 0, 0
    places = torch.randint(n, (n,), generator=generator) if alike else torch.randperm(n, generator=generator)
    return {**{key: value.requires_grad_() for key, value in values.items()}, "own.at": places}


def value_and_gradients(expr: Expr, leaves: dict[str, Tensor]) -> dict[str, Tensor]:
    """The dense value of an expression, and its gradients (in a fixed random direction) in all the leaves."""
    value = dense(expr, leaves).double()
    direction = torch.randn(value.shape, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    scalar = (value * direction).sum()
    real = {key: leaf for key, leaf in leaves.items() if leaf.requires_grad}
    found = torch.autograd.grad(scalar, list(real.values()),
                                allow_unused=True) if scalar.requires_grad else [None] * len(real)
    gradients = {key: torch.zeros_like(leaf) if g is None else g for (key, leaf), g in zip(real.items(), found)}
    return {"the value": value.detach(), **{f"the gradient of {key}": g for key, g in gradients.items()}}
