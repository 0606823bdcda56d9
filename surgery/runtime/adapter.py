"""The one adapter layer: it runs any program in the place of a frozen layer's map.

Takes a compiled formula and its tensors. Promises: the adapter's tensors stand beside the weight, in `weight_surgery`;
a checkpoint of the base model still loads; `deepcopy` and pickle work; a forward pass computes from the tensors as
they are then.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from copy import copy
from functools import cache, reduce
from typing import Any
from weakref import ref

import torch
import torch.nn as nn

from surgery.codegen.autograd_node import of_each
from surgery.codegen.compiled import Compiled
from surgery.codegen.program import Program, compiled
from surgery.codegen.supposed_device import runs_as_on
from surgery.diagnostics import fail
from surgery.ir.dense import in_dtype, without_autocast
from surgery.ir.expression import Formula
from surgery.ir.notation import Maths, brief, parts_to_name
from surgery.ir.orthogonal_maps import is_traced
from surgery.ir.sizes import known_shape
from surgery.layers.layouts import Layout
from surgery.planning.initial_values import part_of
from surgery.planning.machines import machine
from surgery.runtime.batched_setups import SetupBatches
from surgery.runtime.checkpoint_marks import marked
from surgery.runtime.frozen_layers import Frozen, laid
from surgery.runtime.frozen_opaque import frozen
from surgery.runtime.noise import drawn
from surgery.runtime.ready_calls import ReadyStep, ready_call, ready_step
from surgery.runtime.retraction import retract_after_steps
from surgery.runtime.serving import Serving, checksums
from surgery.runtime.sharded_steps import refuse_unshared_steps
from surgery.runtime.sharding import refuse_divided, whole
from surgery.runtime.step_tensors import SharedTensors, StepTensors, held_at
from surgery.text import dtype_text

# Numbers of W that W' is made of at once: 32 MB in float32. (Fewer, that a core's cache has, are no faster, and several
# threads wait for each other at each of them.)
BLOCK = 1 << 23
# Of rows in whole numbers of so many a product of matrices is the one of all rows, bit for bit: it has no other edges.
# Of fewer, as the last ones would be by themselves, several threads may make it in another order.
TILE = 64
_LONGEST = 120  # characters of a formula in `repr`


@cache
def _widest(dtypes: frozenset[torch.dtype]) -> torch.dtype:
    """The dtype of floats that holds what all of them do, float32 at least."""
    return reduce(torch.promote_types, dtypes, torch.float32)


class Adapter(nn.Module):
    """The tensors and the programs of one operated weight. The programs are received: `compiled` is what the compiler
    made of the weight's formula, and is asked for the program of each mode. `active` is False while disabled or merged;
    `serving` holds its set-ups while a user promises that no tensor changes; `path` is the operated module's, as it was
    when it was operated on."""

    _modules: dict[str, StepTensors]  # pyright: ignore[reportIncompatibleVariableOverride]  # it has no other children
    common: SharedTensors

    def __init__(self, compiled: Compiled, layout: Layout, parameter: str, stack: int | None,
                 tensors: Mapping[str, torch.Tensor], common: SharedTensors, shared: Mapping[str, str],
                 gives_gradient: bool, path: str):
        super().__init__()
        self.gives_gradient, self.path = gives_gradient, path
        self.compiled, self.layout, self.parameter, self.stack, self.active = compiled, layout, parameter, stack, True
        self.prepared: bool | None = None  # for a module whose output programs give (True), or W' alone; None: not yet
        formula = compiled.formula
        self.serving: Serving | None = None
        self.batches: SetupBatches | None = None  # while a user promises that a forward pass changes no tensor
        # of calls outside of serving, by whether the module trains and whether a gradient is taken
        self.ready: dict[tuple[bool, bool], ReadyStep | None] = {}
        self.mark: int | None = None  # of the surgeries in use, where a model has several
        self.owner: ref[nn.Module] | None = None  # the operated module, from when it is put in or was called
        self.stored_shape: tuple[int, ...] | None = None  # of the module's parameter
        self.shared = dict(shared)
        # of what is held for the largest user, each reads its own part
        self._parts = {leaf.key: leaf for leaf in formula.leaves
                       if leaf.group and leaf.shape and tensors[leaf.key].shape != known_shape(leaf.shape)}
        self._numbers = frozenset(leaf.key for leaf in formula.leaves if not leaf.shape and (leaf.group or not stack))
        # of the output, by the kind of device and the dtype that they are chosen for, and whether the module trains
        self._programs: dict[tuple[str, torch.dtype], dict[bool, Program]] = {}
        self._machine = ("cpu", torch.float32)  # for which they were made ready
        self._weights: dict[bool, Program] = {}  # of W' itself, by whether noise is drawn
        self._of_calls: dict[tuple, tuple[list, Any]] = {}
        self._noises = compiled.noises
        object.__setattr__(self, "common", common)  # held by the model's root: here it is only read
        # of each key the step's module and the name in it; None for the module of the shared tensors
        paths: list[tuple[str, str | None, str]] = []
        for key in (leaf.key for leaf in formula.leaves):
            step, name = held_at(key)
            if key in self.shared:
                common.add(self.shared[key], tensors[key])
                paths.append((key, None, self.shared[key]))
                continue
            if step not in self._modules:
                self.add_module(step, StepTensors())
            self._modules[step].add(name, tensors[key])
            paths.append((key, step, name))
        self._paths = tuple(paths)
        retract_after_steps(self)
        refuse_unshared_steps(self)

    def switch(self, on: bool) -> None:
        """Have the adapter run, or not: then its tensors are no part of the model's state either."""
        self.active = on
        for part in (*self._modules.values(), self.common):
            part.in_use = on

    @property
    def formula(self) -> Formula:
        """W' and b' over the adapter's tensors."""
        return self.compiled.formula

    def frozen(self, module: nn.Module) -> Frozen:
        """The module's frozen map, as programs call it."""
        return frozen(module, self.layout, self.parameter, self.gives_gradient)

    def tensors(self) -> dict[str, torch.Tensor]:
        """The adapter's tensors by key (`post_magnitude.m`), as they are held: a number as [1]."""
        return {key: getattr(self._modules[step] if step else self.common, name) for key, step, name in self._paths}

    def hold(self, key: str, tensor: torch.Tensor) -> None:
        """Another tensor in the place of a key's."""
        if tensor.is_floating_point() and not isinstance(tensor, nn.Parameter):
            tensor = nn.Parameter(tensor.detach(), requires_grad=False)
        step, name = next((step, name) for known, step, name in self._paths if known == key)
        setattr(self._modules[step] if step else self.common, name, tensor)

    def values(self) -> dict[str, torch.Tensor]:
        """The adapter's tensors by key, in the shapes that the formula has for them."""
        return self.shaped(self.tensors())

    def called(self, device: torch.device) -> dict[str, torch.Tensor]:
        """The adapter's tensors by key, as each step's module gives them when it is called."""
        given: dict[str | None, dict[str, torch.Tensor]] = {
            step: dict(zip(part.names, part())) for step, part in self._modules.items()
            if not isinstance(part, SharedTensors)}
        if self.shared:  # one copy for layers that may be on several devices
            given[None] = {name: t.to(device) for name, t in zip(self.common.names, self.common())}
        return {key: given[step][name] for key, step, name in self._paths}

    def shaped(self, held: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Tensors by key as they are held, in the shapes that the formula has for them."""
        found = {key: t.reshape(()) if key in self._numbers else t for key, t in marked(held, self.mark).items()}
        return found | {key: part_of(found[key], leaf) for key, leaf in self._parts.items()} if self._parts else found

    def words(self, module: nn.Module) -> str:
        """The operated module in the words of an error."""
        return f"{type(module).__name__} (`{self.path}`)" if self.path else type(module).__name__

    def refuse_divided(self, module: nn.Module, inputs: Iterable[Any]) -> None:
        """Raises: SurgeryError (unsupported-module), if the module is to compute with a part of its weight or input."""
        if not torch.compiler.is_compiling():
            refuse_divided(module, self.parameter, self.words, *inputs, shape=self.stored_shape)
            if self.owner is None:  # as in a copy, which learns here whose it is
                self.owner = ref(module)

    def prepare(self, is_direct: bool = True, on: tuple[str, torch.dtype] | None = None) -> None:
        """Compile the programs of W' (`None`) and, for a module whose map is known and for the experts of a stack, of
        its output in training and in evaluation, for the kind of device and the dtype `on` (the last ones if
        none are given), else of W' in training where that draws noise: before any forward pass, since torch.compile
        cannot trace that."""
        self.prepared = is_direct
        if is_direct or self.stack:
            self._machine = on or self._machine
            self.programs()
        self._weights = {False: self.compiled.weights}
        if self._noises and not is_direct:
            self._weights[True] = self.compiled.drawn_weights

    def programs(self, on: tuple[str, torch.dtype] | None = None) -> dict[bool, Program]:
        """The programs of the output, by whether the module trains, that are cheapest on a machine (on that which they
        were made ready for, if none is said). All have the same values."""
        on = on or self._machine
        if on not in self._programs:
            numbers = machine(on[0], dtype_text(on[1]))
            self._programs[on] = {mode: self.compiled.program(mode, machine=numbers) for mode in (True, False)}
        return self._programs[on]

    def noise(self, module: nn.Module, device: torch.device) -> Mapping[str, torch.Tensor]:
        """What a training step draws anew, of a stack for each of its matrices; nothing in evaluation."""
        return drawn(self._noises, device, self.stack) if module.training and self._noises else {}

    def forward(self, layer: Frozen, x: torch.Tensor) -> torch.Tensor:
        """What the operated layer gives for its input. Raises: SurgeryError (no-gradient; changed-model)."""
        if self.compiled.has_bias == (layer.bias is None):  # a program would leave it out, or ask for it in vain
            raise fail("changed-model", f"the operated {self.words(layer.module)} has "
                       f"{'lost its bias' if layer.bias is None else 'got a bias'}",
                       helps=("remove(partly=True), and then operate on the model as it is",))
        x = marked({"x": x}, self.mark)["x"]  # for an adapter that does not train
        dtype, held = layer.dtype_of(x), self.called(layer.device)
        y = self.run(layer, x, dtype, {**self.shaped(held), **self.noise(layer.module, layer.device)}, held)
        if self.serving is not None:
            self.make_ready(layer, dtype, held)
        elif not torch.compiler.is_compiling():
            self.ready[layer.module.training, torch.is_grad_enabled()] = ready_step(self, layer, x, dtype)
        return y

    def run_ready(self, module: nn.Module, x: torch.Tensor) -> torch.Tensor | None:
        """What the operated module gives, if that was made ready by a call like this one; None if not."""
        if self.serving is not None:
            known = self.serving.ready.get(self)
            return None if known is None else known.run(x)
        step = self.ready.get((module.training, torch.is_grad_enabled()))
        return None if step is None else step.run(self, module, x)

    def make_ready(self, layer: Frozen, dtype: torch.dtype, held: Mapping[str, torch.Tensor]) -> None:
        """Have further calls of a layer that has run while serving answered at once."""
        serving = self.serving
        if serving is None or dtype is not layer.dtype or torch.is_grad_enabled() or is_traced():
            return
        if self not in serving.ready:
            program = self.program(layer, None)  # in evaluation one for any number
            on = (*held.values(), *(layer.held if program.rests_on_layer else ()))
            if (kept := serving.kept(self, (program, layer.dtype, layer.device), on)) is not None:
                serving.ready[self] = ready_call(self, program, layer, kept)

    def run(self, layer: Frozen, x: torch.Tensor, dtype: torch.dtype, tensors: Mapping[str, torch.Tensor],
            held: Mapping[str, torch.Tensor], expert: int | None = None) -> torch.Tensor:
        """What the layer (of a stack, that of an expert) gives for its input by the program of its mode. `held`: the
        tensors that `tensors` are views of."""
        entered = layer.enter(x, dtype)
        program = self.program(layer, layer.tokens(entered), dtype)
        if self.batches is not None and expert is None:
            values = self.batches.values(self, program, layer, dtype, held)
            if values is not None:
                return layer.leave(program.run_on(values, layer, entered))
        fixed: list[tuple] = []  # what rests on the frozen weight alone is made once in a call, its backward included

        def make(given: Iterable[torch.Tensor]) -> tuple:
            return self.set_up(program, layer, dict(zip(tensors, given)), dtype, fixed, held, expert)

        return layer.leave(program.run(layer, entered, make, tensors))

    def program(self, layer: Frozen, tokens: int | None, dtype: torch.dtype | None = None) -> Program:
        """The program of the layer's mode and machine for so many tokens, whose activations are of a dtype (if none is
        said, the layer's)."""
        on = (runs_as_on(layer.device.type), dtype or layer.dtype)
        if on not in self._programs and is_traced():  # a compiler cannot trace the choice for where it was moved since
            on = self._machine
        program = self.programs(on)[layer.module.training].at(tokens)
        if program.plain is None:
            return program
        # what is made for many layers at once holds no matrix as large as the weight for each
        is_alone = self.batches is None or self.batches.frugal
        return program if is_alone and not (is_traced() or layer.is_trained) else program.plain

    def set_ups(self, program: Program, layer: Frozen, stacks: Mapping[str, torch.Tensor], cast: torch.dtype,
                experts: Sequence[int]) -> tuple[tuple[torch.Tensor, ...], list[bool]]:
        """The set-ups of several experts at once, of a program that does not rest on the frozen weight: its values, and
        which of them have a part for each expert, and are not one that modules share."""
        at = torch.tensor(experts, device=layer.device)
        chosen = {key: t if key in self.shared or [*experts] == [*range(self.stack or 0)] else t.index_select(0, at)
                  for key, t in stacks.items()}

        def make(leaves: Mapping[str, torch.Tensor]) -> tuple:
            return self.computed(program, layer, leaves, cast, [])

        axes = {key: None if key in self.shared else 0 for key in chosen}
        made = torch.vmap(make, in_dims=(axes,))(chosen) if program.plan.computes else make(chosen)
        return made, [t.ndim > len(value.shape) for value, t in zip(program.plan.values, made)]

    def kept_set_ups(self, program: Program, layer: Frozen, stacks: Mapping[str, torch.Tensor], cast: torch.dtype,
                     held: Mapping[str, torch.Tensor], experts: Sequence[int]) -> Mapping[int, tuple]:
        """The same by expert, kept while serving."""
        known = self._kept((program, cast, layer.device), tuple(held.values()), dict)
        if missing := [expert for expert in experts if expert not in known]:
            values, apart = self.set_ups(program, layer, stacks, cast, missing)
            known.update(zip(missing, of_each(values, apart, len(missing))))
        return known

    def set_up(self, program: Program, layer: Frozen, leaves: Mapping[str, torch.Tensor], cast: torch.dtype | None,
                fixed: list[tuple], held: Mapping[str, torch.Tensor], expert: int | None = None) -> tuple:
        """The set-up of a program, kept while serving. `held`: the tensors that the leaves are views of."""
        if cast is None or self.serving is None:
            return self.computed(program, layer, leaves, cast, fixed)
        on = (*held.values(), *(layer.held if program.rests_on_layer else ()))
        # one entry for all experts: to see that nothing changed, the stack that they rest on is read once
        values = self._kept((program, cast, layer.device), on, dict)
        if expert not in values:
            values[expert] = self.computed(program, layer, leaves, cast, fixed)
        return values[expert]

    def setup_dtype(self, layer: Frozen, leaves: Iterable[torch.Tensor]) -> torch.dtype:
        """What a set-up computes in: the widest of the layer's and the leaves', float32 at least."""
        return _widest(frozenset([layer.dtype, *(t.dtype for t in leaves if t.is_floating_point())]))

    def computed(self, program: Program, layer: Frozen, leaves: Mapping[str, torch.Tensor], cast: torch.dtype | None,
                fixed: list[tuple]) -> tuple:
        """What a program computes that does not depend on the input. Small solves stay in float32 under autocast."""
        if cast is not None and program.given is not None:
            return tuple([in_dtype(leaves[key], cast) for key in program.given])
        dtype = self.setup_dtype(layer, leaves.values())
        # of a stored weight it is cheap to make; a merge never takes what is kept
        once = self._proven if self.layout.is_called and cast is not None else lambda layer, key, compute: compute()
        with without_autocast(layer.device.type):
            if layer.weight is None and program.reads_weight:
                wide = cast or dtype
                layer.weight = once(layer, ("weight", wide), lambda: layer.read(wide))
            if program.fixed and not fixed:
                fixed.append(once(layer, (program, dtype), lambda: program.once(layer, dtype)))
            known = fixed[0] if fixed else ()
            return program.setup(layer, {k: in_dtype(t, dtype) for k, t in leaves.items()}, known, dtype, cast or dtype)

    def _kept(self, key: tuple, on: Sequence[torch.Tensor], compute: Callable[[], Any]) -> Any:
        """`compute()`, which depends on the tensors `on` alone; kept while serving, unless a gradient is taken."""
        if self.serving is None or torch.is_grad_enabled():
            return compute()
        return self.serving.get(self, key, on, compute)

    def _proven(self, layer: Frozen, key: tuple, compute: Callable[[], Any]) -> Any:
        """`compute()`, which makes a called layer give all of W; computed again only if a bit of the layer's tensors
        has changed. (To read them all is a small part of the cost of such calls.)"""
        if is_traced() or not layer.held:
            return compute()
        bits, known = checksums(layer.held), self._of_calls.get(key)
        if known is None or known[0] != bits:
            with torch.inference_mode(False), torch.no_grad():
                known = self._of_calls[key] = (bits, compute())
        return known[1]

    def weights(self, module: nn.Module, noise: Mapping[str, torch.Tensor] | None = None) -> tuple[torch.Tensor, ...]:
        """(W',) or (W', b'), W' as [out, in] or a stack [E, out, in], in float32 or wider; with the noise given, or
        with its mean."""
        layer = self.frozen(module).whole()
        leaves = self.shaped({key: whole(t) for key, t in self.called(layer.device).items()})
        return self._all_weights(layer, {**leaves, **(noise or {})}, bool(noise))

    def _all_weights(self, layer: Frozen, leaves: dict[str, torch.Tensor], draws: bool) -> tuple[torch.Tensor, ...]:
        # what was prepared: torch.compile cannot look the code up in the compiler's own cache
        program = self._weights.get(draws) or (self.compiled.drawn_weights if draws else self.compiled.weights)
        if self.stack is None:
            return self.set_up(program, layer, leaves, None, [], {})

        def one(weight: torch.Tensor, each: dict[str, torch.Tensor]) -> tuple:
            single = copy(layer)
            single.weight = weight
            return self.set_up(program, single, each, None, [], {})

        # of a stack of E matrices each tensor has E parts, but one that modules share, which every matrix reads
        axes = {key: None if key in self.shared else 0 for key in leaves}
        return torch.vmap(one, in_dims=(0, axes))(layer.weight, leaves)

    def weights_by_rows(self, module: nn.Module) -> Iterator[tuple[slice, tuple[torch.Tensor, ...]]]:
        """The same with the mean of the noise, some rows at a time where a row of W' rests on no other row of W: in
        float32 all of W' and its parts are several times the weight."""
        layer = self.frozen(module).whole().laid()
        leaves = self.shaped({key: laid(whole(t)) for key, t in self.called(layer.device).items()})
        blocks = None if self.stack is not None or layer.weight is None else self.compiled.weight_rows
        if blocks is None or layer.weight.numel() < 2 * BLOCK:
            yield slice(None), self._all_weights(layer, leaves, False)
            return
        dtype = self.setup_dtype(layer, leaves.values())
        leaves = {key: in_dtype(t, dtype) for key, t in leaves.items()}
        if blocks.common is not None:
            leaves |= zip(blocks.names, self.computed(compiled(blocks.common), layer, leaves, None, []))
        out, in_ = layer.weight.shape
        step, program = max(TILE, BLOCK // in_ // TILE * TILE), compiled(blocks.block)
        starts = range(0, max(out - TILE, 0) + 1, step)
        for rows in map(slice, starts, (*starts[1:], out)):
            own = {name: leaves[key].narrow(axis, rows.start, rows.stop - rows.start)
                   for name, (key, axis) in blocks.sliced.items()}
            some = layer.of(layer.weight[rows])
            some.bias = None if layer.bias is None else layer.bias[rows]
            yield rows, self.computed(program, some, leaves | own, None, [])

    def substitutes(self, module: nn.Module,
                    noise: Mapping[str, torch.Tensor] | None = None) -> dict[str, torch.Tensor]:
        """W' (and b') as the module stores them, by parameter name; with the noise given, or with its mean."""
        layer = self.frozen(module)
        names = (self.parameter, "bias")[:1 + self.compiled.has_bias]

        def compute() -> tuple:
            values = dict(zip(names, self.weights(module, noise)))
            values[self.parameter] = self.layout.unmatrix(values[self.parameter], layer.stored.shape)
            return tuple(values[name].to(was.dtype) for name, was in zip(names, layer.held))

        on = (*self.called(layer.device).values(), *layer.held)
        return dict(zip(names, self._kept(("weights", layer.device), on, compute)))

    def train(self, mode: bool = True) -> Adapter:
        """Sets the mode. Raises: SurgeryError (wrong-mode), for training while serving."""
        if mode and self.serving is not None:
            self.serving.refuse_training()
        return super().train(mode)

    def extra_repr(self) -> str:
        """`weight' = W + 2 B A`, with each tensor by its own name."""
        symbols, weight = self.formula.symbols, self.formula.weight
        # where parts are shared, written out they could be longer than memory
        formula = brief(weight) if parts_to_name((weight,), symbols) else Maths(symbols).text(weight)
        shown = formula if len(formula) <= _LONGEST else f"{formula[:_LONGEST]} …"
        return f"{self.parameter}' = {shown}{'' if self.active else ', inactive'}"

    def __getstate__(self) -> dict:
        """Programs are not copied or pickled, but compiled again; what `serving` keeps is not copied."""
        return {**self.__dict__, "_programs": {}, "_weights": {}, "_of_calls": {}, "serving": None,
                "batches": None, "owner": None, "ready": {}}

    def __setstate__(self, state: dict) -> None:
        super().__setstate__(state)
        retract_after_steps(self)
        refuse_unshared_steps(self)
        if self.prepared is not None:
            self.prepare(self.prepared)

    def _load_from_state_dict(self, state_dict: dict, prefix: str, *rest: Any, **more: Any) -> None:
        """Keep the adapter's tensors if a checkpoint has none of them, as that of the base model: this is no error. An
        older version saved shared tensors under each adapter's own names."""
        for key, name in self.shared.items() if self.active else ():
            if (saved := state_dict.pop(prefix + key, None)) is not None:
                self.common._load_from_state_dict({name: saved}, "", *rest, **more)
        if self.active and not any(key.startswith(prefix) for key in state_dict):
            own = (*self.named_parameters(), *self.named_buffers())
            state_dict.update({prefix + name: tensor for name, tensor in own})
        super()._load_from_state_dict(state_dict, prefix, *rest, **more)
