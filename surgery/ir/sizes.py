"""Symbolic sizes: polynomials with exact rational coefficients over named dimensions, in one canonical form.

Gives `Dim`, closed under `+ - * /`, so that `n / block * block` is `n` before any model is known. A constant result is
a plain `int` or `Fraction`. What a polynomial cannot express (`min(out, in)`, an undecided `if`) becomes an opaque
symbol named by its text, equal to itself alone.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from fractions import Fraction
from typing import TypeVar

# What a size of a real spec never comes near: beyond, a chain of `let`s could make it twice as long in each of them.
_MOST_TERMS, _LONGEST_NAME, _MOST_BITS, _HIGHEST_POWER = 100, 1000, 256, 64
_LARGEST_DIVIDED = 2**40
Number = int | Fraction | float
Monomial = tuple[tuple[str, int], ...]


class Dim:
    """A sum of monomials; build with `symbol`, combine with operators. Raises: OverflowError for one that grows too
    long."""

    __slots__ = ("terms", "_hash")

    def __init__(self, terms: dict[Monomial, Fraction]):
        self.terms = tuple(sorted((m, c) for m, c in terms.items() if c))
        if len(self.terms) > _MOST_TERMS or not all(map(_is_short, self.terms)):
            raise OverflowError
        self._hash = hash(self.terms)

    def __reduce__(self) -> tuple:
        return Dim, (dict(self.terms),)  # strings have another hash in another process

    def __eq__(self, other: object) -> bool:
        return self is other or isinstance(other, Dim) and self.terms == other.terms

    def __hash__(self) -> int:
        return self._hash

    def __add__(self, other: Size | float) -> Size:
        return _collect([*_terms(self), *_terms(other)])

    def __mul__(self, other: Size | float) -> Size:
        return _product(self, other)

    def __neg__(self) -> Size:
        return self * -1

    def __sub__(self, other: Size | float) -> Size:
        return self + (-1 * other)

    def __rsub__(self, other: Size | float) -> Size:
        return _collect([*_terms(-self), *_terms(other)])

    def __truediv__(self, other: Size | float) -> Size:
        return _product(self, _reciprocal(other))

    def __rtruediv__(self, other: Size | float) -> Size:
        return _product(_reciprocal(self), other)

    __radd__, __rmul__ = __add__, __mul__

    def symbols(self) -> set[str]:
        return {name for monomial, _ in self.terms for name, _ in monomial}

    @property
    def is_real(self) -> bool:
        """Whether it rests on what need not be whole, and so is no dimension."""
        return any(isinstance(name, _Real) for name in self.symbols())

    def __str__(self) -> str:
        return _sum_text(_monomial_text(m, c) for m, c in reversed(self.terms))

    @property
    def rounded(self) -> str:
        """Its text for people: what was a float (3.14159 of `3.14159 * out`) has six digits, as floats have."""
        return _sum_text(_monomial_text(m, c, rounded=c.denominator > 10**6) for m, c in reversed(self.terms))

    __repr__ = __str__


Size = int | Fraction | Dim
_Value = TypeVar("_Value", bound=Number | Dim)


def _is_short(term: tuple[Monomial, Fraction]) -> bool:
    monomial, coefficient = term
    return has_few_digits(coefficient) and all(
        len(name) <= _LONGEST_NAME and abs(power) <= _HIGHEST_POWER for name, power in monomial)


def has_few_digits(value: int | Fraction) -> bool:
    """Whether an exact number is short enough to go on computing with."""
    return max(value.numerator.bit_length(), value.denominator.bit_length()) <= _MOST_BITS


def known(size: Size) -> int:
    """A size as a plain number, where the module is known. Raises: TypeError for a symbol."""
    if not isinstance(size, int):
        raise TypeError(f"the size {size} is not known")
    return size


def known_shape(shape: Iterable[Size]) -> tuple[int, ...]:
    """A shape as plain numbers, where the module is known."""
    return tuple(map(known, shape))


class _Real(str):
    """The name of an unknown that need not be whole."""


def symbol(name: str, is_real: bool = False) -> Dim:
    """The unknown called `name`."""
    return Dim({((_Real(name) if is_real else name, 1),): Fraction(1)})


TOKENS = symbol("tokens")  # how many rows of activations there are: known when a program runs


def real(value: Number | Dim) -> float | Dim:
    """The value as one of a float parameter: it is no dimension, even if it should happen to be whole."""
    if not isinstance(value, Dim):
        return float(value)
    return Dim({tuple((_Real(name), power) for name, power in monomial): c for monomial, c in value.terms})


def is_real(value: object) -> bool:
    return isinstance(value, float) or isinstance(value, Dim) and value.is_real


def divide(a: Number | Dim, b: Number | Dim) -> Number | Dim:
    """a / b, exact unless a float takes part. Raises: ZeroDivisionError."""
    if isinstance(a, (int, Fraction)) and isinstance(b, (int, Fraction)):
        return tidy(Fraction(a) / Fraction(b))
    return a / b


def divisor(n: int, most: int | None = None) -> int:
    """The largest divisor of n that is at most √n, or at most `most`. Raises: OverflowError for an n for which the
    search would take seconds."""
    if n > _LARGEST_DIVIDED:
        raise OverflowError
    # In pairs up to √n: the numbers beyond it are the quotients by those below.
    limit = math.isqrt(n) if most is None else most
    pairs = ((d, n // d) for d in range(1, math.isqrt(n) + 1) if n % d == 0)
    return max(d for pair in pairs for d in pair if d <= limit)


def log2(x: Number) -> int | float:
    """Exact for a power of two. Raises: ValueError for what is not positive."""
    if isinstance(x, int) and x > 0 and x & (x - 1) == 0:
        return x.bit_length() - 1
    return math.log2(x)


def power(base: Number, exponent: Number) -> Number:
    """Exact for whole exponents of exact numbers. Raises: OverflowError, ZeroDivisionError, ValueError."""
    if isinstance(base, float) or not isinstance(exponent, int):
        return math.pow(base, exponent)
    if abs(exponent) > 64 and abs(base) != 1 and base:
        raise OverflowError
    return tidy(Fraction(base) ** exponent)


def open_power(base: Size | float, exponent: Size | float) -> Size:
    """base^exponent where one of them is unknown. Of a whole base and a sum of unknowns it is a product of the powers
    of each, so that pow(2, i + 1) is 2 pow(2, i) whatever i is."""
    terms = dict(_terms(exponent))
    if not isinstance(base, int) or base < 1 or any(c.denominator > 1 for c in terms.values()):
        return symbol(f"pow({base}, {exponent})")
    constant = power(base, int(terms.pop((), Fraction(0))))
    parts = {f"pow({base}, {_monomial_text(monomial, Fraction(1))})": int(c) for monomial, c in terms.items()}
    return _collect([(tuple(sorted(parts.items())), Fraction(constant))])


def tidy(value: _Value) -> _Value | int:
    """A whole Fraction as an int, anything else as it is."""
    return int(value) if isinstance(value, Fraction) and value.denominator == 1 else value


def _terms(value: Size | float) -> tuple:
    return value.terms if isinstance(value, Dim) else (((), Fraction(value)),)


def _collect(terms: list[tuple[Monomial, Fraction]]) -> Size:
    total: dict[Monomial, Fraction] = {}
    for monomial, coefficient in terms:
        total[monomial] = total.get(monomial, Fraction(0)) + coefficient
    total = {m: c for m, c in total.items() if c}
    return tidy(total.get((), Fraction(0))) if set(total) <= {()} else Dim(total)


def _product(a: Size | float, b: Size | float) -> Size:
    products = []
    for left, x in _terms(a):
        for right, y in _terms(b):
            powers = dict(left)
            for name, power in right:
                powers[name] = powers.get(name, 0) + power
            # sorted and without powers of 0, so that equal monomials are equal tuples
            products.append((tuple(sorted((n, p) for n, p in powers.items() if p)), x * y))
    return _collect(products)


def _reciprocal(value: Size | float) -> Size:
    if not isinstance(value, Dim):
        return 1 / Fraction(value)
    (monomial, coefficient), *others = value.terms
    if others:  # 1 / (a + b) is opaque
        return Dim({((f"({value})", -1),): Fraction(1)})
    return Dim({tuple((n, -p) for n, p in monomial): 1 / coefficient})


def _sum_text(terms: Iterable[str]) -> str:
    return " + ".join(terms).replace("+ -", "- ")


def _monomial_text(monomial: Monomial, coefficient: Fraction, rounded: bool = False) -> str:
    over = [n if p == 1 else f"{n}^{p}" for n, p in monomial if p > 0]
    under = [n if p == -1 else f"{n}^{-p}" for n, p in monomial if p < 0]
    top, bottom = (f"{abs(float(coefficient)):.6g}", 1) if rounded else (
        abs(coefficient.numerator), coefficient.denominator)
    text = " ".join(([str(top)] if top != 1 or not over else []) + over)
    divisors = ([bottom] if bottom != 1 else []) + under
    return ("-" if coefficient < 0 else "") + text + "".join(f" / {n}" for n in divisors)
