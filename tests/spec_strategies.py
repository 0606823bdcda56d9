"""Random specs, built as trees (not as text), for the round trips of the syntax stage."""

from hypothesis import strategies as st

from surgery.language import tree
from surgery.language.grammar import KEYWORDS, SOFT_WORDS
from surgery.language.well_formed import HEAD_WORDS, MAX_INT

names = st.one_of(
    st.sampled_from(["rank", "alpha", "d", "W", "T", "e5", "letter", "iffy", "spec_", "_", *sorted(SOFT_WORDS)]),
    st.from_regex(r"[A-Za-z_][A-Za-z0-9_]{0,5}", fullmatch=True).filter(lambda name: name not in KEYWORDS))
selector_names = names.filter(lambda name: name not in HEAD_WORDS)
texts = st.text(st.characters(blacklist_characters='"\r\n', blacklist_categories=["Cs"]), max_size=6)
patterns = st.one_of(st.sampled_from(["**.q_proj", "**.{q,k}_proj", "**.layers.{-4..-1}.#", "*"]), texts)
parens = st.integers(0, 2)
numbers = st.one_of(st.integers(0, MAX_INT), st.floats(0, allow_nan=False, allow_infinity=False)).filter(
    lambda x: str(x)[0] != "-")


def tuples(items, **sizes):
    return st.lists(items, **sizes).map(tuple)


def calls(values):
    """A call: positional arguments, then named ones, each once."""
    positional = tuples(values.map(lambda v: tree.Argument(None, v)), max_size=2)
    named = st.dictionaries(names, values, max_size=2).map(lambda d: tuple(tree.Argument(k, v) for k, v in d.items()))
    return st.builds(lambda f, a, b, p: tree.Call(f, a + b, parens=p), names, positional, named, parens)


def grown(values):
    signs = st.sampled_from(["-", "not"])
    operators = st.sampled_from(["+", "-", "*", "/", "@", "<", "<=", ">", ">=", "==", "!=", "and", "or"])
    return st.one_of(
        st.builds(tree.Unary, signs, values, parens=parens),
        st.builds(tree.Binary, operators, values, values, parens=parens),
        st.builds(tree.Transpose, values, parens=parens), st.builds(tree.If, values, values, values, parens=parens),
        calls(values))


expressions = st.recursive(
    st.one_of(st.builds(tree.Number, numbers, parens=parens), st.builds(tree.Boolean, st.booleans(), parens=parens),
              st.builds(tree.Name, names, parens=parens), st.builds(tree.String, texts, parens=parens)),
    grown, max_leaves=8)
step_calls = calls(expressions).map(lambda call: tree.Call(call.function, call.arguments))

comments = texts.map(lambda text: f"# {text}".rstrip())
comment_lines = st.lists(comments, max_size=2).flatmap(
    lambda lines: st.sampled_from([tuple(lines), tuple(c for line in lines for c in (line, ""))]))
trivia = st.builds(tree.Trivia, above=comment_lines, beside=st.one_of(st.just(""), comments),
                   inside=st.lists(comments, max_size=1).map(tuple), blank=st.booleans())
leaf_trivia = st.builds(tree.Trivia, above=comment_lines, beside=st.one_of(st.just(""), comments), blank=st.booleans())

parameters = st.builds(tree.Parameter, name=names, type=st.sampled_from(["int", "float", "bool", "str"]),
                       default=st.none() | expressions, trivia=leaf_trivia)
checks = st.builds(tree.Check, condition=expressions, trivia=leaf_trivia)
selectors = tuples(st.one_of(patterns.map(tree.Pattern), selector_names.map(tree.Reference)), min_size=1, max_size=3)
values = st.fixed_dictionaries({"init": expressions}) | st.fixed_dictionaries({"draw": step_calls})
clauses = st.fixed_dictionaries({"frozen": st.just(True)}) | st.fixed_dictionaries(
    {"rate": st.none() | expressions, "decay": st.booleans(), "manifold": st.sampled_from([None, "stiefel"])})
params = st.builds(lambda value, clauses, **more: tree.Param(**value, **clauses, **more), values, clauses, name=names,
                   dims=tuples(expressions, max_size=2),
                   shared=st.sampled_from([False, True, "module", "layer", "model"]), trivia=leaf_trivia)
noises = st.builds(tree.Noise, name=names, dims=tuples(expressions, max_size=2), draw=step_calls, trivia=leaf_trivia)
lets = st.builds(tree.Let, name=names, value=expressions, trivia=leaf_trivia)


@st.composite
def definitions(draw):
    kind = draw(st.sampled_from(["transform", "update"]))
    pool = draw(st.lists(names, min_size=5, max_size=5, unique=True))
    signature = tuple(draw(parameters).model_copy(update={"name": name}) for name in pool[: draw(st.integers(0, 2))])
    body = tuple(draw(params | noises | lets).model_copy(update={"name": name})
                 for name in pool[2 : 2 + draw(st.integers(0, 2))])
    return tree.Definition(
        kind=kind, name=draw(names), params=signature, dim=pool[4] if kind == "transform" else None, body=body,
        claims=draw(tuples(names, max_size=2, unique=True)), checks=draw(tuples(checks, max_size=1)),
        result=draw(expressions), trivia=draw(trivia), result_trivia=draw(leaf_trivia))


steps = st.one_of(
    st.builds(tree.Step, placement=st.sampled_from(["pre", "post"]), call=step_calls,
              side=st.sampled_from(["out", "in"]),
              bias=st.booleans(), trivia=leaf_trivia),
    st.builds(tree.Step, placement=st.just("add"), call=step_calls, dropout=st.none() | expressions,
              trivia=leaf_trivia))
targets = st.builds(
    tree.Target, kind=st.sampled_from(["linear", "conv", "embedding", "any"]), ancestor=st.none() | names,
    selectors=st.just(()) | selectors, exclude=st.just(()) | selectors, override=st.booleans(), shifted=st.booleans(),
    untie=st.booleans(), steps=tuples(steps, min_size=1, max_size=3), trivia=trivia)


@st.composite
def specs(draw):
    name = draw(st.none() | names)
    signature = draw(tuples(parameters, max_size=2, unique_by=lambda p: p.name)) if name else ()
    return tree.Spec(
        name, language=draw(st.sampled_from([None, None, 1])), params=signature,
        uses=draw(tuples(st.builds(tree.Use, path=texts, trivia=leaf_trivia), max_size=1)),
        checks=draw(tuples(checks, max_size=1)), definitions=draw(tuples(definitions(), max_size=2)),
        selects=draw(tuples(st.builds(tree.Select, name=selector_names, patterns=selectors, trivia=leaf_trivia),
                            max_size=1)),
        targets=draw(tuples(targets, max_size=2)), trivia=draw(trivia) if name else tree.Trivia(),
        train=draw(tuples(st.builds(tree.Train, patterns=selectors, trivia=leaf_trivia), max_size=1)))
