"""From a surgery to a PEFT adapter: in PEFT's own form where it has one, as a LoRA otherwise.

Takes an operated model; writes `adapter_config.json` and `adapter_model.safetensors`. Promises: PEFT is not needed; its
own form is taken only where the table of methods proves that it means the same; a LoRA says how far each module is off;
what has no form in PEFT is said and nothing is written.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from surgery.diagnostics import fail
from surgery.peft import nearest_lora
from surgery.peft.export_trained_values import Beside, changed_biases
from surgery.peft.folder import SHARED, write, wrong_fields
from surgery.peft.import_module import WHOLE, Taken, at, drawn_again, row
from surgery.peft.recognise import Match, match_targets
from surgery.peft.table.method import Config, Family
from surgery.peft.table.methods import METHODS
from surgery.peft.target_modules import in_time, modules, named, resolved
from surgery.peft.tensor_mapping import Place, Tensors
from surgery.runtime.surgeon import Surgeon
from surgery.text import listed

# The fields of a configuration that choose modules; another writer's are kept where they still choose the same.
_CHOICE = ("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern")


@dataclass(frozen=True)
class Exported:
    """What was written. `errors`: for each module of a LoRA, ‖ΔW - s B A‖ / ‖ΔW‖; `inexact`: those whose update has a
    larger rank than the LoRA. Both are empty where PEFT has the form itself."""

    peft_type: str
    rank: int | None = None
    errors: Mapping[str, float] = field(default_factory=dict)
    inexact: tuple[str, ...] = ()

    @property
    def exact(self) -> bool:
        return not self.inexact


@dataclass(frozen=True)
class _Form:
    """A configuration but for what it says of the choice of modules, and the tensors of the modules by PEFT's names.
    `names`: the modules; `biases`: the biases that the formulas change, with their values; `lists`: the fields that
    list modules."""

    config: Config
    tensors: Tensors
    names: Sequence[str]
    about: Exported
    biases: Tensors = field(default_factory=dict)
    lists: tuple[str, ...] = ()


def export_peft(surgeon: Surgeon, folder: str | PathLike, *, rank: int | None = None, base_model: str | None = None,
                like: Config | None = None, force: bool = True) -> Exported:
    """Write what a surgeon does as a PEFT adapter, in the place of one that we wrote there unless `force` is off.

    `rank`: write a LoRA of that rank, whatever the method is. `like`: the configuration that the surgery came from, of
    which the fields that still hold are kept. Raises: SurgeryError (no-peft-form, bad-value, bad-output).
    """
    like = like or {}
    if wrong := wrong_fields(like):
        raise fail("bad-value", "the configuration that the surgery came from has what cannot stand there as "
                   f"{', '.join(wrong)}")
    with in_time():
        form = _form(surgeon, rank, like)
        beside = Beside.of(surgeon, form.names, form.biases, form.config["peft_type"], like)
        config = {**_about(surgeon, base_model, like), **form.config, **beside.fields}
        choice = _choice(surgeon, form, config, like)
    write(Path(folder), {**config, **choice}, {**form.tensors, **beside.tensors}, force)
    return form.about


def _form(surgeon: Surgeon, rank: int | None, like: Config) -> _Form:
    stacks = [p.site.name for p in surgeon.plan.placed if p.site.stack is not None]
    if stacks:
        raise fail("no-peft-form", f"there is no form for a stack of matrices: {listed(stacks)}")
    if rank is not None and rank < 1:
        raise fail("bad-value", f"the rank of a LoRA is at least 1, not {rank}")
    if not surgeon.plan.placed:
        return _whole(surgeon)
    return (None if rank else _own(surgeon, like)) or _lora(surgeon, rank)


# ------------------------------------------------------------------------------------------------- in PEFT's own form


def _own(surgeon: Surgeon, like: Config) -> _Form | None:
    """The form that the table of methods has for the surgery; None where there is none."""
    found = match_targets(surgeon.plan)
    if found is None:
        return None
    family, kind = found.family, found.family.peft_type
    own = {*_CHOICE, "bias", "modules_to_save", *family.patterns.values()}
    for hint in ([like] if like.get("peft_type") == kind else []) + [{}]:
        kept = {n: v for n, v in hint.items() if n not in own}
        config = {**_switches(family), **kept, "peft_type": kind, **found.fields, **_alike_lists(hint, found)}
        tensors = _tensors(surgeon, found, config)
        if tensors is not None:
            return _Form(config, tensors, list(found.methods), Exported(kind), lists=family.lists)
    return None


def _alike_lists(hint: Config, found: Match) -> dict[str, Any]:
    """The lists of modules that another configuration words otherwise and that say the same."""
    family = found.family
    return {listing: hint[listing] for listing in family.lists if hint.get(listing) and all(
        resolved(hint, family, n)[listing] == resolved(found.fields, family, n)[listing] for n in found.methods)}


def _switches(family: Family) -> dict[str, Any]:
    """What must be said of the switches of which it counts that they are left out."""
    return {name: allowed[0] for name, allowed in family.plain.items() if None not in allowed}


def _tensors(surgeon: Surgeon, found: Match, config: Config) -> dict[str, Tensor] | None:
    """The tensors of all modules by PEFT's names; None where what they share, or draw again, would not be ours."""
    try:
        taken = [_taken(surgeon, found, config, number) for number in range(len(found.methods))]
        again = drawn_again(taken)
    except KeyError:  # a seed that no configuration says
        return None
    if not _still(found, config, taken):
        return None
    shared = _shared(taken)
    kept = [{n: t for n, t in each.tensors.items() if n not in (*shared, *more)} for each, more in zip(taken, again)]
    whole = [{**shared, **own, **more} for own, more in zip(kept, again)]
    if not all(_equal(*(t.map.to_ours(x, t.place) for x in (t.tensors, theirs))) for t, theirs in zip(taken, whole)):
        return None
    return {**shared, **{f"{each.name}.{n}": t for each, own in zip(taken, kept) for n, t in own.items()}}


def _taken(surgeon: Surgeon, found: Match, config: Config, number: int) -> Taken:
    site = surgeon.plan.placed[number].site
    method, place = found.methods[site.name], Place.of(site, number)
    here = at(config, method, site.name)
    ours = {key: t.detach() for key, t in surgeon.adapters[site.name].values().items()}
    return Taken(site.name, site.weight_name, method, place, here, method.map(here, place).to_peft(ours, place))


def _still(found: Match, config: Config, taken: Sequence[Taken]) -> bool:
    """Whether the configuration says of every module what the match proved, with whatever it was given beside."""
    def said(each: Taken, fields: Config) -> dict[str, Any]:
        return each.method.parameters.to_ours(at(fields, each.method, each.name), each.place)

    rows = [row(config, each.name, each.place) for each in taken]
    return all(r and r[0] is t.method and said(t, config) == said(t, found.fields) for r, t in zip(rows, taken))


def _shared(taken: Sequence[Taken]) -> dict[str, Tensor]:
    """The tensors that PEFT keeps once, of which each module has the leading part; zero where no module has a part."""
    parts: dict[str, list[Tensor]] = {}
    for name, tensor in ((n, t) for each in taken for n, t in each.tensors.items() if n.startswith(SHARED)):
        parts.setdefault(name, []).append(tensor)
    sizes = taken[0].method.shared(taken[0].config, [each.place for each in taken])
    return {name: _joined(tensors, sizes.get(name, ())) for name, tensors in parts.items()}


def _joined(parts: Sequence[Tensor], shape: Sequence[int]) -> Tensor:
    """The tensor, at least of that shape, of which each part is the leading one."""
    sizes = map(max, zip(*(part.shape for part in parts), *([shape] if shape else [])))
    whole = parts[0].new_zeros(tuple(sizes))
    for part in parts:
        whole[tuple(map(slice, part.shape))] = part
    return whole


def _equal(ours: Tensors, back: Tensors) -> bool:
    return ours.keys() == back.keys() and all(torch.equal(ours[key], back[key]) for key in ours)


def _whole(surgeon: Surgeon) -> _Form:
    """A surgery that only trains: PEFT's form for modules that are trained as a whole."""
    method = next(m for m in METHODS if WHOLE in m.tensors)
    owners = list(dict.fromkeys(name.rpartition(".")[0] for name in surgeon.plan.train))
    state, tensors = surgeon.state(), {}
    for owner in owners:
        module = surgeon.model.get_submodule(owner)
        own = {n: state.get(f"{owner}.{n}", p.detach()) for n, p in module.named_parameters()}
        theirs = method.map({}, Place(WHOLE, 0, 0, ())).to_peft(own, Place(WHOLE, 0, 0, ()))
        if not owner or len(theirs) < len(own):
            names = listed(n for n in state if n.startswith(owner))
            raise fail("no-peft-form", f"PEFT has no form for {names} on its own")
        tensors |= {f"{owner}.{n}": t for n, t in theirs.items()}
    kind = method.family.peft_type
    return _Form({"peft_type": kind}, tensors, [n for n, _ in modules(surgeon.model) if n in owners], Exported(kind))


# ---------------------------------------------------------------------------------------------------------- as a LoRA


def _lora(surgeon: Surgeon, rank: int | None) -> _Form:
    method = next(m for m in METHODS if m.family.peft_type == "LORA" and not m.settings)
    largest = max((min(p.site.out, p.site.in_) for p in surgeon.plan.placed), default=1)
    rank = min(rank, largest) if rank else _least(surgeon)  # beyond, there is nothing more to write
    config = {"peft_type": "LORA", **method.config({"rank": rank, "alpha": rank, "dropout": 0.0})}
    places = {p.site.name: Place.of(p.site) for p in surgeon.plan.placed}
    foreign = [name for name, place in places.items() if not method.is_on(config, place)]
    if foreign:
        layouts = listed(dict.fromkeys(f"a {places[name].layout}" for name in foreign))
        raise fail("no-peft-form", f"PEFT's LoRA is no update of the weight of {layouts}: {listed(foreign)}",
                   helps=("merge the surgery, and save the merged model",))
    tensors: dict[str, Tensor] = {}
    errors: dict[str, float] = {}
    inexact: list[str] = []
    for found in nearest_lora.factors(surgeon, rank):
        theirs = method.map(config, places[found.name]).to_peft(found.leaves, places[found.name])
        tensors |= {f"{found.name}.{n}": t for n, t in theirs.items()}
        errors[found.name] = found.error
        inexact += [] if found.exact else [found.name]
    return _Form(config, tensors, list(places), Exported("LORA", rank, errors, tuple(inexact)), changed_biases(surgeon))


def _least(surgeon: Surgeon) -> int:
    """The least rank that is exact for every module, where that is worth having."""
    found = nearest_lora.ranks(surgeon)
    over = [name for name, (rank, worth) in found.items() if rank > worth]
    if over:
        raise fail("no-peft-form", "PEFT has no form of its own for this surgery, and an exact LoRA would need the "
                   f"rank {found[over[0]][0]} at {listed(over)}: as large as the weight itself",
                   helps=("--rank K writes the nearest LoRA of rank K and says how far off it is",))
    return max(1, *(rank for rank, _ in found.values()))


# ------------------------------------------------------------------------------------------------ what is said beside


def _about(surgeon: Surgeon, base_model: str | None, like: Config) -> dict[str, Any]:
    model, task = type(surgeon.model), like.get("task_type")
    base = base_model or like.get("base_model_name_or_path")
    known = None if task else {"base_model_class": model.__name__, "parent_library": model.__module__}
    return {"task_type": task, "auto_mapping": known, "base_model_name_or_path": base, "revision": like.get("revision"),
            "inference_mode": True}


def _choice(surgeon: Surgeon, form: _Form, config: Config, like: Config) -> dict[str, Any]:
    """How the configuration names the modules: as it did, by the ends of their names, or by their names."""
    names = list(form.names)
    ends = sorted({name.rpartition(".")[2] for name in names})
    ways = [{n: like[n] for n in _CHOICE if like.get(n) is not None},
            *({"target_modules": said} for said in (ends, names, "|".join(map(re.escape, names))))]
    chosen = {i: named({**config, **dict.fromkeys(_CHOICE), **way}, surgeon.model) for i, way in enumerate(ways)}
    # PEFT wants every name of such a list to be among the targets, word for word
    listed_too = {name for listing in form.lists for name in config.get(listing) or ()}
    for i, found in chosen.items():
        if found == names and listed_too <= set(ways[i].get("target_modules") or ()):
            return ways[i]
    left_out = listed(name for name in names if name not in chosen[3])
    raise fail("no-peft-form", f"PEFT would leave out {left_out}, which lies in a module that it saves whole for what "
               f"`train` names: {listed(config.get('modules_to_save') or ())}")
