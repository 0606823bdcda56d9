"""What people write who know PyTorch, NumPy, C or PEFT, and what a spec writes instead.

Tables of words; gives sentences that a diagnostic shows as help. Promises: where a word has a row here, nothing is
guessed from how it is spelt (`det` is not `detach`).
"""

from __future__ import annotations

import re
from collections.abc import Iterable

from surgery.diagnostics import did_you_mean

_CONCAT = "`side_by_side(A, B)` joins columns, and `stacked(A, B)` rows"
_STACK = ("`stacked(A, B)` puts the rows of B below those of A; a stack of matrices is one parameter with an axis "
          "more, `param A[blocks, m, n] = 0`, and sum over it, `einsum(\"bij,bjk->ik\", A, B)`")
_ZEROS = "a parameter of zeros is `param A[out, in] = 0`; in an expression, write `0 * ones(m, n)`"
_IDENTITY = "the identity is `I(n)`"
_POWER = "a power is `x * x`, `pow(x, 3)` or `sqrt(x)`; e^x is `exp(x)`"
_TRANSPOSE = "the transpose is `A.T`"
_SUM = "the sum over each row is `A @ ones(n)`, n the number of columns; √Σ a² is `norm(A)`"
_MEAN = "the mean over each row is `A @ ones(n) / n`, n the number of columns"
_PRODUCT = "the product of matrices is `A @ B`"
_INVERSE = "write `inverse(A)`; of an orthogonal matrix it is `A.T`"
_RANDOM = "what is random is a parameter: `param A[m, n] ~ normal(std = 0.02)`, `frozen param` if it is not trained"
_DRAWN_ZEROS = "a value that is not drawn stands after `=`: `param A[m, n] = 0`"
_LOOP = ("`for i in 0..count { pre turns(i) }` repeats steps in a target; in a definition, "
         "`for i in 0..count { let R = R @ T }` gives what a `let` above it names its next value")
_CONDITION = "write `if condition then a else b`"
_FROZEN = "all is frozen but adapters, and what `train \"**.norm.*\"` names"
_TRAINED = "`param A[m, n] = 0` is trained, and `frozen param A[m, n] = 0` is not"
_SELECTED = "write `rows(A, range(i, j))` or `columns(A, range(i, j))`"
_TOP = "the places of the k largest entries are `top(A, k)`, those of each row `row_top(A, k)`"
_AS_COLUMN = ("a vector as a column is `reshape(d, n, 1)`; a gain for each row is `diag(d) @ A`, for each column "
              "`A @ diag(d)`")
_REPEATED = "a matrix over and over is `kron(ones(2, 1), A)`, each of its rows twice `kron(A, ones(2, 1))`"
_SIZES = "sizes are `out`, `in` and parameters"
_COMMENT = "a comment begins with `#`"
_NO_FUNCTION = "there is no function of that kind; `docs/language.md` lists what can be called"

#: By the name of a function, a value or a distribution.
_NAMES: dict[str, str] = {
    "silu": "write `x * sigmoid(x)`", "swish": "write `x * sigmoid(x)`",
    "gelu": "there is no gelu; near it is `x * sigmoid(1.702 * x)`",
    "softmax": "the softmax over the k largest entries of each row is `top_softmax(x, k)`",
    "zeros": _ZEROS, "zeros_like": _ZEROS, "ones_like": "a tensor of ones is `ones(m, n)`",
    "full": "a constant tensor is a number times ones: `3 * ones(m, n)`",
    "eye": _IDENTITY, "identity": _IDENTITY,
    "freeze": _FROZEN, "unfreeze": _FROZEN, "trainable": _TRAINED, "learnable": _TRAINED,
    "concat": _CONCAT, "cat": _CONCAT, "concatenate": _CONCAT, "hstack": _CONCAT, "vstack": _CONCAT, "stack": _STACK,
    "transpose": _TRANSPOSE, "t": _TRANSPOSE, "permute": _TRANSPOSE, "swapaxes": _TRANSPOSE,
    "sum": _SUM, "mean": _MEAN, "trace": "there is no trace; " + _SUM, "len": _SIZES,
    "clip": "write `clamp(x, low, high)`", "minimum": "write `min(a, b)`", "maximum": "write `max(a, b)`",
    "power": _POWER, "square": "write `x * x`",
    "log": "of known numbers, write `log2(n)`; of tensors there is none: the inverse, e^x, is `exp`",
    "sgn": "write `sign(x)`", "det": "there is no determinant",
    "inv": _INVERSE, "pinv": _INVERSE,
    "svd": "its parts are `left_singular(A, k)`, `singular(A, k)` and `right_singular(A, k)`",
    "matrix_exp": "write `expm(A)`",
    "matmul": _PRODUCT, "mm": _PRODUCT, "bmm": _PRODUCT, "dot": _PRODUCT,
    "outer": "the outer product of two vectors is `reshape(a, m, 1) @ reshape(b, 1, n)`",
    "rand": _RANDOM, "randn": _RANDOM, "random": _RANDOM, "randint": _RANDOM, "dropout": (
        "dropout stands after the step that adds the update: `add low_rank(8) dropout(5%)`"),
    "gaussian": "write `normal(std = ...)`", "constant": _DRAWN_ZEROS,
    "unsqueeze": _AS_COLUMN, "expand": _AS_COLUMN, "broadcast_to": _AS_COLUMN, "squeeze": "write `reshape(A, n)`",
    "repeat": _REPEATED, "tile": _REPEATED, "repeat_interleave": _REPEATED,
    "rearrange": "axes are put in another order by `einsum(\"ab->ba\", A)`, and joined by `reshape(A, m, n)`",
    "requires_grad": _TRAINED,
    "round": "`floor(x)` makes a number whole", "ceil": "write `-floor(-x)`", "int": "`floor(x)` makes a number whole",
    "view": "write `reshape(A, m, n)`", "flatten": "write `reshape(A, n)`",
    "topk": _TOP, "argsort": _TOP, "argmax": _TOP,
    "gather": "write `take(A, places)`", "index_select": _SELECTED, "slice": _SELECTED, "narrow": _SELECTED,
    "arange": "write `range(i, j)`", "row": _SELECTED, "column": _SELECTED,
    "index_add": "what stands at places of rows is `columns(I(n), places) @ A`",
    "where": _CONDITION + "; on entries, multiply by a mask of ones and zeros",
    "stop_gradient": "write `detach(x)`", "no_grad": "write `detach(x)`",
    **dict.fromkeys(("d_out", "out_dim", "out_features", "nf"), "the number of rows of W is `out`"),
    **dict.fromkeys(("d_in", "in_dim", "in_features", "nx"), "the number of columns of W is `in`"),
    "tril": _NO_FUNCTION, "triu": _NO_FUNCTION,
    "for": _LOOP, "while": _LOOP,
    "None": "leave it out", "True": "write `true`", "False": "write `false`",
    "shape": _SIZES, "size": _SIZES,
    "lambda": "a function of one's own is an `update` or a `transform`",
    "def": "a definition is `update name() { return ... }`, or `transform name() on n { return ... }`",
    "import": "write `use \"file.surg\"`", "class": "a definition is an `update` or a `transform`",
    "elif": _CONDITION, "const": "write `let name = value`", "var": "write `let name = value`",
}
_VALUES = {"None", "True", "False"}
_MODULES = {"torch", "np", "numpy", "nn", "F", "functional", "linalg", "init", "math", "jnp", "jax", "tf"}
_DRAWS = {"zeros": _DRAWN_ZEROS, "ones": "a value that is not drawn stands after `=`: `param A[m, n] = 1`",
          "eye": "an identity is `param A[n, n] = I(n)`",
          "randn": "write `normal()`", "rand": "write `uniform()`"}

_WHICH = "which modules are taken stands in the head of a target: `target \"**.{q,v}_proj\" { ... }`"
_ARGUMENT_NAMES = {"r": "rank", "lora_r": "rank", "lora_alpha": "alpha", "lora_dropout": "dropout"}
_ARGUMENTS = {
    "dropout": "dropout stands after the step: `add low_rank(8) dropout(5%)`",
    "target_modules": _WHICH, "target_parameters": _WHICH, "layers_to_transform": (
        "layers stand in the pattern: `target \"**.layers.{0..3}.**.q_proj\" { ... }`"),
    "exclude_modules": "what is left out stands in the head of a target: `target linear except \"**.k_proj\" { ... }`",
    "modules_to_save": "what is trained besides stands in a statement of its own: `train \"**.norm.*\"`",
    "init_lora_weights": "how a parameter starts stands in its definition; `surgery specs` lists other starts of LoRA",
    "use_dora": "DoRA is `post magnitude()` after the update", "use_rslora": (
        "for rank-stabilised LoRA pass `alpha = alpha * sqrt(rank)`"),
    "bias": "a bias is trained with `train \"**.bias\"`",
}

#: By a character that is in no token of the language, or a terminal that cannot stand where it does.
SYMBOLS = {
    "'": "a string stands in double quotes", ";": "a statement ends where the next one begins: leave the `;` out",
    "&": "write `and`", "|": "write `or`", "!": "write `not`", "%": "a percentage has no space: `5%`",
    ".": "a number has digits on both sides of its point; of a value, only `.T` can be asked",
    "^": _POWER, "?": _CONDITION, "\\": "a statement may go on in the next line: leave the `\\` out",
    "_IF": "put `if ... then ... else ...` in parentheses here",
    "COMPARE": "comparisons do not chain: join two of them with `and`",
    "EQUAL": "to compare, write `==`",
}


def instead_of(name: str, drawn: bool = False) -> str:
    """What a spec writes instead of a function or a word of another language; empty for one that is not known here."""
    return (_DRAWS.get(name) if drawn else None) or _NAMES.get(name, "")


def instead_of_argument(name: str, known: Iterable[str]) -> tuple[str, tuple[str, ...]]:
    """(label, helps) for an argument, or a spec's parameter, that is not among the `known` ones."""
    known = list(known)
    meant = _ARGUMENT_NAMES.get(name, name)
    if meant in known:
        return f"did you mean `{meant}`?", ()
    if meant in _ARGUMENTS:
        return "", (_ARGUMENTS[meant],)
    return did_you_mean(name, known), ()


def instead_of_statement(word: str, text: str, in_file: bool) -> str:
    """What to write where a statement is due and there is a word that begins none; `text` is what stands after it."""
    if word in _ARGUMENTS:
        return _ARGUMENTS[word]
    if not in_file and (dims := re.match(r"\s*(\[[^\]\n]*\])\s*[=~](?!=)", text)):
        return f"`param {word}{dims[1]} = ...` is trained, and `let {word} = ...` gives a name to a value"
    if re.match(r"\s*(:\s*\w+\s*)?=(?!=)", text):
        meant = _ARGUMENT_NAMES.get(word, word)
        return (f"a spec's parameters stand in its header: `spec name({meant}: int = 8)`" if in_file else
                f"`let {word} = ...` gives a name to a value, `param {word} = ...` is trained")
    return "" if word in _VALUES else instead_of(word)


def instead_of_symbols(before: str, symbol: str, after: str, value_due: bool) -> str:
    """What to write instead of a symbol that cannot stand where it does, between the texts before and after it;
    `value_due`: an operand was due there."""
    last = before[-1:]
    if symbol == "^" and (what := re.match(r"\{?(T|top|-1)\b", after)):
        return _INVERSE if what[1] == "-1" else _TRANSPOSE
    if symbol == "*" and last == "*":
        return _POWER
    if symbol == "/" and (last == "/" or after[:1] in ("/", "*")):
        return f"{_COMMENT}; a quotient made whole is `floor(a / b)`"
    if (symbol == "-" and after[:1] == "-" or symbol[:2] == '""' or symbol == "%" and re.search(r"[})]\s*$", before)):
        return _COMMENT
    if symbol == ".":
        return _member(before, after)
    if symbol == "=" and last in tuple("+-*/@"):
        return "a name is given its value once: `let sum = a + b`"
    if symbol == "'" and re.match(r"[\w)\]]", last):
        return _TRANSPOSE
    if symbol == "[" and re.match(r"[:,\s]*None", after):
        return _AS_COLUMN
    if symbol == "[" and not value_due:
        return ("a tensor has no index: write `rows(A, range(i, j))`, `columns(A, range(i, j))`, or `take(A, places)` "
                "for entries of it; a part that is trained alone is a `param` of its own")
    return ""


def _member(before: str, after: str) -> str:
    """What to write for `torch.norm(A)`, and for `A.norm()`."""
    owner, member = re.search(r"[A-Za-z_]\w*$", before), re.match(r"([A-Za-z_][\w.]*)(\s*\()?", after)
    if owner is None or member is None:
        return ""
    name = member[1].rpartition(".")[2]
    if owner[0] in _MODULES and member[2]:
        return instead_of(name) or f"a function stands without its module: `{name}(...)`"
    if owner[0] in _MODULES:
        return "classes of torch are no words of the language: `target linear { ... }`"
    return instead_of(name) or (f"a function takes it as an argument: `{name}({owner[0]})`" if member[2] else "")
