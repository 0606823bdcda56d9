"""What a PEFT adapter holds beside the tensors of its modules: what `train` names, and biases that formulas change.

Takes an operated model; gives the fields `modules_to_save` and `bias` and the values. Promises: PEFT, told so, has
every such value in its place; what it cannot have is said.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass
from functools import reduce
from typing import Any

import torch
from torch import Tensor

from surgery.diagnostics import fail
from surgery.ir.dense import dense, in_dtype
from surgery.peft.import_module import WHOLE
from surgery.peft.table.method import Config
from surgery.peft.table.methods import METHODS
from surgery.peft.target_modules import saved_whole
from surgery.peft.tensor_mapping import Tensors
from surgery.planning.initial_values import frozen_leaves
from surgery.runtime.surgeon import Surgeon

# By configuration class, what its field `bias` says where the adapted modules' biases are trained; those that have one.
_BIASES = {m.family.peft_type: m.family.biases for m in METHODS if m.family.biases}


@dataclass(frozen=True)
class TrainedValues:
    """Fields of the configuration, and tensors by the names below the model's."""

    fields: dict[str, Any]
    tensors: dict[str, Tensor]

    @classmethod
    def of(cls, surgeon: Surgeon, adapted: Collection[str], biases: Tensors, peft_type: str,
           like: Config) -> TrainedValues:
        """`adapted`: the modules that PEFT adapts; `like`: another configuration, of which is kept what says the same.

        Raises: SurgeryError (no-peft-form).
        """
        values = {n: t for n, t in surgeon.state().items() if n in surgeon.plan.train} | dict(biases)
        if any(peft_type == m.family.peft_type and WHOLE in m.tensors for m in METHODS):
            return cls({}, {})  # all that is trained is adapted there
        model, names = surgeon.model, {}
        for name, parameter in model.named_parameters(remove_duplicate=False):
            names.setdefault(id(parameter), []).append(name)
        alone = {n for n in values if _is_bias_alone(n, values, adapted)} if peft_type in _BIASES else set()
        # A tied parameter is trained under all its names, and so the modules of all of them must be saved.
        owners = list(dict.fromkeys(_owner(other, adapted) for n in values if n not in alone
                                    for other in names[id(model.get_parameter(n))]))
        fields: dict[str, Any] = {}
        saved = saved_whole(owners, model) if owners else []
        if owners:  # as the other configuration words it, where that means the same
            other = like.get("modules_to_save")
            fields["modules_to_save"] = other if other and set(saved_whole(other, model)) == set(saved) else owners
        if alone:  # of the adapted modules alone where that is enough, and was before
            is_enough = all(n.rpartition(".")[0] in adapted for n in alone)
            fields["bias"] = _BIASES[peft_type] if is_enough and like.get("bias") != "all" else "all"
        tensors = _kept(surgeon, saved, values)
        for name in alone:  # an adapted module is wrapped, and its own bias lies one level deeper
            owner = name.rpartition(".")[0]
            tensors[f"{owner}.base_layer.bias" if owner in adapted else name] = values[name]
        return cls(fields, tensors)


def changed_biases(surgeon: Surgeon) -> dict[str, Tensor]:
    """b' of every module whose formula changes its bias, by the bias's name. Works in every mode."""
    trained, biases = surgeon.state(), {}
    with surgeon.disabled(), torch.no_grad():
        for placed in surgeon.plan.placed:
            name = f"{placed.site.name}.bias"
            if placed.formula.changes_bias and placed.site.has_bias:
                values = {**frozen_leaves(placed), **surgeon.adapters[placed.site.name].values()}
                if name in trained:
                    values["bias"] = trained[name]
                # what an adapter of another dtype makes is made in the wider one, as in a forward pass
                wide = reduce(torch.promote_types, (t.dtype for t in values.values() if t.is_floating_point()))
                biases[name] = dense(placed.formula.bias, {key: in_dtype(t, wide) for key, t in values.items()})
    return biases


def _is_bias_alone(name: str, values: Iterable[str], adapted: Collection[str]) -> bool:
    """Whether it is the bias of an adapted module, or all that is trained of another one."""
    owner, _, own = name.rpartition(".")
    return own == "bias" and (owner in adapted or not any(n != name and n.rpartition(".")[0] == owner for n in values))


def _owner(name: str, adapted: Collection[str]) -> str:
    """The module that is to be saved whole for one of its parameters."""
    owner = name.rpartition(".")[0]
    if not owner or owner in adapted:
        where = f"it belongs to `{owner}`, which is operated on" if owner else "it belongs to the model itself"
        raise fail("no-peft-form", f"PEFT cannot save `{name}`, which is trained: {where}",
                   helps=("leave it out of `train`, or save the merged model: surgery merge",))
    return owner


def _kept(surgeon: Surgeon, modules: Iterable[str], values: Tensors) -> dict[str, Tensor]:
    """All the tensors of modules that are saved whole, as trained."""
    trained = {id(surgeon.model.get_parameter(n)): t for n, t in values.items()}
    kept: dict[str, Tensor] = {}
    for name in modules:
        # `keep_vars` gives the parameters themselves, by which a tied one is known under any name
        state = surgeon.model.get_submodule(name).state_dict(keep_vars=True)
        for key, tensor in state.items():
            kept[f"{name}.{key}"] = trained[id(tensor)] if id(tensor) in trained else tensor.detach()
    return kept
