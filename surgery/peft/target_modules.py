"""Find the modules that a configuration of PEFT's names, by PEFT's own rules, and what it says for each of them.

Takes the fields of `adapter_config.json` as plain values; gives module names, and the fields as they hold for one
module. Promises: the model is only looked at; the rules are those of PEFT 0.21.2, which names a module by the end of
its name.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from math import prod
from time import process_time
from typing import Any

import regex
from torch import nn

from surgery.diagnostics import fail
from surgery.layers.layouts import LINEAR, weights
from surgery.layers.survey import Site, output_embedding
from surgery.layers.wrappers import bare, named_modules
from surgery.peft.table.method import Config, Family
from surgery.runtime.adapter import Adapter
from surgery.runtime.step_tensors import StepTensors

ALL_LINEAR = "all-linear"
_CLASSIFIERS = ("score", "classifier")  # what the head of a text classifier is called
_EMBEDDINGS = ("embed_tokens", "lm_head")  # by these names PEFT knows what may be tied
_LAYER = re.compile(r".*?\.[^.]*\.(?P<index>\d+)\.")


def named(config: Config, model: nn.Module) -> list[str]:
    """The modules that `target_modules` and the fields beside it choose, in module order. Raises: SurgeryError
    (bad-adapter)."""
    wanted = config.get("target_modules")
    if isinstance(wanted, str) and wanted.lower() == ALL_LINEAR:
        wanted = all_linear(model, config.get("task_type"))
    chosen, excluded = _chooser(wanted, config), _chooser(config.get("exclude_modules"))
    # What lies in a module that is saved whole cannot be a target.
    saved = [_Regular(rf"(^|.*\.){each}($|\..*)") for each in config.get("modules_to_save") or ()]
    return [name for name, _ in modules(model)
            if name and chosen(name) and not (excluded(name) or any(each.match(name) for each in saved))]


def parameters(config: Config, model: nn.Module) -> list[str]:
    """The parameters that `target_parameters` chooses by their names or the ends of those, in the order in which PEFT
    wraps their modules."""
    ends = tuple(f".{each}" for each in config.get("target_parameters") or ())
    return [f"{name}.{own}" for name, module in modules(model) if ends and name
            for own, _ in module.named_parameters(recurse=False) if f".{name}.{own}".endswith(ends)]


def holders(parameters: Sequence[str]) -> dict[str, str]:
    """In front of what PEFT saves the tensors of each of these parameters: it wraps their module once for each, and the
    first one's tensors are the innermost."""
    owners = [name.rpartition(".")[0] for name in parameters]
    return {name: owner + ".base_layer" * owners[i + 1:].count(owner)
            for i, (name, owner) in enumerate(zip(parameters, owners))}


def names_there(sites: Sequence[Site]) -> tuple[list[str], dict[str, str]]:
    """What PEFT calls these weights; and of those that it reaches by `target_parameters` alone, having no adapter for
    the module itself, their holders."""
    own = {s.name: s.stack is not None or s.layout is LINEAR and not weights(s.module) for s in sites}
    names = [site.weight_name if own[site.name] else site.name for site in sites]
    return names, holders([name for name, site in zip(names, sites) if own[site.name]])


def modules(model: nn.Module, aliases: bool = False) -> Iterator[tuple[str, nn.Module]]:
    """The model's own modules by name, in module order, under all their names if `aliases`; those of adapters, and
    wrappers around parts of the model, are not its own."""
    seen = {id(inner) for m in model.modules() if isinstance(m, (Adapter, StepTensors)) for inner in m.modules()}
    for name, module in named_modules(model):
        if id(module) not in seen:
            yield name, module
        if not aliases:
            seen.add(id(module))


def all_linear(model: nn.Module, task: str | None) -> list[str]:
    """What `all-linear` stands for: every linear layer but the output head, or a text classifier's."""
    own = bare(model)
    head = output_embedding(own)
    if head is None and task == "SEQ_CLS":
        head = next((getattr(own, name) for name in _CLASSIFIERS if hasattr(own, name)), None)
    # The first weight says what a module is: a stack of experts is no linear layer to PEFT, nor is an embedding.
    first = ((name, m, next(iter(weights(m)), None)) for name, m in modules(model))
    return [name for name, m, weight in first
            if weight is not None and weight.stack is None and weight.layout.kind.acts_by_rows and m is not head]


def _chooser(wanted: str | Collection[str] | None, layers: Config | None = None) -> Callable[[str], Any]:
    """A text is a regular expression for the whole name; a list holds names, of whatever layer, and ends of names."""
    if isinstance(wanted, str):
        return _Regular(wanted).fullmatch
    exact, config = frozenset(wanted or ()), layers or {}
    counted, lists = config.get("layers_to_transform"), config.get("layers_pattern") or ()
    if counted is None or counted == []:
        return lambda name: not exact.isdisjoint(ends_of(name))
    numbers = {counted} if isinstance(counted, int) else set(counted)
    lists = [lists] if isinstance(lists, str) else lists
    patterns = [_Regular(rf"(?:^|.*?\.){each}\.(?P<index>\d+)\.") for each in lists] or [_LAYER]

    def chosen(name: str) -> bool:
        if name in exact or exact.isdisjoint(ends_of(name)):
            return name in exact
        # The first pattern that matches says the layer, even if a later one would say another; a module outside of any
        # layer is not chosen by an end of its name.
        matched = next(filter(None, (pattern.match(name) for pattern in patterns)), None)
        return matched is not None and int(matched["index"]) in numbers

    return chosen


def ends_of(name: str) -> list[str]:
    """A dotted name from each of its segments on: `a.b.c`, `b.c`, `c`."""
    parts = name.split(".")
    return [".".join(parts[i:]) for i in range(len(parts))]


def saved_whole(wanted: Iterable[str] | None, model: nn.Module) -> list[str]:
    """The modules that `modules_to_save` means: every one whose name ends like that, inside a word too, under all its
    names."""
    ends = tuple(wanted or ())
    return [name for name, _ in modules(model, aliases=True) if name and name.endswith(ends)]


def ties(config: Config, chooser: str) -> bool:
    """Whether PEFT keeps tied weights together that a field names, as it was told to: it looks for two names alone, and
    first among the modules to save."""
    def names_embedding(wanted: str | Iterable[str] | None) -> bool:
        if isinstance(wanted, str):
            return any(_Regular(wanted).fullmatch(name) for name in _EMBEDDINGS)
        return any(name.rpartition(".")[2] in _EMBEDDINGS for name in wanted or ())

    named = (field for field in ("modules_to_save", "target_modules") if names_embedding(config.get(field)))
    return bool(config.get("ensure_weight_tying")) and next(named, None) == chooser


def resolved(config: Config, family: Family, name: str) -> dict[str, Any]:
    """The configuration as it holds for one module: a pattern's value in its field's place, and a field that lists
    modules says whether this is one of them."""
    here = dict(config)
    for own, exceptions in family.patterns.items():
        # the first pattern that fits the end of the name, as PEFT reads them; null counts as no exception
        fitting = (value for key, value in (config.get(exceptions) or {}).items() if fits_end(key, name))
        if (exception := next(fitting, None)) is not None:
            here[own] = exception
    for listing in family.lists:
        wanted = config.get(listing)
        here[listing] = (_Regular(wanted).fullmatch(name) is not None if isinstance(wanted, str)
                         else name.endswith(tuple(wanted or ())))
    return here


def fits_end(pattern: str, name: str) -> bool:
    """Whether a regular expression fits a name, or the end of it from a dot on."""
    return _Regular(rf"(.*\.)?({pattern})$").match(name) is not None


# ------------------------------------------------------------------------------------------------ regular expressions

_PATIENCE = 10.0  # seconds of work for all the patterns of an adapter: they need some thousandths
_LONGEST, _REPEATS = 1 << 18, 10**5  # of one pattern: its text, and the product of the numbers in its {n,m}
_left: ContextVar[list[float]] = ContextVar("seconds left for the patterns of an adapter")


@contextmanager
def in_time() -> Iterator[None]:
    """Inside, all patterns together have a bound on the time that they take."""
    token = _left.set([_PATIENCE])
    try:
        yield
    finally:
        _left.reset(token)


class _Regular:
    """A regular expression of `re`, as PEFT reads them, that gives up after a while.

    `re` takes 2^n steps for some patterns of n characters and cannot be stopped. An engine that is linear (RE2) has no
    lookahead, which patterns such as `^(?!.*vision).*q_proj` are written with; `regex` reads what `re` reads, and takes
    a bound. The few things that it reads otherwise are refused, and so are the repeats that it would unroll.
    """

    def __init__(self, text: str):
        self.text = text
        bare = re.sub(r"\\.", "", text, flags=re.DOTALL)
        repeats = re.findall(r"\{(\d*)(?:,(\d*))?\}", bare)
        try:
            if len(text) > _LONGEST:
                raise ValueError(f"it is longer than {_LONGEST:,} characters")
            if "[:" in bare or "{" in re.sub(r"\{\d*(,\d*)?\}", "", bare):
                raise ValueError("it has a `[:`, or a `{` that repeats nothing")
            if prod(max((int(n) for n in pair if n), default=1) or 1 for pair in repeats) > _REPEATS:
                raise ValueError(f"it repeats more than {_REPEATS:,} times")
            with warnings.catch_warnings(), self._timed():
                warnings.simplefilter("ignore")
                re.compile(text)  # refuses what PEFT could not read, though `regex` might
                self.pattern = regex.compile(text)
        except (re.error, regex.error, ValueError, OverflowError, RecursionError) as error:
            raise fail("bad-adapter",
                       f"`{text[:200]}` of adapter_config.json is no regular expression: {error}") from None

    def fullmatch(self, name: str) -> regex.Match[str] | None:
        with self._timed() as seconds:
            return self.pattern.fullmatch(name, timeout=seconds)

    def match(self, name: str) -> regex.Match[str] | None:
        with self._timed() as seconds:
            return self.pattern.match(name, timeout=seconds)

    @contextmanager
    def _timed(self) -> Iterator[float]:
        left, start = _left.get([_PATIENCE]), process_time()
        try:
            if left[0] <= 0:
                raise TimeoutError
            yield left[0]
        except TimeoutError:
            raise fail("bad-adapter", f"`{self.text[:200]}` of adapter_config.json takes too long to match",
                       helps=("name the modules in a list",)) from None
        finally:
            left[0] -= process_time() - start
