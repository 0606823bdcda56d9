"""Claims: which target a site belongs to, when several take it, and which weights are tied.

Takes the reaches of all targets. Gives the owner of each site. Promises: an override wins only where its sites are a
strict subset of the other target's, whatever the order of the targets;
two targets that take one site otherwise are an error.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import combinations

from torch import nn

from surgery.diagnostics import Collector
from surgery.layers.survey import Site, Survey
from surgery.matching.matches import Reach
from surgery.text import counted, listed


def owners(reaches: Sequence[Reach], report: Collector) -> dict[Site, Reach]:
    """The reach that each site belongs to: the narrowest, which must be an override of the others."""
    for first, second in combinations(reaches, 2):
        _report_pair(first, second, report)
    # The wide ones first, so that a narrower one writes over them. The order of the targets in the spec plays no part:
    # moving a target must never change what a spec means.
    owned: dict[Site, Reach] = {}
    for reach in sorted(reaches, key=lambda r: len(r.sites), reverse=True):
        owned |= dict.fromkeys(reach.sites, reach)
    for reach in reaches:
        others = [o for o in reaches if o is not reach and _shared(reach, o)]
        if reach.target.override and reach.sites and not others:
            report.error("not-narrower", "the override overrides nothing: no other target takes "
                         f"{listed(s.name for s in reach.sites)}", reach.target.span, helps=("write `target`",))
        # Two overrides can take all of a third target between them, though each alone is narrower than it. Where a pair
        # is wrong already, that has been reported, and is the cause.
        if reach.sites and reach not in owned.values() and all(_overrides(o, reach) for o in others):
            report.error("not-narrower", "nothing is left of this target: overrides take all of its "
                         f"{counted(len(reach.sites), 'module')}", reach.target.span)
    return owned


def _shared(first: Reach, second: Reach) -> list[Site]:
    return [s for s in first.sites if s in second.sites]


def _overrides(reach: Reach, other: Reach) -> bool:
    return reach.target.override and reach.sites.keys() < other.sites.keys()


def _report_pair(first: Reach, second: Reach, report: Collector) -> None:
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
    """The parameters that share their storage with others, each with the names of those. One module object that stands
    at two names is not tied: it has one weight, and one adapter."""
    modules = ((names[0], survey.modules[names[0]]) for names in survey.names.values())
    parameters = {f"{module}.{name}".lstrip("."): parameter for module, holder in modules
                  for name, parameter in holder._parameters.items() if parameter is not None}
    # transformers ties some weights only when it loads values: a skeleton on the meta device may not have them tied
    # yet, and only the model's configuration tells.
    model = survey.model
    promised: Mapping[str, str] = {}
    if getattr(getattr(model, "config", None), "tie_word_embeddings", False):
        promised = getattr(model, "all_tied_weights_keys", None) or {}
    groups: dict[object, list[str]] = {}
    for name, parameter in parameters.items():
        source = parameters.get(promised.get(name, name), parameter) if parameter.is_meta else parameter
        # Two parameter objects can be views of one storage. Where there is no data, only the same object is the same.
        has_no_data = source.is_meta or nn.parameter.is_lazy(source) or not source.data_ptr()
        storage = id(source) if has_no_data else (source.device, source.data_ptr(), source.shape)
        groups.setdefault(storage, []).append(name)
    return {name: tuple(n for n in group if n != name) for group in groups.values() if len(group) > 1 for name in group}


def report_tied(owned: Mapping[Site, Reach], survey: Survey, report: Collector) -> None:
    """An error for every targeted weight that is tied, unless its target says `untie`."""
    shared = tied(survey)
    reported: set[frozenset[str]] = set()  # one error a group, though each of its weights may be targeted
    for site, reach in owned.items():
        others = shared.get(site.weight_name, ())
        group = frozenset((site.weight_name, *others))
        if others and not reach.target.untie and group not in reported:
            reported.add(group)
            report.error("tied-weight", f"`{site.weight_name}` is tied to {listed(others)}: they share one weight, and "
                         "conditioning it at one place would not condition it at the other", reach.place(site),
                         helps=("`untie` before the `{` gives this one a weight of its own",))
