"""From a surgery to a PEFT adapter: in PEFT's own form where it has one, as a LoRA otherwise.

Takes an operated model; writes `adapter_config.json` and `adapter_model.safetensors`. Promises: PEFT is not needed; its
own form is taken only where the table of methods proves that it means the same; a LoRA says how far each module is off;
what has no form in PEFT is said and nothing is written.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from surgery.diagnostics import Diagnostic, fail, tell
from surgery.given import takes
from surgery.language.tree import every_step
from surgery.peft import nearest_lora
from surgery.peft.export_trained_values import TrainedValues, changed_biases
from surgery.peft.folder import SHARED, write, wrong_fields
from surgery.peft.import_module import WHOLE, Taken, at, drawn_again, row
from surgery.peft.recognise import Match, match_targets
from surgery.peft.table.method import Config
from surgery.peft.table.methods import METHODS
from surgery.peft.target_modules import in_time, modules, named, names_there, parameters, resolved
from surgery.peft.tensor_mapping import Place, Tensors
from surgery.planning.compile import Placed
from surgery.planning.initial_values import departure
from surgery.planning.initial_values import tensors as starts
from surgery.runtime.apply import adapter_of
from surgery.runtime.step_tensors import SharedTensors
from surgery.runtime.surgeon import Surgeon
from surgery.text import listed

# The fields of a configuration that choose modules; another writer's are kept where they still choose the same.
_CHOICE = ("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "target_parameters")

# How far off W' may be for singular vectors that PEFT finds in float32, where the next singular value is a close one.
_ROUNDED = 1e-4


@dataclass(frozen=True)
class Exported:
    """The result of `export_peft`. `errors`: for each module of a LoRA, ‖ΔW - s B A‖ / ‖ΔW‖; `inexact`: the modules
    whose update has a larger rank than the LoRA. Both are empty where PEFT has the method itself."""

    peft_type: str
    rank: int | None = None
    errors: Mapping[str, float] = field(default_factory=dict)
    inexact: tuple[str, ...] = ()

    @property
    def exact(self) -> bool:
        """Whether PEFT's adapter gives every W' that the surgery gives, to rounding."""
        return not self.inexact


@dataclass(frozen=True)
class _Form:
    """A configuration but for what it says of the choice of modules, and the tensors of the modules by PEFT's names.
    `names`: the modules, and the `parameters` that PEFT reaches by name, each with what holds its tensors; `biases`:
    the biases that the formulas change, with their values; `lists`: the fields that list modules."""

    config: Config
    tensors: Tensors
    names: Sequence[str]
    about: Exported
    biases: Tensors = field(default_factory=dict)
    parameters: Mapping[str, str] = field(default_factory=dict)
    lists: tuple[str, ...] = ()


@takes(surgeon="surgeon", folder="folder")
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
    if rank is not None and rank < 1:
        raise fail("bad-value", f"the rank of a LoRA is at least 1, not {rank}")
    model, task = type(surgeon.model), like.get("task_type")
    known = None if task else {"base_model_class": model.__name__, "parent_library": model.__module__}
    about = {"task_type": task, "auto_mapping": known, "revision": like.get("revision"), "inference_mode": True,
             "base_model_name_or_path": base_model or like.get("base_model_name_or_path")}
    with in_time():
        if surgeon.plan.placed:
            form = (None if rank else _own(surgeon, like)) or _lora(surgeon, rank)
        else:
            form = _whole(surgeon)
        # of a parameter, PEFT wraps the module
        adapted = [n.rpartition(".")[0] if n in form.parameters else n for n in form.names]
        values = TrainedValues.of(surgeon, adapted, form.biases, form.config["peft_type"], like)
        config = {**about, **form.config, **values.fields}
        choice = _choice(surgeon, form, config, like)
    drops = any(step.dropout for p in surgeon.plan.placed for step in every_step(p.target.steps))
    if form.parameters and drops:
        tell([Diagnostic("no-peft-form", "PEFT takes no dropout where it adapts parameters: the adapter is written "
                         "without, which only its further training would tell", severity="warning")])
    write(Path(folder), {**config, **choice}, {**form.tensors, **values.tensors}, force)
    return form.about


# ------------------------------------------------------------------------------------------------- in PEFT's own form


def _own(surgeon: Surgeon, like: Config) -> _Form | None:
    """The form that the table of methods has for the surgery; None where there is none."""
    matched = match_targets(surgeon.plan)
    if matched is None:
        return None
    family, kind = matched.family, matched.family.peft_type
    # A switch that counts as on where it is left out must be written.
    switches = {name: allowed[0] for name, allowed in family.plain.items() if None not in allowed}
    own = {*_CHOICE, "bias", "modules_to_save", *family.patterns.values()}
    # First with what the earlier configuration says beside the method, so that a round trip keeps it; where those
    # fields would change a tensor, without them.
    for hint in ([like] if like.get("peft_type") == kind else []) + [{}]:
        kept = {n: v for n, v in hint.items() if n not in own}
        # a list of modules may be worded otherwise and say the same
        lists = {listing: hint[listing] for listing in family.lists if hint.get(listing) and all(
            resolved(hint, family, n)[listing] == resolved(matched.fields, family, n)[listing]
            for n in matched.methods)}
        config = {**switches, **kept, "peft_type": kind, **matched.fields, **lists}
        tensors = _tensors(surgeon, matched, config)
        if tensors is not None:
            return _Form(config, tensors, list(matched.methods), Exported(kind), {}, matched.parameters, family.lists)
    return None


def _tensors(surgeon: Surgeon, matched: Match, config: Config) -> dict[str, Tensor] | None:
    """The tensors of all modules by PEFT's names; None where what they share, or draw again, would not be ours."""
    try:
        with surgeon.disabled():
            taken = [_taken(surgeon, matched, config, number) for number in range(len(matched.methods))]
        again = drawn_again(taken)
    except (KeyError, _AnotherWeight):  # a seed that no configuration says
        return None
    if not _still(matched, config, taken):
        return None
    shared = _shared(taken)
    kept = [{n: t for n, t in each.tensors.items() if n not in (*shared, *more)} for each, more in zip(taken, again)]
    # As PEFT will have them: what it shares among modules, what each has, what it draws anew. They must come back as
    # ours, bit by bit, or another adapter would be written than the one that was trained.
    for each, own, more in zip(taken, kept, again):
        ours = each.map.to_ours(each.tensors, each.place)
        back = each.map.to_ours({**shared, **own, **more}, each.place)
        if ours.keys() != back.keys() or not all(torch.equal(ours[key], back[key]) for key in ours):
            return None
    return {**shared, **{f"{each.holder}.{n}": t for each, own in zip(taken, kept) for n, t in own.items()}}


class _AnotherWeight(Exception):
    """PEFT works something out from W otherwise than we do, and would get another W' of it."""


def _taken(surgeon: Surgeon, matched: Match, config: Config, number: int) -> Taken:
    """Raises: _AnotherWeight."""
    placed = surgeon.plan.placed[number]
    site = placed.site
    (name, method), place = [*matched.methods.items()][number], Place.of(site, number)
    here = at(config, method, name)
    ours: Tensors = {key: t.detach() for key, t in surgeon.adapters[site.name].values().items()}
    if method.rebased is not None:
        ours = _rebased(surgeon, placed, method.rebased, ours)
    holder = matched.parameters.get(name, name)
    return Taken(name, site.name, holder, site.weight_name, method, place, here,
                 method.map(here, place).to_peft(ours, place))


@torch.no_grad()
def _rebased(surgeon: Surgeon, placed: Placed, rebased: Callable[[Tensors, Tensors], Tensors],
             ours: Tensors) -> Tensors:
    """Ours where PEFT's singular vectors of W, which it finds in float32 and does not save, stand in the place of ours.
    Raises: _AnotherWeight, if that is another W': vectors of equal singular values may be turned among each other."""
    adapter = surgeon.adapters[placed.site.name]
    made = starts(placed, surgeon.seed, torch.float32, {}, wide=False)
    frozen = {leaf.key: made[leaf.key].detach() for leaf in placed.formula.leaves if leaf.frozen}
    trained = {**adapter.tensors(), **rebased(ours, frozen)}
    for key in made.keys() - frozen.keys():
        made[key].data = trained[key].detach().clone()
    theirs, module = adapter_of(placed, made, SharedTensors()), placed.site.module
    rounded = max(_ROUNDED, torch.finfo(surgeon.dtype).eps)  # ours are held in the adapter's dtype
    if not departure(adapter.weights(module)[0], theirs.weights(module)[0]) <= rounded:
        raise _AnotherWeight
    return {key: tensor.detach() for key, tensor in theirs.values().items()}


def _still(matched: Match, config: Config, taken: Sequence[Taken]) -> bool:
    """Whether the configuration says of every module what the match proved, with whatever it was given beside."""
    def parameters(each: Taken, fields: Config) -> dict[str, Any]:
        return each.method.parameters.to_ours(at(fields, each.method, each.name), each.place)

    rows = [row(config, each.name, each.place) for each in taken]
    return all(r and r[0] is t.method and parameters(t, config) == parameters(t, matched.fields)
               for r, t in zip(rows, taken))


def _shared(taken: Sequence[Taken]) -> dict[str, Tensor]:
    """The tensors that PEFT keeps once, of which each module has the leading part; zero where no module has a part."""
    parts: dict[str, list[Tensor]] = {}
    for name, tensor in ((n, t) for each in taken for n, t in each.tensors.items() if n.startswith(SHARED)):
        parts.setdefault(name, []).append(tensor)
    sizes = taken[0].method.shared(taken[0].config, [each.place for each in taken])
    shared = {}
    for name, leading in parts.items():
        # As large as the largest part in each direction; some methods want more than any module reads.
        shape = map(max, zip(*(part.shape for part in leading), *([sizes[name]] if name in sizes else [])))
        shared[name] = leading[0].new_zeros(tuple(shape))
        for part in leading:
            shared[name][tuple(map(slice, part.shape))] = part
    return shared


def _whole(surgeon: Surgeon) -> _Form:
    """A surgery that only trains: PEFT's form for modules that are trained as a whole."""
    method = next(m for m in METHODS if WHOLE in m.tensors)
    if not surgeon.plan.train:
        model = type(surgeon.model).__name__
        raise fail("no-peft-form", f"the surgery operates on nothing of this {model}, and trains nothing",
                   helps=("`surgery plan` says what its patterns match",))
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
    if rank:
        rank = min(rank, largest)  # beyond, there is nothing more to write
    else:
        # The least rank that is exact for every module, where that is worth having.
        ranks = nearest_lora.ranks(surgeon)
        over = [name for name, (exact, worth) in ranks.items() if exact > worth]
        if over:
            raise fail("no-peft-form", "PEFT has no form of its own for this surgery, and an exact LoRA would need the "
                       f"rank {ranks[over[0]][0]} at {listed(over)}: as large as the weight itself",
                       helps=("--rank K writes the nearest LoRA of rank K and says how far off it is",))
        rank = max(1, *(exact for exact, _ in ranks.values()))
    # alpha = rank, so that PEFT's scaling is 1 and B A is the update itself
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
    names, wrapped = names_there([p.site for p in surgeon.plan.placed])
    holder = {site: wrapped.get(name, name) for site, name in zip(places, names)}
    for factors in nearest_lora.factors(surgeon, rank):
        theirs = method.map(config, places[factors.name]).to_peft(factors.leaves, places[factors.name])
        tensors |= {f"{holder[factors.name]}.{n}": t for n, t in theirs.items()}
        errors[factors.name] = factors.error
        inexact += [] if factors.exact else [factors.name]
    about = Exported("LORA", rank, errors, tuple(inexact))
    return _Form(config, tensors, names, about, changed_biases(surgeon), wrapped)


# ------------------------------------------------------------------------------------------------ what is said beside


def _choice(surgeon: Surgeon, form: _Form, config: Config, like: Config) -> dict[str, Any]:
    """How the configuration names the modules: as it did, by the ends of their names, or by their names; and the
    parameters that it names beside."""
    names, wrapped = [n for n in form.names if n not in form.parameters], [*form.parameters]
    ends = sorted({name.rpartition(".")[2] for name in names})
    short = sorted({".".join(name.split(".")[-2:]) for name in wrapped})
    beside = [{"target_parameters": way} for way in (like.get("target_parameters"), short, wrapped) if way]
    beside = [way for way in beside if parameters(way, surgeon.model) == wrapped] if wrapped else [{}]
    if not beside:
        raise fail("no-peft-form", f"PEFT would wrap other parameters than {listed(wrapped)}")
    # without a word on modules, PEFT would choose some itself
    ways = [{"target_modules": [], **{n: like[n] for n in _CHOICE[:-1] if like.get(n) is not None}},
            *({"target_modules": way} for way in (ends, names, "|".join(map(re.escape, names))))]
    # Ends of names are what people write, and may choose too much; a list of names is read as ends too; the regular
    # expression means exactly these.
    chosen = {i: named({**config, **dict.fromkeys(_CHOICE), **way}, surgeon.model) for i, way in enumerate(ways)}
    # PEFT wants every name of such a list to be among the targets, word for word
    listed_too = {name for listing in form.lists for name in config.get(listing) or ()}
    for i, chosen_names in chosen.items():
        if chosen_names == names and listed_too <= set(ways[i].get("target_modules") or ()):
            return {**ways[i], **beside[0]}
    left_out = listed(name for name in names if name not in chosen[3])
    raise fail("no-peft-form", f"PEFT would leave out {left_out}, which lies in a module that it saves whole for what "
               f"`train` names: {listed(config.get('modules_to_save') or ())}")
