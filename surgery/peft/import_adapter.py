"""From a PEFT adapter to a surgery: the modules, the spec and the tensors.

Takes a model and a folder of PEFT's; gives the spec that says the same and the values of its tensors. Promises: PEFT is
not needed; the model is only looked at until `operate`; all that is wrong is said at once; nothing that the adapter
holds is left out in silence.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from os import PathLike
from pathlib import Path

from torch import Tensor, nn

from surgery.diagnostics import Collector, Diagnostic, SurgeryError, did_you_mean, tell
from surgery.given import takes
from surgery.language.tree import Spec
from surgery.layers.survey import Survey
from surgery.layers.wrappers import HELD, named_parameters, unwrapped
from surgery.layers.wrappers import bare as bare_module
from surgery.matching.conflicts import tied
from surgery.peft.folder import Folder
from surgery.peft.import_module import WHOLE, Taken, drawn_again, no_row, row, unheard_of
from surgery.peft.import_spec import Group, one_spec, train_spec
from surgery.peft.import_trained_values import Values, values
from surgery.peft.table.method import Config
from surgery.peft.table.methods import METHODS
from surgery.peft.target_modules import ends_of, fits_end, holders, in_time, modules, named, parameters, ties
from surgery.peft.tensor_mapping import Place, Tensors
from surgery.runtime.apply import prepare
from surgery.runtime.saved_format import compare
from surgery.runtime.surgeon import Surgeon
from surgery.text import counted, listed

_MOST_WORDS = 100  # of a configuration that names nothing, among which a misspelt one is looked for
# What fields and tensors give that no layer can have, as a rank of 0.
_IMPOSSIBLE = (ArithmeticError, TypeError, ValueError, RuntimeError)
# With `bias = "all"` PEFT saves the biases of modules that it saves whole twice more, under names of its own wrapper's,
# and reads neither where the adapter is on.
_AGAIN = (".modules_to_save.", ".original_module.")


@takes(model="model", folder="folder")
def import_peft(model: nn.Module, folder: str | PathLike) -> Surgeon:
    """Put a PEFT adapter on a model, in place, as a surgery: a spec of this language with the adapter's tensors. What
    is odd about it is a warning (SurgeryWarning).

    Raises: SurgeryError with all that does not fit (bad-adapter, unknown-method, no-weight, ...); the model is then as
    it was.
    """
    imported = read(model, Folder(Path(folder)))
    tell(imported.warnings)
    return imported.operate()


@dataclass(frozen=True)
class Imported:
    """An adapter ready to be put on its model; `warnings` are what is odd about it."""

    surgeon: Surgeon
    tensors: Tensors
    warnings: tuple[Diagnostic, ...]

    def operate(self) -> Surgeon:
        """Put it on the model, in place."""
        return self.surgeon.operate(self.tensors)


def read(model: nn.Module, folder: Folder) -> Imported:
    """What a PEFT adapter is on a model; nothing is changed yet. Raises: SurgeryError."""
    with in_time():
        return _Reader(model, folder).imported()


@dataclass
class _Reader:
    """One adapter being read for one model."""

    model: nn.Module
    folder: Folder
    report: Collector = field(default_factory=Collector)
    faults: dict[tuple[str, str], list[str]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.survey = Survey(self.model)
        self.config: Config = self._bare_config()
        self.tensors = self._bare_tensors()
        self.sites = {site.name: site for site in self.survey.sites}
        modules, by_parameter = named(self.config, self.model), parameters(self.config, self.model)
        # what PEFT's patterns see a module as, and where its tensors lie: of a parameter that is wrapped, two names
        self.holders = {**{name: name for name in modules}, **holders(by_parameter)}
        self.names = [*modules, *by_parameter]
        known = {site.weight_name: site for site in self.survey.sites}
        if any(name not in known for name in by_parameter):  # each router costs a call
            known |= {site.weight_name: site for site in self.survey.routers}
        self.sites |= {name: known[name] for name in by_parameter if name in known}
        self.tied = tied(self.survey)

    def imported(self) -> Imported:
        own, rest = _split(self.tensors, [*self.holders.values()], self.model)
        taken = [t for number, (name, holder) in enumerate(self.holders.items())
                 if (t := self._taken(name, number, own.get(holder, {})))]
        taken = self._with_drawn(taken)
        weights, whole = [t for t in taken if t.place.layout != WHOLE], [t for t in taken if t.place.layout == WHOLE]
        self.report.add(*self._faults(), *self._dead())
        both = [t.weight_name for t in weights if t.weight_name in self.tied]
        if both and ties(self.config, "target_modules"):
            self.report.error("tied-weight", f"PEFT was told to put one adapter on `{both[0]}` and on what it is tied "
                              "to, and a target is one weight")
        self._raise()  # without the right modules, what follows would blame the tensors
        # A module that is trained whole gives parameters of the model itself; a tensor that is none of them keeps its
        # name, which nothing has, and is reported under it.
        for each in whole:
            used = each.map.to_peft(each.map.to_ours(each.tensors, each.place), each.place)
            rest = {**rest, **each.ours(), **{f"{each.name}.{n}": t for n, t in each.tensors.items() if n not in used}}
        own_values = values(rest, self.config, self.survey, {t.weight_name for t in weights},
                            tuple(f"{t.name}." for t in whole), self.folder.file)
        # `most`: a configuration may name a rank of billions, and what it asks for is made before it is compared.
        spec = self._spec(weights, own_values.trained)
        held = (*self.folder.tensors.values(), *self.folder.shared.values())
        try:
            # PEFT decomposes W in float32 and does not save what it finds: signs of singular vectors must be its own
            surgeon = prepare(self.model, spec, most=sum(tensor.numel() for tensor in held), wide=False)
        except SurgeryError as error:
            raise SurgeryError((self._does_not_fit(), *error.diagnostics)) from None
        return self._fitted(surgeon, weights, own_values)

    def _fitted(self, surgeon: Surgeon, weights: Sequence[Taken], own_values: Values) -> Imported:
        """The tensors of every module as the surgeon's, compared with those that the model needs."""
        both = [each.shapes(surgeon.adapters[each.site].values()) for each in weights]
        saved, wanted = ({name: shape for pair in both for name, shape in pair[side].items()} for side in (0, 1))
        shapes = Collector()
        compare(saved, wanted, "adapter_config.json", shapes, self.folder.file)
        self._raise(*shapes.found, *own_values.faults)
        leaves: dict[str, Tensor] = {}
        for each in weights:
            try:
                leaves |= each.ours()
            except _IMPOSSIBLE as error:
                self._fault(each.name, "bad-adapter", f"{self.folder.file} holds what does not go together: {error}")
        ours, known = surgeon.as_named(leaves), surgeon.named_tensors()
        self.report.add(*self._faults())
        # Shapes alone let pass whole numbers in the place of real ones, and parts of shared tensors that are too small.
        wrong = [n for n, t in ours.items() if n in known and (
            t.shape != known[n].shape or t.is_floating_point() != known[n].is_floating_point())]
        if wrong:
            self.report.error("bad-adapter",
                              f"{self.folder.file} holds tensors of a size or a dtype that they cannot have",
                              notes=(f"for {listed(wrong)}",))
        self._raise()
        return Imported(surgeon, {**{n: t for n, t in ours.items() if n in known}, **own_values.trained},
                        (*self.report.warnings, *surgeon.plan.warnings))

    def _raise(self, *more: Diagnostic) -> None:
        """Add these to the report, and raise all of it if something is wrong, after saying whose adapter it is."""
        self.report.add(*more)
        if self.report.errors:
            raise SurgeryError((self._does_not_fit(), *self.report.found))

    def _does_not_fit(self) -> Diagnostic:
        base = self.config.get("base_model_name_or_path")
        of = (self.config.get("auto_mapping") or {}).get("base_model_class")
        notes = [f"it was made for {base}"] * bool(base) + [f"it was trained on a {of}"] * bool(of)
        return Diagnostic("bad-adapter", f"the PEFT adapter in {self.folder.path} cannot be put on this "
                          f"{type(self.model).__name__}", notes=tuple(notes))

    # ------------------------------------------------------------------------------------------------- wrappers

    def _bare_tensors(self) -> Tensors:
        """The adapter's tensors by the names that they have without wrappers, such as torch.compile's, around the model
        that it was made of, or around parts of it; what the model really has by such a name keeps it."""
        bare: dict[str, Tensor] = {}
        wrapped = [*self.folder.wrapped]
        for name, tensor in self.folder.tensors.items():
            own = unwrapped(self.model, name)
            if own in bare or own != name and own in self.folder.tensors:
                self.report.error("bad-adapter", f"{self.folder.file} holds `{own}` twice, once as `{name}`")
            wrapped += [name] * (own != name)
            bare[own] = tensor
        if wrapped:
            self.report.warn("bad-adapter", f"names of {self.folder.file} hold what wrappers add to a model's "
                             f"({', '.join(HELD)}), which this {type(bare_module(self.model)).__name__} has not; they "
                             "are read without", notes=(f"{counted(len(wrapped), 'name')}: {listed(wrapped)}",))
        return bare

    def _bare_config(self) -> Config:
        """The configuration, whose whole names of modules may hold the same."""
        config = dict(self.folder.config)
        for listing in ("target_modules", "exclude_modules", "modules_to_save", "target_parameters"):
            if isinstance(names := config.get(listing), list):
                config[listing] = [self._bare_name(name) for name in names]
        return config

    def _bare_name(self, name: str) -> str:
        """A name that ends no module's, without wrappers, where that is one: alone it would say more than it said."""
        own, known = unwrapped(self.model, name), self.survey.modules
        is_end = own == name or any(f".{each}".endswith(f".{name}") for each in known)
        is_one = any(each and each in known for each in (own, own.rpartition(".")[0]))
        return own if is_one and not is_end else name

    # ------------------------------------------------------------------------------------------------- modules

    def _taken(self, name: str, number: int, tensors: Tensors) -> Taken | None:
        """What is done to a module; None where a fault was found."""
        site = self.sites.get(name)
        # A layer that a row adapts is taken as a weight; another, such as a norm, may be trained as a whole.
        places = [*([Place.of(site, number)] if site else []), Place(WHOLE, 0, 0, (), number=number)]
        try:
            fitting = next(((place, *r) for place in places if (r := row(self.config, name, place))), None)
            if fitting is None and site:
                return self._fault(name, "unknown-method", no_row(self.config, site, places[0]))
            if fitting is None:
                # a parameter is refused as its module is
                owner = name if name in self.survey.modules else name.rpartition(".")[0]
                why = next((r.reason for r in self.survey.refused if r.name == owner), "it only holds other modules")
                return self._fault(name, "unsupported-module",
                                   f"PEFT's configuration names what no spec can operate on: {why}")
            place, method, here = fitting
            weight, known = site.weight_name if site else name, {**self.folder.shared, **tensors}
            taken = Taken(name, site.name if site else name, self.holders[name], weight, method, place, here, known)
            return taken if taken.spec else None
        except KeyError as error:
            return self._fault(name, "bad-adapter", f"adapter_config.json does not say {error.args[0]}")
        except SurgeryError as error:
            return self._fault(name, "bad-adapter", f"in adapter_config.json, {error.diagnostics[0].message}")
        except _IMPOSSIBLE as error:
            return self._fault(name, "bad-adapter", f"adapter_config.json says what cannot be: {error}")

    def _with_drawn(self, taken: list[Taken]) -> list[Taken]:
        """The modules with the tensors that PEFT draws again, unless they are given."""
        try:
            return [replace(t, tensors={**more, **t.tensors}) for t, more in zip(taken, drawn_again(taken))]
        except KeyError as error:
            self._fault(taken[0].name, "bad-adapter", f"adapter_config.json does not say {error.args[0]}")
        except _IMPOSSIBLE as error:
            self._fault(taken[0].name, "bad-adapter", f"adapter_config.json says what cannot be: {error}")
        return taken

    def _fault(self, name: str, code: str, message: str) -> None:
        self.faults.setdefault((code, message), []).append(name)

    def _faults(self) -> Iterator[Diagnostic]:
        for (code, message), names in self.faults.items():
            yield Diagnostic(code, message, notes=(f"for {listed(names)}",))
        if self.names:
            return
        # A switch that no row knows may be why nothing is named; else the names may be misspelt.
        wanted = self.config.get("target_modules")
        ends = {name.rpartition(".")[2] for name in self.sites}
        by_parameter = self.config.get("target_parameters") or ()
        words = [wanted] if isinstance(wanted, str) else [*(wanted or ()), *by_parameter][:_MOST_WORDS]
        similar = filter(None, (did_you_mean(word.rpartition(".")[2], ends) for word in words))
        if unheard := unheard_of(self.config, ""):
            yield Diagnostic("unknown-method", unheard)
        else:
            more = f", target_parameters no parameter: {listed(by_parameter)}" if by_parameter else ""
            yield Diagnostic("no-match", f"target_modules names no module of this {type(self.model).__name__}: "
                             f"{wanted}{more}", helps=tuple(islice(similar, 1)))

    def _dead(self) -> Iterator[Diagnostic]:
        """Names of the configuration that say nothing of this model."""
        wanted = self.config.get("target_modules")
        names = wanted if isinstance(wanted, list) and self.names else ()
        # The ends of all names at once: a list of thousands against a model of thousands would be millions of matches.
        live = {end for name, _ in modules(self.model) if name for end in ends_of(name)} if names else set()
        dead = [("target_modules", each) for each in names if each not in live]
        dead += [("target_parameters", each) for each in self.config.get("target_parameters") or () if self.names
                 and not parameters({"target_parameters": [each]}, self.model)]
        families = (m.family for m in METHODS if m.family.peft_type == self.config["peft_type"])
        fields = {field for family in families for field in family.patterns.values()}
        dead += [(f, key) for f in sorted(fields) for key in self.config.get(f) or {}
                 if not any(fits_end(key, name) for name in self.names)]
        for where, each in dead:
            yield Diagnostic("dead-name", f"`{each}` of {where} matches no module", severity="warning")

    def _spec(self, taken: Sequence[Taken], trained: Tensors) -> Spec:
        # One target for the modules that are treated alike: a target per module would hide what the adapter is.
        alike: dict[tuple, list[Taken]] = {}
        for each in taken:
            alike.setdefault((each.method.name, each.spec.params, each.weight_name in self.tied), []).append(each)
        groups = [Group(same[0].spec, [t.site for t in same], frozenset(self.sites[t.name].kind for t in same), untie)
                  for (*_, untie), same in alike.items()]
        return one_spec(groups, trained) if groups else train_spec(self.config["peft_type"].lower(), trained)


def _split(tensors: Tensors, names: Sequence[str], model: nn.Module) -> tuple[dict[str, dict[str, Tensor]], Tensors]:
    """The adapter's tensors of each module, by the name below it, and the others by the name of the model's own
    parameter that they are a value of."""
    own: dict[str, dict[str, Tensor]] = {}
    rest: dict[str, Tensor] = {}
    modules, parameters = set(names), {name for name, _ in named_parameters(model)}
    for key, tensor in tensors.items():
        if any(part in key and key.replace(part, ".") in tensors for part in _AGAIN):
            continue
        plain, parts = key.replace(".base_layer.", "."), key.split(".")
        owner = next((n for i in range(len(parts) - 1, 0, -1) if (n := ".".join(parts[:i])) in modules), None)
        if owner is None or plain in parameters:
            rest[plain] = tensor
        else:
            own.setdefault(owner, {})[key.removeprefix(f"{owner}.")] = tensor
    return own, rest
