"""`einsum`: what structure is seen in it, and what is told of a wrong one. Its meaning is tried with that of all rules."""

from __future__ import annotations

import pytest
from operands import expression

from surgery.ir.expression import Expr
from surgery.language.library import parse
from surgery.planning.check import check
from surgery.rewrite.normal_form import simplify


def same(text: str, plain: str) -> bool:
    found: Expr = simplify(expression(text))
    return found is simplify(expression(plain))


@pytest.mark.parametrize(("text", "plain"), [
    ('einsum("ij,jk->ik", A, B)', "A @ B"), ('einsum("ji,kj->ik", A, B)', "A.T @ B.T"), ('einsum("ij->ji", F)', "F.T"),
    ('einsum("ij,jk,kl->il", P.T, A, Q)', "(P.T @ A) @ Q"), ('einsum("ia,ja->ij", P, Q)', "P @ Q.T"),
    ('reshape(einsum("ab,cd->acbd", K, L), n, n)', "kron(K, L)"),
    ('reshape(einsum("ab,cd->cadb", K, L), n, n)', "kron(L, K)"),
    ('reshape(einsum("ba,cd->acbd", K, L), n, n)', "kron(K.T, L)"),
    ('reshape(einsum("nab,nm->namb", H, I(4)), n, 8)', "block_diag(H)"),
    ('reshape(einsum("ax,bx->ab", P, Q), n, n)', "P @ Q.T"),
])
def test_structure_is_seen(text, plain):
    assert same(text, plain)


@pytest.mark.parametrize("text", [
    'reshape(einsum("nab,ncd->acbd", S, Z), 9, 9)', 'reshape(einsum("nab,ncx,nxd->acbd", S, Z, S), 9, 9)',
])
def test_a_few_kronecker_products_are_their_sum(text):
    found = simplify(expression(text))
    assert found.op == "add" and not found.has("einsum") and found.has("kron")


@pytest.mark.parametrize("text", [
    'reshape(einsum("ab,cd->acdb", K, L), n, n)', 'einsum("ij,ij->ij", A, B)', 'einsum("ij,i,j->ij", A, d, e)',
])
def test_what_has_no_structure_is_computed_as_it_stands(text):
    assert simplify(expression(text)).has("einsum")


@pytest.mark.parametrize(("call", "code", "said"), [
    ('einsum("ij,jk->ik", W)', "shape-mismatch", "has 1 tensors, and its equation names 2"),
    ('einsum("ij,jk->ik", W, W)', "shape-mismatch", "the axis `j` is in and out"),
    ('einsum("ij", W)', "shape-mismatch", "needs an equation"), ('einsum("ii->i", W)', "shape-mismatch", "one axis twice"),
    ('einsum("ij->ik", W)', "shape-mismatch", "an axis `k` that no argument has"),
    ('einsum("ijk->ij", W)', "shape-mismatch", "a tensor of 3 axes"), ("einsum(W, W)", "wrong-type", "needs an equation"),
    ('einsum("ij->ij")', "missing-argument", "takes an equation and at least one tensor"),
])
def test_mistakes(call, code, said):
    (found,) = (d for d in check(parse(f"update own() {{ return {call} }} target linear shifted {{ add own() }}"))
                if d.severity == "error")
    assert found.code == code and said in found.message, found.message
