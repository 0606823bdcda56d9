"""Specs as a whole: where they come from, what is in scope in them, and how they are changed.

Takes text, files and shipped names; gives a `Spec` and its `Library` of definitions and selectors (the prelude
`std.surg`, the files that it `use`s, its own). Promises: a name defined twice, an import cycle and a missing file are
diagnostics with their places.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from os import PathLike
from pathlib import Path
from typing import Any

from surgery.diagnostics import Collector, Source, Span, did_you_mean, fail, nearest, working_folder
from surgery.files import SPEC_BYTES, as_written, read_bytes
from surgery.given import takes
from surgery.language import resources
from surgery.language.formatter import step_text
from surgery.language.other_languages import instead_of_argument
from surgery.language.parser import parse_expression, parse_text
from surgery.language.tree import Argument, Definition, Pattern, Reference, Select, Spec, as_expression, every_step
from surgery.language.unsupported_methods import refusal

PRELUDE = "std"
_LONGEST_PATH = 100  # characters of a path in a message
_SET = "<--set>"  # what stands for a setting of the command line in diagnostics
_KEPT = 2**16  # characters of the longest text whose tree is kept


@dataclass(frozen=True)
class Library:
    """What a spec can name: transforms and updates, and selectors."""

    definitions: Mapping[str, Definition]
    selects: Mapping[str, Select]


@takes(text="text")
def parse(text: str, name: str = "<text>") -> Spec:
    """Read a spec from its text; diagnostics call it `name`. Raises: SurgeryError.

    >>> import surgery
    >>> surgery.parse('spec small(rank: int = 4) target "**.q_proj" { add low_rank(rank) }')
    <Spec small(rank): target any "**.q_proj">
    """
    return parse_text(text, name)


def shipped() -> dict[str, Path]:
    """The specs that come with the package, by name.

    >>> import surgery
    >>> surgery.shipped()["dora"].name
    'dora.surg'
    """
    return {p.stem: p for p in sorted(resources.folder("specs").glob("*.surg")) if p.stem != PRELUDE}


def instead_of_step(name: str) -> tuple[str, ...]:
    """What to write where a step calls a spec, which is no definition: the steps of a spec that ships."""
    if why := refusal(name):
        return (why.diagnostics[0].message,)
    if name not in shipped():
        return ()
    spec = read(shipped()[name])
    steps = dict.fromkeys(step for target in spec.targets for step in every_step(target.steps))
    if not steps:
        return (f"`{name}` is a spec that ships, and has no step that could be placed",)
    instead = f"`{name}` is a spec, which has targets of its own; write its steps: " + ", ".join(
        f"`{step_text(step)}`" for step in steps)
    own = {step.call.function for step in steps} & {definition.name for definition in spec.definitions}
    where = f"`surgery show {name} --emit spec` prints it, with the definition of {' and '.join(sorted(own))}"
    return instead, *([where] if own else [])


@takes(spec="file")
def load(spec: str | PathLike, /, **parameters: Any) -> Spec:
    """Read the spec at a path or of a shipped name, and set its parameters. Raises: SurgeryError.

    >>> import surgery
    >>> surgery.load("lora", rank=4).params[0].default
    Number(value=4)
    """
    return bind(read(locate(spec)), keywords(parameters))


def locate(spec: str | PathLike) -> Path:
    """The file that a path, a shipped name or that of the prelude means. Raises: SurgeryError (unknown-spec,
    no-weight)."""
    # The ending decides, and not what lies there: `lora.surg` is a file even where none exists, and then said to be
    # missing; `lora` is the shipped spec even beside a folder of that name.
    path, ours = Path(spec), {**shipped(), PRELUDE: resources.folder("specs") / f"{PRELUDE}.surg"}
    if _is_no_path(str(spec)):
        raise fail("unknown-spec", f"`{_shortened(path)}` can be no file's name, and is no shipped spec's")
    if path.suffix == ".surg" or (path.exists() and not path.is_dir()):
        return path
    if str(spec) in ours:
        return as_written(ours[str(spec)])
    if path.is_dir():
        raise fail("unknown-spec", f"{spec} is a folder", helps=(f"name its files: {path / '*.surg'}",))
    if why := refusal(str(spec)):
        raise why
    hint = did_you_mean(str(spec), ours)
    raise fail("unknown-spec", f"`{spec}` is neither a .surg file nor a shipped spec",
               helps=(*filter(None, [hint]), "`surgery specs` lists those that ship"))


def read(path: Path, asked: Span | None = None) -> Spec:
    """The spec in a file; `asked` is the place in another spec that named it: then it must be a regular file, where a
    user may name a pipe. Raises: SurgeryError (missing-file, syntax)."""
    try:
        text = read_bytes(path, SPEC_BYTES, any_kind=asked is None).decode("utf-8")
    except OSError as error:
        helps = []
        if error.errno == errno.ENOENT:  # else the file is there, and another name would be no better
            near = nearest(path.stem, (p.stem for p in path.parent.glob("*.surg")))
            helps = [f"did you mean `{stem}.surg`?" for stem in near]
            helps += [f"`{path.stem}` is the name of a spec that ships"] if path.stem in shipped() else []
        raise fail("missing-file", f"cannot read {_shortened(path)}: {error.strerror or error}", asked,
                   helps=tuple(helps)) from None
    except UnicodeDecodeError as error:
        raise fail("missing-file", f"cannot read {path}: byte {error.start} is not UTF-8", asked) from None
    return _parsed(text, str(path), working_folder()) if len(text) <= _KEPT else parse_text(text, str(path))


# A tree is frozen: a file that is read again, and says the same, is the same spec. (In another folder one of that name
# is another file, whose `use` brings in others.)
@lru_cache(maxsize=256)
def _parsed(text: str, name: str, folder: str) -> Spec:
    return parse_text(text, name)


def _shortened(path: Path) -> str:
    """A path as a message names it: of a long one the end."""
    return text if len(text := str(path)) <= _LONGEST_PATH else f"...{text[-_LONGEST_PATH:]}"


# ---------------------------------------------------------------------------------------------------- scope


@lru_cache(maxsize=1)
def _prelude() -> Spec:
    path = resources.folder("specs") / f"{PRELUDE}.surg"
    return parse_text(path.read_text(encoding="utf-8"), path.name)  # named alike on every machine


def library(spec: Spec) -> Library:
    """All that is in scope in a spec. Raises: SurgeryError (missing-file, import-cycle, duplicate-name)."""
    report = Collector()
    # the prelude itself uses none; all files are one scope, so that no name means one thing here and another there
    files = [*([_prelude()] if spec != _prelude() else []), *used(spec), spec]
    scope = Library(_by_name((d for f in files for d in f.definitions), report),
                    _by_name((s for f in files for s in f.selects), report))
    report.raise_errors()
    return scope


def _by_name(declared: Iterable, report: Collector) -> dict:
    by_name: dict = {}
    for item in declared:
        first = by_name.setdefault(item.name, item)
        if first is not item:
            related = ((first.name_span, "first defined here"),) if first.name_span else ()
            report.error("duplicate-name", f"`{item.name}` is defined twice", item.name_span, label="second definition",
                         related=related, helps=("give one of them another name",))
    return by_name


def used(spec: Spec) -> list[Spec]:
    """The files that a spec brings in with `use`, each once, those that they use themselves first."""
    files: dict[Path, Spec] = {}
    _follow(spec, files, ())
    return list(files.values())


def _follow(spec: Spec, files: dict[Path, Spec], trail: tuple[tuple[Path, Span | None], ...]) -> None:
    here = Path(spec.span.source.folder, spec.span.source.name).resolve() if spec.span else Path("spec").resolve()
    for use in spec.uses:
        path = here.parent / use.path
        if _is_no_path(str(path)):
            raise fail("missing-file", f"`{_shortened(Path(use.path))}` can be no file's name", use.span)
        # Files are told apart by where they are, and not by how they are called: `a.surg` and `./a.surg` are one.
        place = path.resolve()
        passed = (*trail, (here, use.span))
        if place in [p for p, _ in passed]:
            earlier = tuple((span, "which is used from here") for _, span in passed[:-1] if span)
            raise fail("import-cycle", f"`{use.path}` comes to use itself", use.span, related=earlier,
                       helps=("move what both need into a third file",))
        if place not in files:
            file = read(as_written(path), use.span)
            _follow(file, files, passed)
            files[place] = file


def _is_no_path(text: str) -> bool:
    """Whether no file can be called so: it holds a zero byte, or the system takes no name of that length."""
    try:
        os.stat(text)
    except (ValueError, OSError) as error:
        return not isinstance(error, OSError) or error.errno == errno.ENAMETOOLONG
    return False


# --------------------------------------------------------------------------------------------------- change


def bind(spec: Spec, arguments: Iterable[Argument]) -> Spec:
    """The spec with parameters set: each value becomes the parameter's default. Raises:
    SurgeryError (unknown-parameter)."""
    # As new defaults, so that a spec with its values is a spec like any other, which can be saved and printed.
    report, known, values = Collector(), [p.name for p in spec.params], {}
    who = f"`{spec.name}`" if spec.name else "a spec without a name"
    for argument in arguments:
        values[argument.name] = argument.value
        if argument.name not in known:
            label, helps = instead_of_argument(argument.name or "", known)
            report.error("unknown-parameter", f"{who} has no parameter `{argument.name}`", argument.name_span,
                         label=label, notes=(f"{who} takes {', '.join(known) or 'none'}",), helps=helps)
    report.raise_errors()
    params = tuple(p.model_copy(update={"default": values[p.name]}) if p.name in values else p for p in spec.params)
    return spec.model_copy(update={"params": params})


def keywords(parameters: Mapping[str, Any]) -> list[Argument]:
    """The arguments that Python's keywords mean. Raises: SurgeryError (bad-value, syntax)."""
    return [Argument(name, as_expression(value)) for name, value in parameters.items()]


def assignment(text: str) -> Argument:
    """What a `--set name=value` says. Raises: SurgeryError (bad-set, syntax), spanned as `<--set>`."""
    name, equals, value = text.partition("=")
    whole = Span(Source(_SET, text), 0, len(text))
    if not equals or not name.strip().isidentifier() or not value.strip():
        raise fail("bad-set", f"`{text}` is not of the form name=value", whole, helps=("for example --set rank=8",))
    place = replace(whole, start=len(name) - len(name.lstrip()), end=len(name.rstrip()))
    return Argument(name.strip(), parse_expression(text, _SET, len(name) + 1), place)


def retarget(spec: Spec, *patterns: str, at: int | None = None) -> Spec:
    """The spec with a target's patterns replaced, which is what `--target` does: of its only target, or of number `at`,
    from 1. A bare name is a selector. Raises: SurgeryError (bad-value)."""
    who, count = f"`{spec.name}`" if spec.name else "a spec without a name", len(spec.targets)
    is_clear = 1 <= (1 if at is None and count == 1 else at or 0) <= count
    if not is_clear and count < 2:
        raise fail("bad-value",
                   f"{who} has no target " + (f"{at}, only one" if count else "that could take other modules"))
    if not is_clear:
        which = f"has {count} targets: say which of them is to take other modules"
        related = []
        for i, span in ((i, target.span) for i, target in enumerate(spec.targets, start=1) if target.span):
            first_line = span.source.text[span.start : span.end].split("\n")[0]  # its head says which one it is
            related.append((replace(span, end=span.start + len(first_line)), f"this is {i}"))
        raise fail("bad-value", f"{who} {which if at is None else f'has no target {at}'}", related=tuple(related),
                   helps=("--target '1=PATTERN', or retarget(PATTERN, at=1); the others keep their modules",))
    if wrong := [p for p in patterns if not isinstance(p, str)]:
        raise fail("bad-value", f"a pattern is a text, not {wrong[0]!r}",
                   helps=("several stand side by side: retarget(\"**.q_proj\", \"**.v_proj\")",))
    # `encoder` may be a module at the top of the model, too: only a name that a `select` has is a selector.
    chosen = tuple(Reference(p) if p.isidentifier() and p in library(spec).selects else Pattern(p) for p in patterns)
    targets = [*spec.targets]
    targets[(at or 1) - 1] = targets[(at or 1) - 1].model_copy(update={"selectors": chosen})
    return spec.model_copy(update={"targets": tuple(targets)})


def inlined(spec: Spec) -> Spec:
    """The spec on its own: the definitions and selectors of the files that it uses stand in it."""
    files = used(spec)
    return spec.model_copy(update={
        "uses": (), "definitions": tuple(d for f in (*files, spec) for d in f.definitions),
        "selects": tuple(s for f in (*files, spec) for s in f.selects)})
