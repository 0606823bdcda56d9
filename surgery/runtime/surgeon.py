"""Operating on a model: put the adapters in, merge them, switch them off, take them out.

Takes a model and a spec; gives a `Surgeon`. Promises: in place, the model keeps its class and names; a verb happens as
a whole or not at all, whatever interrupts it; none acts on what does not stand in the model any more; `unmerge`,
`disabled` and `remove` give kept bits back, nothing is inverted.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from os import PathLike
from typing import Any

import torch
import torch.nn as nn
from torch.utils.hooks import RemovableHandle

from surgery.diagnostics import Collector, Diagnostic, fail, tell
from surgery.given import takes
from surgery.language.tree import Spec
from surgery.layers.wrappers import bare, own_parameter
from surgery.planning.compile import Placed, Plan
from surgery.planning.figures import Report
from surgery.runtime.adapter import Adapter
from surgery.runtime.batched_setups import batched_setups
from surgery.runtime.checkpoints import Surgery, have_save_adapters, note, save_adapters_no_more
from surgery.runtime.fingerprint import differing, fingerprint_of, fingerprints
from surgery.runtime.hub import push
from surgery.runtime.identity_check import assert_identity, idle
from surgery.runtime.kept_weights import Kept, with_merged
from surgery.runtime.merge import refuse_called
from surgery.runtime.operated import hold_common, install, spare, uninstall_all
from surgery.runtime.optimiser_groups import parameter_groups
from surgery.runtime.outside_adapter import fingerprints_outside
from surgery.runtime.proof import Proof, Subject
from surgery.runtime.reference import Reference
from surgery.runtime.retraction import retract
from surgery.runtime.save import save
from surgery.runtime.serving import serving
from surgery.runtime.sharding import gather_up, is_part, joined, refuse_parts, refuse_replicated, refuse_sharded, whole
from surgery.runtime.standing import Spot, Standing, changed, refuse_empty, refuse_offloaded
from surgery.runtime.tensor_names import TensorNames
from surgery.runtime.transaction import Scope, all_or_nothing, put, refuse_gradients_of_before
from surgery.text import listed

_MODES = {"operated": "operated on, not merged", "merged": "merged", "base": "switched off", "removed": "given back"}
_WAY_BACK = {"operated": "merge() it first", "merged": "unmerge() it first",
             "base": "leave the block of disabled() first", "removed": "apply the spec again, or attach what was saved"}
_REST = "remove(partly=True) gives back what still stands; then apply the spec to the model as it is now"


class Surgeon:
    """Operates a model: report, switch, merge, save, remove. Made by `apply` and `attach`.

    The model is in one of these modes: `operated` (adapters run), `merged` (W' stands in W's place), `base` (as it
    was), `removed` (no more ours). `model` is the one inside of wrappers.

    Every method raises SurgeryError (changed-model) if a module or tensor that it needs was replaced, resized, tied or
    taken out of the model. After an error or an interrupt the model is as it was before the call.
    """

    def __init__(self, model: nn.Module, plan: Plan, adapters: dict[str, Adapter], seed: int):
        self.model, self.plan, self.adapters, self.seed = bare(model), plan, adapters, seed
        self._given = model
        self._names = TensorNames(self.model, plan, adapters)
        self._standing = Standing(self._names)
        self._mode = "base"
        self._required = [(module, {name: p.requires_grad for name, p in module._parameters.items() if p is not None})
                          for module in self.model.modules()]
        self._is_on = False  # whether the adapters are in
        self._kept = {n: Kept(self._spots[n].module, self._spots[n].parameter,
                              {"base": self._spots[n].present.detach().clone()}) for n in plan.train}
        self._as_merged: dict[str, str] = {}
        self._tied: dict[str, nn.Parameter] = {}
        self._savers: list[Any] = []  # the models of transformers that adapters are in: the model, and those within it
        self._spared: list[RemovableHandle] = []  # on the called layers that no adapter is in
        self.base: dict[str, str] = {}  # fingerprints of the operated weights
        self.outside: dict[str, str] = {}  # and of what the adapter does not hold
        self.made: dict[str, str] = {}  # digests of what the spec, the seed and W make again
        self.made_in = self.dtype
        self.saves_as = ""  # how, where it is no surgery of one spec
        self.proof = Proof(skipped="not tried")

    @property
    def spec(self) -> Spec:
        """The spec that was applied."""
        return self.plan.spec

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the adapter's parameters (float32 where there is none)."""
        held = (t for adapter in self.adapters.values() for t in adapter.tensors().values())
        return next((t.dtype for t in held if t.is_floating_point()), torch.float32)

    @property
    def untied(self) -> tuple[str, ...]:
        """The names of the weights that `untie` gave a tensor of their own."""
        return tuple(self._tied)

    @property
    def merged(self) -> bool:
        """Whether W' stands in the place of W."""
        return self._mode == "merged"

    def check_start(self, strict: bool = False) -> None:
        """Check that every W' starts as W; add a warning to the plan for parameters that never train.

        Raises: SurgeryError (not-identity), with the modules of each target that start elsewhere, and how far off."""
        assert_identity(self.spec.targets, self.plan.placed, self.adapters)
        self._warn(idle(self.spec.targets, self.plan.placed, self.adapters), strict)

    def _warn(self, warnings: Iterable[Diagnostic], strict: bool) -> None:
        """Have more warnings in the plan. Raises: SurgeryError, where they are errors."""
        report = Collector()
        report.add(*warnings)
        report.raise_errors(strict)
        self.plan = replace(self.plan, warnings=(*self.plan.warnings, *report.warnings))

    @all_or_nothing
    def operate(self, values: Mapping[str, torch.Tensor] | None = None) -> Surgeon:
        """Put the adapters in, with other `values` for some of their tensors; freeze everything but them and what
        `train` names. Raises: SurgeryError (unsupported-module) for weights on the meta device."""
        self.assert_operable()
        for placed in self.plan.placed:
            module, name = placed.site.module, placed.site.parameter
            if placed.target.untie and not placed.site.layout.is_called:  # a called layer's tensors are not replaced
                self._tied = {**self._tied, placed.site.weight_name: own_parameter(module, name)}
                module._parameters[name] = nn.Parameter(own_parameter(module, name).detach().clone())
            for tensor in self.adapters[placed.site.name].tensors().values():  # the model may have moved since
                tensor.data = tensor.data.to(placed.site.device)
            install(module, self.adapters[placed.site.name])
        hold_common(self.model, self.adapters.values())
        frozen = {id(adapter.tensors()[leaf.key]) for adapter in self.adapters.values()
                  for leaf in adapter.formula.leaves if leaf.frozen}
        trained = {id(p) for p in self.named_tensors().values()} - frozen
        for parameter in self.model.parameters():
            parameter.requires_grad_(id(parameter) in trained)
        self._savers = have_save_adapters(self.model)
        self._mode, self._is_on = "operated", True
        self.base = fingerprints(self.plan.placed)
        self.outside = fingerprints_outside(self.model, [p.site.module for p in self.plan.placed], self.plan.train)
        self._standing.remember()
        self._note()
        self._put(values or {})
        self._spared = spare(self.model)
        return self

    @all_or_nothing
    def begin(self, example: Any = None, check: bool = True, strict: bool = False, tells: bool = False) -> Surgeon:
        """Operate, and prove it if asked to. `tells`: give the plan's warnings as Python's, to the caller of `apply`.
        Raises: SurgeryError; SurgeryWarning, where a filter of the user's makes errors of warnings."""
        self.operate()
        if check:
            starts = not any(target.shifted for target in self.spec.targets)
            self.proof = self._subject().prove(example, starts)
            self._warn(self.proof.warnings, strict)
        if tells:
            tell(self.plan.warnings)
        return self

    def prove(self, example: Any = None) -> Proof:
        """Run the operated model with its adapters' values moved a little: does each adapter act, and does the merged
        model give the same outputs? Afterwards everything is as before, bit for bit.

        Cost: five forward passes, one backward pass, and for their time a second copy of the operated weights.
        Raises: SurgeryError (dead-adapter; bad-value where no batch is given and none can be made up)."""
        self._must_be("operated", "prove")
        refuse_parts(self.part, "prove")
        self._assert_standing()
        return self._subject().prove(example, starts=False, in_full=True)

    def _subject(self) -> Subject:
        return Subject(self.model, self.plan.placed, self.adapters, self.scope())

    def assert_operable(self) -> None:
        """Raises: SurgeryError (changed-model, unsupported-module), where adapters cannot be put in now."""
        self._assert_standing()
        refuse_empty(self._spots.values())
        refuse_replicated(self._given)
        refuse_sharded(self._given)

    @property
    def part(self) -> torch.Tensor | None:
        """A sharded tensor of the surgery; None if the model is not sharded."""
        gather_up(self.model)
        held = (*self.named_tensors().values(), *(spot.tensor for spot in self._spots.values()))
        return next(filter(is_part, held), None)

    def __repr__(self) -> str:
        model, summary = type(self.model).__name__, Report(self.plan, self.dtype).summary
        return f"<Surgeon of {model}, {_MODES[self._mode]}: {summary}>"

    def parameters(self) -> Iterator[nn.Parameter]:
        """The parameters that train: the adapters' and those of `train`."""
        return (p for p in self.model.parameters() if p.requires_grad)

    def parameter_groups(self, lr: float, weight_decay: float = 0.0, **rates: float) -> list[dict[str, Any]]:
        """What trains, as an optimiser's groups: `AdamW(surgeon.parameter_groups(lr=1e-4, lr_B=1.6e-3,
        weight_decay=0.01))`. `lr_NAME` is the rate of every `param NAME` of the spec (LoRA+ has a larger one for B);
        without one, a parameter that says `rate 16` has 16 times `lr`.

        Decay is given to what starts at 0, or is drawn around 0, and to the matrices of `train`. What says `no decay`,
        or is kept on a manifold, has none.

        Of a sharded model, ask after sharding. Raises: SurgeryError (bad-value).
        """
        self._assert_standing()
        return parameter_groups(self.plan, self.named_tensors(), self.name_of, lr, weight_decay, rates)

    def retract(self) -> None:
        """Move what the spec keeps on a manifold (`param X[out, rank] ~ orthogonal() on stiefel`) to the nearest point
        of it. After the step of an optimiser of torch's this happens by itself: call it after steps of your own.

        Of a sharded model, on every process. Raises: SurgeryError (unsupported-module)."""
        self._assert_standing()
        retract(self.adapters.values())

    def named_tensors(self) -> dict[str, torch.Tensor]:
        """Every adapter tensor and every `train` tensor by its name in the model, shared ones once. A number [] is held
        as [1]."""
        return self._standing.tensors()

    def name_of(self, placed: Placed, key: str) -> str:
        """The name in the model of the tensor with an adapter's key."""
        return self._names.of(placed, key)

    def as_named(self, values: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Values that were saved by this version or an earlier one, under the names and in the shapes of
        `named_tensors`."""
        return self._names.translated(values)

    def state(self) -> dict[str, torch.Tensor]:
        """The values of `named_tensors` as trained, in every mode."""
        self._assert_standing()
        tuned = {name: joined(kept.form("operated"), kept.parameter) for name, kept in self._kept.items()
                 if name in self.plan.train and self._mode != "operated" and "operated" in kept.forms}
        return {name: tuned[name] if name in tuned else whole(tensor.detach())
                for name, tensor in self.named_tensors().items()}

    @all_or_nothing
    def load(self, state: Mapping[str, torch.Tensor]) -> None:
        """Copy other values of the same shapes into the tensors of an operated model: an adapter's tensor takes the
        dtype of its value, a `train` tensor keeps the model's. Raises: SurgeryError (bad-value, wrong-mode)."""
        self._must_be("operated", "load")
        self._assert_standing()
        state = self.as_named(state)
        missing = [name for name in self.named_tensors() if name not in state]
        if missing:
            raise fail("bad-value", f"the state lacks {listed(missing)}",
                       helps=("`state()` of a surgery of the same spec has all of them",))
        self._put(state)

    def _put(self, values: Mapping[str, torch.Tensor]) -> None:
        """Copies of values in the places of tensors."""
        tensors = self.named_tensors()
        wrong = [name for name, value in values.items() if name not in tensors or value.shape != tensors[name].shape]
        if wrong:
            raise fail("bad-value", f"this surgery has no tensor of that name and shape: {listed(wrong)}")
        for name, value in values.items():
            tensor = tensors[name]
            dtype = tensor.dtype if name in self.plan.train or is_part(tensor) else value.dtype
            put(tensor, value.detach().to(tensor.device, dtype, copy=True))
            refuse_gradients_of_before(tensor)

    def report(self) -> Report:
        """The figures of the plan; prints as a table."""
        self._assert_standing(reads=False)
        return Report(self.plan, self.dtype)

    @takes(folder="folder")
    def save(self, folder: str | PathLike, **about: Any) -> None:
        """Write the adapter, whole or not at all: its tensors, its spec, and `about` (base_model, revision, ...).

        `frozen` tensors that follow from the spec, the seed and W are not written: `attach` computes them and compares
        their digests. `self_contained=True` writes them too. Raises: SurgeryError."""
        save(self, folder, **about)

    def push_to_hub(self, repository: str, **about: Any) -> str:
        """Upload the adapter to `OWNER/NAME` of the hub with a page that says what it computes, its base model and how
        to load it; gives the commit's address. `about`: `revision` (a branch), `private`, `token`, `message`, and what
        `save` takes of `base_model`. Raises: SurgeryError (bad-output)."""
        return push(self, repository, **about)

    @contextmanager
    def disabled(self) -> Iterator[None]:
        """Inside, the model is the base model, exactly. Nests, and holds when an exception passes."""
        before = self._mode
        try:
            try:
                self._enter("base")
                yield
            finally:
                self._enter(before)
        finally:  # there already, but for an interrupt on the way back
            self._enter(before)

    def reference(self) -> Reference:
        """The base model as a module of its own, for trainers that compare with one (`ref_model` of TRL's DPO): no
        second copy is loaded. It has no parameters, and its calls are those of the model with the surgery off."""
        return Reference(self)

    @contextmanager
    def serving(self) -> Iterator[None]:
        """Inside, you promise that no tensor of the model changes: what forward passes without a gradient compute from
        the adapter's tensors alone (and W' itself, where a model reads the weight) is kept from one to the next, so
        that a token costs little more than the base model's. For a model in evaluation, merged or not; nests, in any
        number of threads.

        Raises: SurgeryError (wrong-mode), in training mode or at `train()`; (changed-tensor), if a tensor in use
        changed by a bit: at the next forward pass if torch counts the write, and otherwise at the end of the block.
        """
        refuse_parts(self.part, "serving")
        refuse_offloaded(self.model, self._standing.written)
        if any(placed.site.module.training for placed in self.plan.placed):
            raise fail("wrong-mode", "this model is in training mode, and serving() is for one that is evaluated",
                       helps=("call model.eval() first",))
        with serving(self.model, self.adapters):
            yield

    @contextmanager
    def batched_setups(self) -> Iterator[None]:
        """Inside, you promise that no tensor of an adapter changes while a forward pass of the model runs, and that a
        pass runs all layers: what adapters compute from their tensors alone, before they see an input, is then made for
        all layers of one shape at once, in every forward pass anew, and so are its gradients. On a GPU a step of specs
        that compute much (rotations, norms) is then no longer bound by the launches of small operations; what autograd
        holds of a set-up is held for all layers. Around a training loop, or `trainer.train()`; nests.

        Calls of a part of the model, and what torch.compile runs, are not changed. Raises: SurgeryError
        (unsupported-module), for a sharded or offloaded model and for one with gradient checkpointing, which runs
        layers again.
        """
        refuse_parts(self.part, "batched_setups")
        refuse_offloaded(self.model, self._standing.written)
        with batched_setups(self.model, list(self.adapters.values())):
            yield

    @all_or_nothing
    def merge(self) -> dict[str, float]:
        """Put each W' in the place of W, which is kept; gives the relative rounding error of each module: W' as its
        dtype holds it against W' in float32 or wider. No forward pass is made; `prove()` before it makes some, and says
        whether the merged model gives what the operated one does, as `apply` did.

        Memory: a second copy of the operated weights. Raises: SurgeryError (merge-error); then nothing is merged.

        >>> import surgery
        >>> surgeon = surgery.apply(surgery.load_model("demo:llama"), "lora")
        >>> errors = surgeon.merge()
        >>> errors["model.layers.0.self_attn.q_proj"]  # B starts at 0, and W + BA is W
        0.0
        >>> surgeon.unmerge()
        """
        self._must_be("operated", "merge")
        self._assert_standing()
        refuse_called(self.plan.placed)
        self._kept, errors = with_merged(self._kept, self.plan.placed, self.adapters)
        self._enter("merged")
        self._as_merged = self._of_merged()
        return errors

    def _of_merged(self, without: Iterable[str] = ()) -> dict[str, str]:
        """A few numbers of each weight and bias that was merged, as they stand now, by name."""
        held = {n: kept.parameter for n, kept in self._kept.items() if "merged" in kept.forms and n not in without}
        return {name: fingerprint_of(p) for name, p in held.items() if not (is_part(p) or p.is_meta)}

    def _tell_of_edits(self, without: Iterable[str] = ()) -> None:
        """A warning, where what stood in a merged weight's place is about to be lost, and is no W' any more."""
        edited = differing(self._as_merged, self._of_merged(without)) if self._mode == "merged" else []
        tell([Diagnostic("changed-tensor", f"{listed(edited)} changed after merge(), and the value from before the "
                         "merge is put back: the change is lost", severity="warning",
                         helps=("merge_and_remove() leaves the model as it stands",))] if edited else [])

    @all_or_nothing
    def unmerge(self) -> None:
        """Put the kept weights back, bit for bit. What was written into the merged ones is lost, with a warning."""
        self._must_be("merged", "unmerge")
        self._tell_of_edits()
        self._enter("operated")
        self._kept = {name: replace(kept, forms={"base": kept.forms["base"]})
                      for name, kept in self._kept.items() if name in self.plan.train}

    @all_or_nothing
    def remove(self, partly: bool = False) -> nn.Module:
        """Take everything out: the model is as before `apply`, bit for bit.

        `partly`: if the model was changed since, restore the modules that are still in place and leave the others as
        they are now. A layer that was taken out of the model gets its own class back too.

        Raises: SurgeryError (changed-model; unsupported-module, for a model that is sharded or, where numbers are to be
        put back, offloaded).
        """
        if self._mode == "removed":
            return self._given
        refuse_parts(self.part, "remove")
        lost = self._standing.faults(operated=True)
        if lost and not partly:
            raise changed(lost, _REST)
        if self._kept or self._tied:
            refuse_offloaded(self.model, self._standing.written)
        self._tell_of_edits(lost)
        self._switch("base", lost)
        for name, tied in self._tied.items():
            spot = self._spots[name]
            if name not in lost:
                # Where nothing else holds the tied tensor any more, a change of dtype or device has not reached it.
                tied.data = tied.data.to(spot.present.device, spot.present.dtype)
                spot.module._parameters[spot.parameter] = tied
        return self._take_out()

    @all_or_nothing
    def merge_and_remove(self) -> nn.Module:
        """Merge, unless it is merged, and take the adapters out for good: what is left is a plain model with each W' in
        the place of W, of its own class and with its own tensors, and its parameters train or not as before `apply`.
        What `untie` parted stays apart, and the model's configuration then says so.

        Memory: as `merge`; what it kept is let go. Raises: SurgeryError (merge-error), and then nothing is merged.
        """
        refuse_parts(self.part, "merge_and_remove")
        if self._mode != "merged":
            self.merge()
        self._assert_standing()
        self._kept = {}
        config = getattr(self.model, "config", None)
        if self._tied and config is not None and getattr(config, "tie_word_embeddings", False):
            config.tie_word_embeddings = False
        return self._take_out()

    def _take_out(self) -> nn.Module:
        """The adapters out, whatever numbers stand in the model."""
        uninstall_all(self.model, [(p.site.module, self.adapters[p.site.name]) for p in self.plan.placed])
        save_adapters_no_more(self._savers)
        for hook in self._spared:
            hook.remove()
        for module, flags in self._required:
            for name, flag in flags.items():
                if (parameter := module._parameters.get(name)) is not None:
                    parameter.requires_grad_(flag)
        self._mode, self._is_on = "removed", False
        return self._given

    # -------------------------------------------------------------------------------------------------------- modes

    def scope(self) -> Scope:
        """What verbs may change, with every part of a sharded model in its place."""
        gather_up(self.model)
        modules = [p.site.module for p in self.plan.placed]
        own = [p for placed in self.plan.placed if not placed.site.layout.is_called
               for p in placed.site.module._parameters.values() if p is not None]
        written = [spot.tensor for spot in self._spots.values() if spot.placed is None and spot.tensor is not None]
        adapters = [t for adapter in self.adapters.values() for t in adapter.tensors().values()]
        return Scope([self, self._standing], [self.model, *modules, *self.adapters.values()],
                     [*own, *written, *adapters])

    @property
    def _spots(self) -> Mapping[str, Spot]:
        return self._standing.spots

    def _must_be(self, mode: str, what: str) -> None:
        if self._mode != mode:
            raise fail("wrong-mode", f"this model is {_MODES[self._mode]}, and {what}() is for one that is "
                       f"{_MODES[mode]}", helps=(_WAY_BACK[self._mode],))

    def _assert_standing(self, reads: bool = True) -> None:
        """`reads`: whether numbers of the surgery's tensors are read or written. Raises: SurgeryError (changed-model;
        unsupported-module for a flattened model, and for an offloaded one where numbers are read)."""
        self._standing.refuse_away(self._is_on, reads)
        lost = self._standing.faults(self._is_on) if self._mode != "removed" else {}
        if lost:
            raise changed(lost, _REST if self._is_on else "apply the spec to the model as it is now")

    @all_or_nothing
    def _enter(self, mode: str) -> None:
        """Switch the model to a mode, if it is in another and still ours."""
        if self._mode not in (mode, "removed"):
            self._assert_standing(reads=bool(self._kept))
            self._switch(mode)

    def _switch(self, mode: str, without: Iterable[str] = ()) -> None:
        """Which tensors stand in place, but `without` some, and whether the adapters run."""
        kept = {name: each.holding(self._mode) for name, each in self._kept.items() if name not in without}
        for each in kept.values():
            put(each.parameter, each.form(mode))
            if "merged" in (mode, self._mode):
                refuse_gradients_of_before(each.parameter)
        for adapter in self.adapters.values():
            adapter.switch(mode == "operated")
        self._kept, self._mode = kept, mode
        self._note()

    def _note(self) -> None:
        """Record the surgery and its mode on the model and on those within it, for `save_pretrained`."""
        note(self._savers, self.model, replace(self.record, mode=self._mode))

    @property
    def record(self) -> Surgery:
        """What a saved adapter says of the surgery, beside its tensors."""
        return Surgery(self.spec, self.seed, self.dtype, tuple(self.named_tensors()), self.untied,
                       saves_as=self.saves_as, base=self.base, outside=self.outside, made=self.made,
                       made_in=self.made_in)
