"""Conflicts: which target a site belongs to when several take it, and which weights are tied.

Takes the matches of all targets; gives the owner of each site. Promises: an override wins only where its sites are a
strict subset of the other target's, whatever the order of the targets;
two targets that take one site otherwise are an error.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import combinations

import torch
from torch import Tensor, nn

from surgery.diagnostics import Collector
from surgery.layers.survey import Site, Survey
from surgery.matching.matches import Matches
from surgery.text import counted, listed


def owners(matches: Sequence[Matches], report: Collector) -> dict[Site, Matches]:
    """The target that each site belongs to: the narrowest, which must be an override of the others."""
    for first, second in combinations(matches, 2):
        _report_pair(first, second, report)
    # The wide ones first, so that a narrower one writes over them. The order of the targets in the spec plays no part:
    # moving a target must never change what a spec means.
    owned: dict[Site, Matches] = {}
    for each in sorted(matches, key=lambda each: len(each.sites), reverse=True):
        owned |= dict.fromkeys(each.sites, each)
    for each in matches:
        others = [o for o in matches if o is not each and _shared(each, o)]
        if each.target.override and each.sites and not others:
            report.error("not-narrower", "the override overrides nothing: no other target takes "
                         f"{listed(s.name for s in each.sites)}", each.target.span, helps=("write `target`",))
        # Two overrides can take all of a third target between them, though each alone is narrower than it. Where a pair
        # is wrong already, that has been reported, and is the cause.
        if each.sites and each not in owned.values() and all(_overrides(o, each) for o in others):
            report.error("not-narrower", "nothing is left of this target: overrides take all of its "
                         f"{counted(len(each.sites), 'module')}", each.target.span)
    return owned


def _shared(first: Matches, second: Matches) -> list[Site]:
    return [s for s in first.sites if s in second.sites]


def _overrides(narrow: Matches, wide: Matches) -> bool:
    return narrow.target.override and narrow.sites.keys() < wide.sites.keys()


def _report_pair(first: Matches, second: Matches, report: Collector) -> None:
    """An error where two targets take a site and neither is an override that is narrower than the other."""
    shared = _shared(first, second)
    if not shared or _overrides(first, second) or _overrides(second, first):
        return
    if first.target.override or second.target.override:
        override, other = (first, second) if first.target.override else (second, first)
        beyond = [s for s in override.sites if s not in other.sites]
        both = f"both take {counted(len(other.sites), 'module')}"
        why = f"it also takes {listed(s.name for s in beyond)}" if beyond else both
        related = ((other.target.span, "the target that it would override"),) if other.target.span else ()
        report.error("not-narrower", f"the override is not narrower than {other}: {why}", override.target.span,
                     related=related,
                     helps=("an override must take some, but not all, of the modules of the target that it overrides",))
        return
    # Without `override` the writer may not have seen that they overlap: offer it only where it would be allowed.
    narrower = next((r for r, o in ((first, second), (second, first)) if r.sites.keys() < o.sites.keys()), None)
    helps = (f"`override target` lets {narrower} win, which is the narrower" if narrower
             else "`except` takes modules out of one of the two",)
    related = ((first.place(shared[0]), "this one takes it first"),) if first.place(shared[0]) else ()
    place = second.place(shared[0])
    report.error("overlap", f"two targets take {listed(s.name for s in shared)}", place, label="taken again here",
                 related=related, helps=helps, notes=() if place else (f"{first} and {second}",))


# ---------------------------------------------------------------------------------------------------- tied weights


def tied(survey: Survey) -> dict[str, tuple[str, ...]]:
    """The parameters that share numbers in memory with others, each with the names of those. One module object that
    stands at two names is not tied: it has one weight, and one adapter."""
    modules = ((names[0], survey.modules[names[0]]) for names in survey.names.values())
    parameters = {f"{module}.{name}".lstrip("."): parameter for module, holder in modules
                  for name, parameter in holder._parameters.items() if parameter is not None}
    # transformers ties some weights only when it loads values: a skeleton on the meta device may not have them tied
    # yet, and only the model's configuration tells.
    model = survey.model
    promised: Mapping[str, str] = {}
    if getattr(getattr(model, "config", None), "tie_word_embeddings", False):
        promised = getattr(model, "all_tied_weights_keys", None) or {}
    sources = {name: parameters.get(promised.get(name, name), parameter) if parameter.is_meta else parameter
               for name, parameter in parameters.items()}
    shared: dict[str, list[str]] = {}
    for group in _overlapping(sources):
        for first, second in combinations(group, 2):
            if have_common(sources[first], sources[second]):
                shared.setdefault(first, []).append(second)
                shared.setdefault(second, []).append(first)
    return {name: tuple(shared[name]) for name in parameters if name in shared}


def _overlapping(sources: Mapping[str, nn.Parameter]) -> Iterator[list[str]]:
    """The names of parameters whose stretches of memory overlap, two or more at a time, in their order."""
    order = {name: place for place, name in enumerate(sources)}
    stretches: dict[object, list[tuple[int, int, str]]] = {}
    for name, source in sources.items():
        if source.is_meta or nn.parameter.is_lazy(source) or not source.data_ptr():
            stretches.setdefault(id(source), []).append((0, 1, name))  # without data only the same object is the same
        else:
            last = sum((size - 1) * step for size, step in zip(source.shape, source.stride()))
            start = source.data_ptr()
            stretches.setdefault(source.device, []).append((start, start + (last + 1) * source.element_size(), name))
    for held in stretches.values():
        group, end = [], 0
        for start, stop, name in sorted(held):
            if start >= end and len(group) > 1:
                yield sorted(group, key=order.__getitem__)
            group, end = ([name], stop) if start >= end else ([*group, name], max(end, stop))
        if len(group) > 1:
            yield sorted(group, key=order.__getitem__)


def have_common(first: Tensor, second: Tensor) -> bool:
    """Whether two tensors whose stretches of memory overlap hold a number in common: the two halves of a matrix's
    columns, which lie in turns, do not."""
    if first is second or (first.data_ptr(), first.shape, first.stride()) == (
            second.data_ptr(), second.shape, second.stride()):
        return True
    size, apart = first.element_size(), abs(first.data_ptr() - second.data_ptr())
    if size != second.element_size() or apart % size:
        return True
    lower, higher = sorted((first, second), key=Tensor.data_ptr)
    held = 1 + sum((length - 1) * step for length, step in zip(lower.shape, lower.stride()))
    if apart >= held * size or lower.numel() == held:  # without holes it has the other's first number, if that is in it
        return apart < held * size
    places = []
    for tensor, start in ((lower, 0), (higher, apart // size)):
        at = torch.tensor(start, device="cpu")
        for length, step in zip(tensor.shape, tensor.stride()):
            at = at[..., None] + step * torch.arange(length if step else 1, device="cpu")
        places.append(at.flatten())
    return bool(torch.isin(*places).any())


def report_tied(owned: Mapping[Site, Matches], survey: Survey, report: Collector) -> None:
    """An error for every targeted weight that is tied, unless its target says `untie`."""
    shared = tied(survey)
    reported: set[frozenset[str]] = set()  # one error a group, though each of its weights may be targeted
    for site, owner in owned.items():
        others = shared.get(site.weight_name, ())
        group = frozenset((site.weight_name, *others))
        if others and not owner.target.untie and group not in reported:
            reported.add(group)
            report.error("tied-weight", f"`{site.weight_name}` is tied to {listed(others)}: they share one weight, and "
                         "conditioning it at one place would not condition it at the other", owner.place(site),
                         helps=("`untie` before the `{` gives this one a weight of its own",))
