"""What specs cost, measured beside the frozen model: the time of a step and of a forward pass, the memory of a step.

Takes a model and specs; gives rows. A step is a forward and a backward pass in training mode from a fixed random
gradient of the output; a forward pass is in evaluation mode without gradients. The frozen model is the same with every
parameter frozen; in all of them a gradient flows to the output of the input embedding (or to the images), so that a
backward pass runs through every layer. PEFT's own is measured where a row of `surgery.peft.table.methods` proves
that it has the method.

Promises: all run in one process and take turns, the order turning too, after a warm-up; they share the model's weights,
and the model itself is left alone; a ratio is the median of the ratios of times taken in the same round; the spread is
half the distance between the quartiles of those.
"""

from __future__ import annotations

import random
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import cached_property
from os import PathLike
from pathlib import Path
from statistics import median, quantiles
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from surgery.codegen.supposed_device import steps_of
from surgery.diagnostics import SurgeryError, fail, tell
from surgery.experiments.step_counts import Layers, StepCount, count_step
from surgery.experiments.tasks import read_task
from surgery.experiments.timing import peak_bytes, seconds, sharing, turned
from surgery.experiments.training import Setting, lesson_of
from surgery.language.library import load
from surgery.language.tree import Spec
from surgery.models.demo import demo_inputs
from surgery.peft.recognise import match
from surgery.planning.compile import Plan, compile
from surgery.runtime.apply import prepare
from surgery.runtime.surgeon import Surgeon

PHASES = ("step", "forward")
_WARM_UP = 2
# Models that take turns are many versions of one function.
_NO_LIMIT: dict[str, Any] = {"recompile_limit": 1 << 16, "accumulated_recompile_limit": 1 << 16}


@dataclass
class Subject:
    """A model that takes its turn, its times in seconds by phase, and the peak of a step in bytes. `inputs`: batches,
    each with the gradient of its output, of which every round has the next."""

    model: nn.Module
    inputs: Sequence[tuple[Mapping[str, Tensor], Tensor]]
    is_compiled: bool = False
    phases: Sequence[str] = PHASES
    times: dict[str, list[float]] = field(default_factory=lambda: {phase: [] for phase in PHASES})
    peak: int | None = None
    turn: int = 0

    @property
    def batch(self) -> Mapping[str, Tensor]:
        return self.inputs[self.turn % len(self.inputs)][0]

    @property
    def direction(self) -> Tensor:
        return self.inputs[self.turn % len(self.inputs)][1]

    @cached_property
    def runs(self) -> nn.Module:
        """The model, or what the compiler makes of it."""
        if not self.is_compiled:
            return self.model
        compiled = torch.compile(self.model, dynamic=False)
        assert isinstance(compiled, nn.Module)  # as of a module; of a function it makes a function
        return compiled

    def forward(self) -> Tensor:
        return _output(self.runs, self.batch)

    def step(self) -> None:
        """Forward and backward; the gradients of the step before are dropped first."""
        self.model.zero_grad(set_to_none=True)
        self.forward().backward(self.direction)

    @torch.no_grad()
    def infer(self) -> None:
        self.forward()

    def measure_peak(self, device: torch.device) -> None:
        """Without the compiler where bytes are counted at each operation: it leaves none to count."""
        with torch.compiler.set_stance("default" if device.type == "cuda" else "force_eager"):
            self.peak = peak_bytes(self.step, device)

    def count(self, layers: Layers | None = None) -> StepCount:
        """What a step asks of a device; passes are over activations of `layers`."""
        self.model.train()
        self.step()  # the first one makes the programs
        self.model.zero_grad(set_to_none=True)
        return count_step(self.forward, self.direction, self.model, self.batch, layers)

    def call(self, phase: str) -> Callable[[], Any]:
        return {"step": self.step, "forward": self.infer}[phase]


@dataclass
class Contender:
    """A spec on the model: ours; PEFT's own where it has the method (`why` says why not); the model that it is merged
    into, which is the frozen one's form and takes no step."""

    name: str
    trained: int
    surgeon: Surgeon
    ours: Subject
    peft: Subject | None
    why: str = ""
    merged: Subject | None = None


class Bench:
    """The frozen model and the specs' models, ready to take turns."""

    def __init__(self, model: PreTrainedModel, specs: Mapping[str, Spec], tokens: tuple[int, int],
                 against_peft: bool = False, compiled: bool = False, merged: bool = False,
                 batches: Sequence[Mapping[str, Tensor]] = (), batched_setups: bool = False):
        """`model` gives up its gradients; `tokens`: batch and length; `compiled`: all run as torch.compile makes them;
        `merged`: forward passes of the merged models too; `batches`: in the place of a random one, a round each;
        `batched_setups`: ours run inside `surgeon.batched_setups()`.

        Raises: SurgeryError."""
        self.model, self.device = model.requires_grad_(False), next(model.parameters()).device
        self.against_peft, self.compiled, self.has_merged = against_peft, compiled, merged
        self.batched_setups = batched_setups
        _refuse_long(model, tokens[1])
        _wake(model)
        self.inputs = [self._input(_cast(model, batch)) for batch in batches or [demo_inputs(model, 0, *tokens)]]
        self.frozen = self._subject(model)
        self.contenders = [self._contender(name, spec) for name, spec in specs.items()]

    @property
    def subjects(self) -> dict[str, Subject]:
        """All that take turns, by what they are called while they run."""
        subjects = {"the frozen model": self.frozen}
        for each in self.contenders:
            more = {f"PEFT's {each.name}": each.peft, f"{each.name}, merged": each.merged}
            subjects |= {each.name: each.ours, **{name: other for name, other in more.items() if other}}
        return subjects

    def _input(self, batch: Mapping[str, Tensor]) -> tuple[Mapping[str, Tensor], Tensor]:
        """A batch with a fixed random gradient of its output, in the place of a loss: it costs nothing and is the same
        for all."""
        output = _output(self.model, batch)
        if not output.requires_grad:
            raise fail("unsupported-module", f"no gradient reaches the input of a {type(self.model).__name__}")
        draw = torch.randn(output.shape, generator=torch.Generator().manual_seed(1), device="cpu")
        return batch, (draw / output.numel()).to(output.device, output.dtype)

    def _subject(self, model: nn.Module, phases: Sequence[str] = PHASES) -> Subject:
        return Subject(model, self.inputs, self.compiled, phases)

    def _contender(self, name: str, spec: Spec) -> Contender:
        plan = compile(self.model, spec)
        tell(plan.warnings)
        copied = sharing(self.model, plan.train)
        surgeon = self._prepared(copied, spec).operate()
        trained = sum(p.numel() for p in surgeon.parameters())
        theirs, why = self._peft(plan) if self.against_peft else (None, "")
        merged = self._merged(plan) if self.has_merged else None
        return Contender(name, trained, surgeon, self._subject(copied), theirs, why, merged)

    def _merged(self, plan: Plan) -> Subject:
        """The model with the weights that the spec gives it, on copies of those alone."""
        copied = sharing(self.model, [*plan.train, *(placed.site.weight_name for placed in plan.placed)])
        self._prepared(copied, plan.spec).operate().merge_and_remove()
        return self._subject(copied, ("forward",))

    def _prepared(self, model: nn.Module, spec: Spec) -> Surgeon:
        """A surgeon. Starts from data are measured on the batches of the measurement: whatever they come to, a step
        costs the same."""
        def loss(model: nn.Module, each: tuple[Mapping[str, Tensor], Tensor]) -> Tensor:
            return (_output(model, each[0]) * each[1]).sum()

        return prepare(model, spec, data=self.inputs, loss=loss)

    def _peft(self, plan: Plan) -> tuple[Subject | None, str]:
        """PEFT's model of the same method, or why there is none."""
        matched = match(plan)
        if matched is None:
            return None, "PEFT has no method with this formula"
        if self.device.type != "cuda" and any(method.needs_cuda for method in matched.methods.values()):
            return None, "PEFT runs it on CUDA alone, and another method here"
        import peft

        try:
            with warnings.catch_warnings():
                # PEFT warns of settings that a user may regret; here they are those that make it the same method
                warnings.simplefilter("ignore")
                config = getattr(peft, matched.family.config_class)(**matched.config)
                return self._subject(peft.get_peft_model(sharing(self.model, matched.rewritten), config)), ""
        except (TypeError, ValueError) as error:  # how PEFT refuses a module
            return None, f"PEFT refuses: {error}"

    # --------------------------------------------------------------------------------------------------- running

    def run(self, repeat: int) -> Iterator[str]:
        """Take turns for `repeat` rounds of each phase. Says what runs next; may be stopped at any time."""
        with torch._dynamo.config.patch(_NO_LIMIT) if self.compiled else nullcontext(), self._promise():
            for phase in PHASES:
                subjects = [(name, each) for name, each in self.subjects.items() if phase in each.phases]
                for name, subject in subjects:
                    yield f"{phase}, warm-up: {name}"
                    subject.model.train(phase == "step")
                    for _ in range(_WARM_UP):  # the first calls compile, tune and allocate
                        subject.call(phase)()
                    if phase == "step":  # outside of the rounds, since counting bytes takes time
                        subject.measure_peak(self.device)
                for number in range(repeat):
                    for name, subject in turned(subjects, number):
                        yield f"{phase}, round {number + 1} of {repeat}: {name}"
                        subject.turn = number
                        subject.times[phase].append(seconds(subject.call(phase), self.device))

    @contextmanager
    def _promise(self) -> Iterator[None]:
        """With `batched_setups`, what a user of it promises."""
        with ExitStack() as stack:
            for each in self.contenders if self.batched_setups else ():
                stack.enter_context(each.surgeon.batched_setups())
            yield

    # ------------------------------------------------------------------------------------------------------ rows

    def rows(self) -> list[dict[str, Any]]:
        """What is known: a row for the frozen model, and one for each spec. Times are in seconds, None if not taken."""
        rows: list[dict[str, Any]] = [{"name": "frozen", "trained": 0, **self._figures(self.frozen)}]
        for each in self.contenders:
            theirs = {f"peft_{key}": value for key, value in self._figures(each.peft).items()}
            theirs |= {f"merged_{key}": value for key, value in self._figures(each.merged).items() if "forward" in key}
            # Round by round: a machine that slows down slows both, and their ratio stays.
            pairs = zip(each.ours.times["step"], each.peft.times["step"] if each.peft else [])
            over = [mine / other for mine, other in pairs]
            rows.append({"name": each.name, "trained": each.trained, **self._figures(each.ours), **theirs,
                         "step_over_peft": median(over) if over else None, "peft_note": each.why or None})
        return rows

    def count_rows(self, device: str = "cpu") -> list[dict[str, Any]]:
        """What a step asks of a type of device, for the frozen model and for each spec: launches of the parts of a
        step (of the set-up also as batches, `batched_setup_launches`), bytes read and written, and passes over
        activations for each operated layer, over the frozen model's.
        `surgery.experiments.step_counts` defines them. Cost: a few steps of every model. Raises: SurgeryError."""
        if self.device.type != "cpu" or self.compiled:
            raise fail("bad-value", "steps are counted on a CPU, and as torch runs them without its compiler")
        with steps_of(device), self._promise():
            return list(self._count_rows())

    def _count_rows(self) -> Iterator[dict[str, Any]]:
        yield {"name": "frozen", "trained": 0, **self.frozen.count().figures}
        for each in self.contenders:
            each.ours.model.train()
            layers = Layers.of(each.ours.model, each.ours.step)
            base = self.frozen.count(layers)

            def counted(subject: Subject, prefix: str = "", layers: Layers = layers,
                        base: StepCount = base) -> dict[str, Any]:
                count = subject.count(layers)
                figures = {**count.figures, "passes": (count.passed - base.passed) / layers.one_pass}
                return {prefix + key: value for key, value in figures.items()}

            yield {"name": each.name, "trained": each.trained, "layers": layers.count, **counted(each.ours),
                   **(counted(each.peft, "peft_") if each.peft else {}), "peft_note": each.why or None,
                   **_of_setups(each)}

    def _figures(self, subject: Subject | None) -> dict[str, Any]:
        figures: dict[str, Any] = {}
        for phase in PHASES:
            # rounds that were cut short leave fewer times of the later models: zip pairs those of the same round
            times = subject.times[phase] if subject else []
            ratios = [t / base for t, base in zip(times, self.frozen.times[phase])]
            figures |= {f"{phase}_seconds": median(times) if times else None,
                        f"{phase}_ratio": median(ratios) if ratios else None,
                        f"{phase}_ratio_spread": spread(ratios)}
        return {**figures, "peak_bytes": subject.peak if subject else None}


def _of_setups(contender: Contender) -> dict[str, int]:
    """The launches of its set-ups inside `batched_setups()`; nothing of a model that cannot go there."""
    with ExitStack() as stack:
        try:
            stack.enter_context(contender.surgeon.batched_setups())
        except SurgeryError:
            return {}
        figures = contender.ours.count().figures
    return {f"batched_{key}": figures[key] for key in ("setup_launches", "setup_backward_launches")}


def bench(model: PreTrainedModel, specs: Iterable[Spec | str | PathLike] | Mapping[str, Spec],
          tokens: tuple[int, int] = (4, 128), *, repeat: int = 10, against_peft: bool = False,
          compiled: bool = False, count: bool = False, merged: bool = False,
          batches: Sequence[Mapping[str, Tensor]] = (), batched_setups: bool = False) -> list[dict[str, Any]]:
    """Measure what specs cost on a model: the rows of `Bench.rows()` (times, memory) after `repeat` rounds of each
    measurement; or with `count` those of `Bench.count_rows()`: launches, bytes, and passes over activations.

    `merged`, `batches`, `batched_setups`: as `Bench` has them.
    `specs` by names of their own, or files and shipped names; `tokens`: rows, and tokens a row (of images: how many).
    Cost: `2 repeat` forward passes and as many steps of every spec. Raises: SurgeryError."""
    if isinstance(specs, Mapping):
        named = {str(name): spec for name, spec in specs.items()}
    else:
        named = {(spec.name or "spec") if isinstance(spec, Spec) else Path(spec).stem:
                 spec if isinstance(spec, Spec) else load(spec) for spec in specs}
    ready = Bench(model, named, tokens, against_peft, compiled, merged, batches, batched_setups)
    if count:
        return ready.count_rows()
    for _ in ready.run(repeat):
        pass
    return ready.rows()


def spread(values: Sequence[float]) -> float | None:
    """Half the distance between the quartiles."""
    if len(values) < 2:
        return None
    low, _, high = quantiles(values, n=4, method="inclusive")
    return (high - low) / 2


# ----------------------------------------------------------------------------------------------- models and batches


def batches_of(model: PreTrainedModel, words: Any, data: str | PathLike, tokens: tuple[int, int],
               count: int) -> list[dict[str, Tensor]]:
    """`count` batches of what a data file has a model read, each of `tokens[0]` items drawn at random, of which at most
    `tokens[1]` tokens are kept. Raises: SurgeryError (bad-data)."""
    task = read_task(data).limited(tokens[0] * count)
    lesson = lesson_of(model, words, task, Setting(length=tokens[1]))
    order = random.Random(0).sample(range(len(lesson.items)), len(lesson.items))
    parts = [order[start : start + tokens[0]] for start in range(0, len(order) - tokens[0] + 1, tokens[0])]
    if not parts:
        raise fail("bad-data", f"{data} has no {tokens[0]} items, which a batch has", helps=("fewer: --tokens",))
    batches = [lesson.collator([lesson.items[i] for i in part]) for part in parts]
    return [{name: values for name, values in batch.items() if name != "labels"} for batch in batches]


def _refuse_long(model: PreTrainedModel, length: int) -> None:
    longest = getattr(model.config, "max_position_embeddings", None)
    if longest and length > longest:
        raise fail("bad-value", f"{type(model).__name__} reads at most {longest} tokens a row, not {length}")


def _wake(model: PreTrainedModel) -> None:
    """Let a backward pass reach every layer. A frozen model takes no gradient at all, and one with adapters none below
    its first: autograd would leave layers out that a larger model would have to pass."""
    def hook(module: nn.Module, args: tuple, output: Tensor) -> Tensor:
        return _awake(output)

    # So the first activations ask for a gradient, in all models alike.
    for module in model.modules():
        if isinstance(module, nn.Embedding) and module.num_embeddings == getattr(model.config, "vocab_size", None):
            module.register_forward_hook(hook)


def _cast(model: PreTrainedModel, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A batch on the model's device; images in its dtype, asking for a gradient."""
    first = next(model.parameters())
    moved = {name: value.to(first.device) for name, value in batch.items()}
    return {name: _awake(v.to(first.dtype)) if v.is_floating_point() else v for name, v in moved.items()}


def _awake(x: Tensor) -> Tensor:
    return x if x.requires_grad or not torch.is_grad_enabled() else x.requires_grad_()


def _output(model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
    """The model's first output with numbers in it. Nothing is kept for generation."""
    more = {"use_cache": False} if getattr(model.config, "use_cache", False) else {}
    outputs = model(**batch, return_dict=True, **more)
    return next(v for v in outputs.values() if isinstance(v, Tensor) and v.is_floating_point())
