"""A spec to begin with: a text with comments that say what each part is, for a model whose layers it names.

Takes a name, a spec that ships and a model's name; gives a text. Promises: the text is formatted, and `check` finds no
error in it, on the model either.
"""

from __future__ import annotations

from surgery.diagnostics import fail
from surgery.editor.model import Model
from surgery.language.grammar import is_name
from surgery.language.json_fields import Trivia
from surgery.language.library import inlined, load, parse
from surgery.language.tree import Pattern, Spec, Target
from surgery.layers.kinds import LINEAR
from surgery.matching.patterns_from_names import patterns

_OWN = """# NAME: say here what it is.  W' = W + s B A
spec NAME(rank: int = 8, scale: float = 2)

# An update is added to the weight; a transform `on n` is a square matrix that multiplies it.
update NAME_update(rank: int, scale: float) {
  param A[rank, in] ~ kaiming_uniform(a = sqrt(5))
  param B[out, rank] = 0  # so that W' starts as W
  return scale * (B @ A)
}

# Which modules, and what becomes of them: `pre` and `post` multiply, `add` adds.
target linear {
  add NAME_update(rank, scale)
}
"""


def scaffold(name: str, base: str | None = None, model: str | None = None) -> str:
    """The text of a new spec: a definition of its own with what each part means, or what the spec `base` does. With a
    model, its targets name the model's linear layers. Raises: SurgeryError.

    >>> from surgery.editor.scaffold import scaffold
    >>> print(scaffold("mine", "lora").splitlines()[1])
    # surgery check mine.surg: what is wrong with it; surgery show mine.surg: its formula
    """
    if not is_name(name):
        raise fail("bad-value", f"{name!r} cannot be the name of a spec",
                   helps=("a name is made of letters, digits and `_`, and is no word of the language",))
    spec = inlined(load(base)) if base else parse(_OWN.replace("NAME", name))
    about = [f"# {name}: what {base} does, to begin with."] if base else list(spec.trivia.above)
    about += [f"# surgery check {name}.surg: what is wrong with it; surgery show {name}.surg: its formula"]
    about += [f"# surgery plan {name}.surg {model or 'MODEL'}: what it does to a model"]
    targets = spec.targets
    if model:
        about += [f"# surgery: model = {model}"]
        targets = _fitting(spec, Model(model))
    header = Trivia(above=(*spec.trivia.above, *about) if base else tuple(about))
    return spec.model_copy(update={"name": name, "targets": targets, "trivia": header}).to_surg()


def _fitting(spec: Spec, model: Model) -> tuple[Target, ...]:
    """The targets with the model's linear layers in the place of patterns for linear layers, the output head left out
    as it is where a target names nothing."""
    linear = [site for site in model.sites if site.kind == LINEAR.word and not site.is_head]
    if not linear:
        raise fail("bad-value", f"{model.name} has no linear layer that a spec could name")
    ends = list(dict.fromkeys(site.name.rpartition(".")[2] for site in linear))
    # An unnamed list has numbers for names, which say little: there the whole names do.
    texts = patterns(site.name for site in linear) if any(end.isdecimal() for end in ends) else (
        f"**.{{{','.join(ends)}}}" if len(ends) > 1 else f"**.{ends[0]}",)
    chosen = tuple(map(Pattern, texts))
    return tuple(target.model_copy(update={"selectors": chosen, "exclude": ()})
                 if target.kind in ("linear", "any") else target for target in spec.targets)
