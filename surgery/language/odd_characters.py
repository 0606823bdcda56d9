"""Characters that are no part of the language: what each means on paper, or looks like, and what is written instead.

Takes one character. Gives the sentence that a diagnostic shows as help. Promises: what no eye can see is named.
"""

from __future__ import annotations

import unicodedata

_PRODUCT = "the product of matrices is `A @ B`, that of entries or of a number `A * B`"
_ENTRIES = "a product entry by entry is `A * B`"
_MINUS = "write `-`"
_TRANSPOSE = "the transpose is `A.T`"
_NORM = "√Σ a² is `norm(A)`, of each row `row_norm(A)`"
_QUOTE = "a string stands in double quotes, `\"`"
_POWER = "a power is `pow(x, 2)`"
_NAME = "a name is made of the letters a to z, digits and `_`"

_MEANT = {
    **dict.fromkeys("×·⋅∙•", _PRODUCT), **dict.fromkeys("⊙∘∗⊛", _ENTRIES), **dict.fromkeys("−–—‐‑", _MINUS),
    **dict.fromkeys("÷∕⁄", "a quotient is `a / b`"), **dict.fromkeys("ᵀ⊤", _TRANSPOSE),
    **dict.fromkeys("‖∥", _NORM), **dict.fromkeys("“”„‟«»", _QUOTE), **dict.fromkeys("‘’‚`´", _QUOTE),
    **dict.fromkeys("⁰¹²³⁴⁵⁶⁷⁸⁹", _POWER), "⁻": "write `inverse(A)`", "⊗": "it is `kron(A, B)`",
    "⊕": "blocks along the diagonal are `block_diag(A)`, of a stack of them", "√": "write `sqrt(x)`",
    "∑": "the sum over each row is `A @ ones(n)`; terms are added up by `+` or by `einsum`",
    "Σ": "the sum over each row is `A @ ones(n)`; terms are added up by `+` or by `einsum`",
    "∏": "factors one after the other are a `for` in a definition", "π": "write `pi`", "∇": "the gradient is `G`",
    "≤": "write `<=`", "≥": "write `>=`", "≠": "write `!=`", "∈": "a type stands after `:`", "∼": "write `~`",
    "←": "a value stands after `=`", "≔": "a value stands after `=`", "…": "up to a bound is `0..count`",
    "∞": "there is no infinite number",
}
#: Letters of other alphabets that look like one of a to z.
_LOOKS = dict(zip("аеорсхуіјѕһԁԛԝАВЕКМНОРСТХУІЈЅΑΒΕΖΗΙΚΜΝΟΡΤΥΧο",
                  "aeopcxyijshdqwABEKMHOPCTXYIJSABEZHIKMNOPTYXo", strict=True))


def is_odd(character: str) -> bool:
    """Whether it is in no token of the language, and is no blank."""
    return not character.isascii() and not character.isspace()


def instead_of(character: str) -> str:
    """What to do about a character; empty where it is one of ASCII, and seen."""
    code = f"U+{ord(character):04X}"
    name = unicodedata.name(character, code)
    if unicodedata.category(character) in ("Cc", "Cf", "Co", "Cs"):
        return f"a character that is not seen ({name if name == code else f'{name}, {code}'}): delete it"
    if character in _MEANT:
        return _MEANT[character]
    if character in _LOOKS:
        return f"this is {name}, which looks like `{_LOOKS[character]}`: {_NAME}"
    plain = unicodedata.normalize("NFKC", character)
    if plain != character and plain.isascii():
        return f"this is {name}: write `{plain}`"
    if character.isalpha():
        greek = name.removeprefix("GREEK SMALL LETTER ").lower().replace("lamda", "lambda")  # as Unicode spells it
        return _NAME + (f": write `{greek}`" if greek != name.lower() and greek.isalpha() else "")
    return "" if character.isascii() else f"this is {name}"
