"""Map a model's parameters to the stored tensors that they are made of, as transformers loads them.

Takes a skeleton and the names and forms of a checkpoint's tensors; gives `Piece`s. transformers renames tensors when it
loads them, and joins or splits some (a Mixtral's experts lie in a file one by one); its own rules are run here, on
tensors without numbers. Promises: no weight is read; whatever is not certain has its reason in words.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from copy import deepcopy
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel


class Unsure(Exception):
    """Why a model's files cannot be rewritten tensor by tensor."""


@dataclass(frozen=True, eq=False)
class Piece:
    """Stored tensors and the parameters that are made of these alone, each by its names in file and model. Of most
    there is one each, which is the same tensor; else `converter` is transformers' rule. `fault`: why the parameters
    cannot be written back so."""

    model: PreTrainedModel
    stored: tuple[str, ...]
    parameters: tuple[str, ...]
    converter: Any = None
    patterns: tuple[str, ...] = ()  # of the rule, by which it takes each stored tensor
    fault: str = ""

    def loaded(self, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The parameters, of the stored tensors."""
        if self.converter is None:
            return {self.parameters[0]: values[self.stored[0]]}
        rule = deepcopy(self.converter)
        for name, pattern in zip(self.stored, self.patterns):
            rule.add_tensor(self.parameters[0], name, pattern, values[name])
        made = rule.convert(self.parameters[0], model=self.model, config=self.model.config)
        return {name: value[0] if isinstance(value, list) else value for name, value in made.items()}

    def saved(self, parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The stored tensors, of the parameters: what `save_pretrained` makes of them."""
        if self.converter is None:
            return {self.stored[0]: parameters[self.parameters[0]]}
        from transformers.core_model_loading import revert_weight_conversion

        return revert_weight_conversion(self.model, dict(parameters))


def pieces(model: PreTrainedModel, stored: Mapping[str, Tensor]) -> tuple[Piece, ...]:
    """What each stored tensor (of the meta device) is a part of, but for those that the model has no place for.

    Raises: Unsure."""
    try:
        return _grouped(model, stored)
    except Exception as error:  # the rules are transformers' own, and another version may have others
        raise Unsure(f"this version of transformers does not say how it names tensors ({type(error).__name__})"
                     ) from error


def _grouped(model: PreTrainedModel, stored: Mapping[str, Tensor]) -> tuple[Piece, ...]:
    """The loop of transformers' loader, in its order, with names in the place of tensors."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, WeightRenaming, dot_natural_key, rename_source_key

    rules, known = get_model_conversion_mapping(model), model.state_dict()
    renamings = [rule for rule in rules if isinstance(rule, WeightRenaming)]
    converters = [rule for rule in rules if isinstance(rule, WeightConverter)]
    by_pattern = {pattern: rule for rule in converters for pattern in rule.source_patterns}
    parts: dict[str, list[tuple[str, str | None]]] = {}
    for name in sorted(stored, key=dot_natural_key):
        renamed, pattern = rename_source_key(name, renamings, converters, model.base_model_prefix, known)
        if renamed not in known and name in known:
            renamed, pattern = rename_source_key(name, [], [], model.base_model_prefix, known)
        if renamed in known:
            parts.setdefault(renamed, []).append((name, pattern))
    # As the loader leaves it for a save, which `Piece.saved` is.
    vars(model)["_weight_conversions"] = [rule for rule in rules if rule.was_used()]
    return tuple(_piece(model, target, held, by_pattern, stored) for target, held in parts.items())


def _piece(model: PreTrainedModel, target: str, held: Iterable[tuple[str, str | None]], by_pattern: Mapping[str, Any],
           stored: Mapping[str, Tensor]) -> Piece:
    names, patterns = zip(*held)
    if patterns == (None,):
        return Piece(model, names, (target,))
    rules = {id(by_pattern[pattern]) if pattern else None for pattern in patterns}
    if len(rules) > 1 or None in rules:
        return Piece(model, names, (target,), fault=f"several stored tensors are {target}")
    first = Piece(model, names, (target,), by_pattern[patterns[0]], patterns)
    try:
        made = first.loaded({name: stored[name] for name in names})
        # The rule is called by the name of the first that it makes, and names the others itself.
        piece = replace(first, parameters=(target, *(name for name in made if name != target)))
        back = piece.saved(made)
    except Exception as error:  # a rule may look at numbers, or be one that saves nothing
        return replace(first, fault=f"{target} is converted when it is loaded ({type(error).__name__})")
    forms = [{name: (t.shape, t.dtype) for name, t in of.items() if name in names or of is back}
             for of in (back, stored)]
    same = target in made and forms[0] == forms[1]
    return piece if same else replace(piece, fault=f"what {target} is made of is saved in another form")


def reverses(piece: Piece, values: Mapping[str, Tensor], parameters: Mapping[str, Tensor]) -> bool:
    """Whether the parameters are saved as the very values that they were made of."""
    if piece.converter is None:
        return True
    back = piece.saved(parameters)
    return back.keys() == values.keys() and all(torch.equal(back[name], value) for name, value in values.items())
