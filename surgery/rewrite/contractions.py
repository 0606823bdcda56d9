"""Rules that see the structure of an `einsum` that is a matrix: a product, Kronecker products, blocks.

A contraction is taken apart into parts that share fewer axes, each a contraction again; what has no structure stays.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

from surgery.ir import contractions
from surgery.ir.builders import every, total
from surgery.ir.expression import Expr
from surgery.ir.operations import make
from surgery.ir.sizes import Dim, Size, known
from surgery.rewrite.engine import Rule

MOST_TERMS = 16  # of a sum of Kronecker products
Part = tuple[str, Expr]  # the letters of an argument's axes, and the argument


def _matrix(node: Expr) -> Expr | None:
    arguments, result = contractions.read(*node.data)
    return None if len(result) != 2 else _Contraction(arguments, node.args).matrix(result[0], result[1])


def _reshaped(node: Expr) -> Expr | None:
    """The rows of the matrix are some first axes of the contraction."""
    inner = node.args[0]
    if inner.op != "einsum" or len(node.shape) != 2:
        return None
    arguments, result = contractions.read(*inner.data)
    for k in range(1, len(result)):
        if prod(inner.shape[:k]) == node.shape[0]:
            return _Contraction(arguments, inner.args).matrix(result[:k], result[k:])
    return None


class _Contraction:
    """Arguments by the letters of their axes."""

    def __init__(self, letters: Sequence[str], args: Sequence[Expr]):
        self.parts: list[Part] = list(zip(letters, args))
        self.sizes = contractions.sizes(letters, [a.shape for a in args])

    def size(self, letters: str) -> Size:
        return prod(self.sizes[letter] for letter in letters)

    def matrix(self, rows: str, columns: str) -> Expr | None:
        """The contraction as a matrix with these axes for its rows and its columns; None where it has no structure."""
        ways = (self._alone, self._apart, self._product, self._blocks, self._terms)
        return next((found for way in ways if (found := way(rows, columns)) is not None), None)

    def _made(self, parts: Sequence[Part], rows: str, columns: str) -> Expr:
        """Some of the arguments as a matrix, computed as it stands where it has no structure."""
        letters, args = zip(*parts)
        of_them = _Contraction(letters, args)
        if (found := of_them.matrix(rows, columns)) is not None:
            return found
        whole = make("einsum", *args, data=(f"{','.join(letters)}->{rows}{columns}",))
        return _shaped(whole, self.size(rows), self.size(columns))

    def _alone(self, rows: str, columns: str) -> Expr | None:
        """One tensor whose axes stand in order, or the columns' before the rows'."""
        (letters, a), *others = self.parts
        if others or letters not in (rows + columns, columns + rows):
            return None
        if letters == rows + columns:
            return _shaped(a, self.size(rows), self.size(columns))
        return make("T", _shaped(a, self.size(columns), self.size(rows)))

    def _apart(self, rows: str, columns: str) -> Expr | None:
        """Arguments that share no axis make a Kronecker product, if their axes stand in one order."""
        groups = _connected(self.parts)
        sides = [("".join(c for c in rows if c in letters), "".join(c for c in columns if c in letters))
                 for letters in ("".join(part[0] for part in group) for group in groups)]
        axes = rows + columns
        order = sorted(range(len(groups)), key=lambda i: min(map(axes.index, "".join(sides[i])), default=-1))
        fits = ("".join(sides[i][0] for i in order), "".join(sides[i][1] for i in order)) == (rows, columns)
        if len(groups) < 2 or not fits or not all(map("".join, sides)):
            return None
        found: Expr | None = None
        for i in order:
            part = self._made(groups[i], *sides[i])
            found = part if found is None else make("kron", found, part)
        return found

    def _product(self, rows: str, columns: str) -> Expr | None:
        """Arguments that have no axis of the columns, times those that have none of the rows."""
        left = [part for part in self.parts if not set(part[0]) & set(columns)]
        right = [part for part in self.parts if part not in left]
        if not left or not right or any(set(letters) & set(rows) for letters, _ in right):
            return None
        bond = "".join(dict.fromkeys(c for letters, _ in left for c in letters
                                     if any(c in others for others, _ in right)))
        if not bond:
            return None
        return make("matmul", self._made(left, rows, bond), self._made(right, bond, columns))

    def _blocks(self, rows: str, columns: str) -> Expr | None:
        """With I for two first axes, what is not on the diagonal of blocks is 0."""
        for part in self.parts:
            letters, a = part
            if a.op == "eye" and len(letters) == 2 and set(letters) == {rows[:1], columns[:1]}:
                rest = [other for other in self.parts if other is not part]
                n = next((c for c in letters if any(c in others for others, _ in rest)), "")
                inner = rows[1:] + columns[1:]
                if n and not any(c in others for others, _ in rest for c in letters if c != n):
                    is_there = [letters for letters, _ in rest] == [n + inner]
                    stack = rest[0][1] if is_there else make(
                        "einsum", *(x for _, x in rest), data=(f"{','.join(s for s, _ in rest)}->{n}{inner}",))
                    sides = self.size(rows[1:]), self.size(columns[1:])
                    return make("block_diag", _shaped(stack, self.sizes[n], *sides))
        return None

    def _terms(self, rows: str, columns: str) -> Expr | None:
        """A sum over one short axis of matrices that have structure without it."""
        for n in dict.fromkeys("".join(letters for letters, _ in self.parts)):
            count = self.sizes[n]
            with_it = [letters for letters, _ in self.parts if n in letters]
            fits = n not in rows + columns and not isinstance(count, Dim) and count <= MOST_TERMS
            if not fits or any(letters[0] != n or len(letters) == 1 for letters in with_it):
                continue
            if len(_connected([(letters.replace(n, ""), a) for letters, a in self.parts])) > 1:
                terms = every(self._term(n, i, rows, columns) for i in range(known(count)))
                return None if terms is None else total(terms, terms[0].shape)
        return None

    def _term(self, n: str, i: int, rows: str, columns: str) -> Expr | None:
        parts = [(letters[1:], _slice(a, i)) if n in letters else (letters, a) for letters, a in self.parts]
        return _Contraction(*zip(*parts))._apart(rows, columns)


def _slice(a: Expr, i: int) -> Expr:
    """Entry i of the first axis."""
    flat = make("reshape", a, data=(a.shape[0], prod(a.shape[1:])))
    return _shaped(make("rows", flat, make("range", data=(i, i + 1))), *a.shape[1:])


def _shaped(a: Expr, *sizes: Size) -> Expr:
    """In another shape, if it is another."""
    return a if a.shape == sizes else make("reshape", a, data=sizes)


def _connected(parts: Sequence[Part]) -> list[list[Part]]:
    """The arguments in groups that share no letter."""
    groups: list[list[Part]] = []
    for part in parts:
        linked = [group for group in groups if any(set(part[0]) & set(other[0]) for other in group)]
        groups = [group for group in groups if group not in linked] + [[*(p for g in linked for p in g), part]]
    return groups


CONTRACTIONS = (
    Rule("a sum over axes as a product, a Kronecker product, blocks", "einsum", _matrix, 'einsum("ij,jk->ik", A, B)'),
    Rule("x in its own shape", "reshape", lambda n: n.args[0] if n.args[0].shape == n.shape else None,
         "reshape(A, n, n)"),
    Rule("its first axes as rows", "reshape", _reshaped, 'reshape(einsum("nab,ncd->acbd", S, Z), 9, 9)'),
)
