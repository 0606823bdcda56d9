"""`surgery bench`: what specs cost, measured."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import click

from surgery.cli.model_options import loaded
from surgery.cli.options import PAIR, command, dtype_option, import_libraries, opened_together, sets, targets
from surgery.cli.output import Output, aligned
from surgery.diagnostics import fail
from surgery.text import dtype_text, size_text

if TYPE_CHECKING:
    import torch

    from surgery.experiments.bench import Bench


@command(click.argument("specs", nargs=-1, metavar="[SPEC...]"),
         click.option("--model",
                      help="Measure on this model; demo:llama-bench is large enough for a CPU."),
         click.option("--tokens", type=PAIR, default="4,128", metavar="B,T", show_default=True,
                      help="Rows, and tokens a row (of images: how many)."),
         click.option("--against", type=click.Choice(["peft"]),
                      help="Measure PEFT's own too, where it has the method."),
         click.option("--merged", is_flag=True, help="Measure forward passes of the merged models too."),
         click.option("--data", metavar="FILE",
                      help="Measure on items of this file: B of them, other ones in each round, at "
                      "most T tokens of each."),
         click.option("--compiled", is_flag=True, help="Run all of them as torch.compile makes them."),
         click.option("--batched-setups", is_flag=True,
                      help="Run ours inside surgeon.batched_setups(): set-ups of like layers as one batch."),
         click.option("--device", default="cpu", show_default=True,
                      help="A device of torch's: cpu, cuda, cuda:1. With --count, whose programs are counted."),
         dtype_option,
         click.option("--repeat", type=click.IntRange(1), default=10, show_default=True,
                      help="Rounds of each measurement."),
         click.option("--count", is_flag=True,
                      help="Measure no time: count a step's launches, bytes and passes over activations, on a CPU."),
         click.option("--calibrate", is_flag=True,
                      help="Measure the device itself, in a second: programs are then chosen by its own numbers."),
         sets, targets, example="surgery bench lora dora sora --model demo:llama-bench --against peft")
def bench(output: Output, specs: tuple[str, ...], model: str | None, tokens: tuple[int, int], against: str | None,
          merged: bool, data: str | None, compiled: bool, batched_setups: bool, device: str, dtype: str | None,
          repeat: int, count: bool, calibrate: bool, sets: tuple[str, ...], targets: tuple[str, ...]) -> None:
    """Measure what specs cost.

    The time of a training step and of a forward pass, and the memory of a step, beside the same model with everything
    frozen. All take turns in one process. A parameter that --set names is set in every spec that has it. Ctrl-C shows
    what is known by then.
    """
    if calibrate:
        if specs or model:
            raise click.UsageError("--calibrate measures a device, and no SPEC or --model.")
        return _calibrate(output, _device(device))
    if not specs or not model:
        raise click.UsageError("Missing argument 'SPEC...'." if not specs else "Missing option '--model'.")
    named = opened_together(specs, sets, targets)
    import_libraries(output)
    from surgery.experiments.bench import Bench, batches_of
    from surgery.extras import need
    from surgery.models.loading import tokenizer

    if against:
        need("peft", "peft", "--against peft")
    with _in_memory_of(device):
        subject = loaded(output, model, dtype).to(_device("cpu" if count else device))
        with output.busy("operating"):
            read = batches_of(subject, tokenizer(model, output.trust), data, tokens, repeat) if data else []
            ready = Bench(subject, named, tokens, bool(against), compiled, merged, read, batched_setups)
        if count:
            with output.busy("counting"):
                rows = ready.count_rows(device.partition(":")[0])
            what = (f"{model}, {tokens[0]} x {tokens[1]} tokens, one step as on {device}, counted on a CPU"
                    f"{', in batched set-ups' * batched_setups}")
            return _show_counts(output, rows, bool(against), what)
        try:
            with output.progress() as say:
                for what in ready.run(repeat):
                    say(what)
        finally:  # whatever stops the rounds, those that are done are shown
            _show(output, ready, model, tokens, data)


@contextmanager
def _in_memory_of(device: str) -> Iterator[None]:
    """A device that is too small is the user's to know, not our mistake. Raises: SurgeryError (bad-value)."""
    import torch

    try:
        yield
    except torch.OutOfMemoryError:
        raise fail("bad-value", f"this does not fit into the memory of {device}",
                   helps=("fewer --tokens, fewer specs at a time, or a smaller --dtype",)) from None


def _device(name: str) -> torch.device:
    import torch

    try:
        # torch knows more names than it has devices: only a tensor there shows that one exists
        torch.empty(0, device=name)
        return torch.device(name)
    except (RuntimeError, AssertionError, NotImplementedError) as error:  # torch's ways to say that there is none
        raise fail("bad-value", f"there is no device `{name}`: {str(error).splitlines()[0]}") from None


def _calibrate(output: Output, device: torch.device) -> None:
    """Measure a device, keep the numbers, and show them."""
    import torch

    from surgery.experiments.calibration import calibrate, keep

    with output.busy("measuring"):
        found = calibrate(device)
    path = keep(device.type, found)
    lines = [["", "GFLOP/s", "GB/s", "launch"]]
    for dtype, each in found.items():
        size = getattr(torch, dtype).itemsize
        lines.append([dtype, f"{1e-9 / each.flop:,.0f}", f"{1e-9 * size / each.number:,.1f}",
                      f"{1e6 * each.launch:.1f} us"])
    output.say("\n".join([*aligned(lines), "", f"kept in {path}: from now on programs are chosen by these numbers on "
                          f"{device.type}; delete the file to undo it"]))
    output.data(device=device.type, path=str(path), machines={k: each.measured for k, each in found.items()})


# -------------------------------------------------------------------------------------------------------- table


def _show(output: Output, ready: Bench, model: str, tokens: tuple[int, int], data: str | None) -> None:
    """The rows as a table, those that know nothing yet too."""
    import platform

    import torch

    dtype = dtype_text(next(ready.model.parameters()).dtype)
    processor = (torch.cuda.get_device_name(ready.device) if ready.device.type == "cuda"
                 else f"{platform.machine()}, {torch.get_num_threads()} threads")
    how = f"{', compiled,' * ready.compiled}{', in batched set-ups,' * ready.batched_setups}"
    machine = f"{dtype}{how} on {ready.device} ({processor}, torch {torch.__version__})"
    rows = ready.rows()
    # Ctrl-C may have cut the rounds short: the table says how many its medians rest on.
    rounds = {phase: len(times) for phase, times in ready.frozen.times.items()}
    passes, steps = rounds["forward"], rounds["step"]
    output.say("\n".join([
        f"{model}, {tokens[0]} x {tokens[1]} tokens{f' at most, of {data}' if data else ''}, {machine}", "",
        *_table(rows, ready.against_peft, ready.has_merged), "",
        "forward, step: the frozen model's median time, and the median ratio to it ± half the distance between its",
        f"quartiles, in {passes} rounds of forward passes and {steps} of steps (forward and backward)",
        "peak: the most memory that a step allocates at one time; the models' weights are not in it"]))
    _note_peft(output, rows)
    output.data(model=model, tokens=list(tokens), data=data, machine=machine, rounds=rounds, rows=rows)


def _show_counts(output: Output, rows: list[dict[str, Any]], against_peft: bool, what: str) -> None:
    """The counts as a table: launches of a set-up are of its forward and of its backward pass (`batched`: inside of
    `batched_setups()`), PEFT's of a step."""
    from surgery.experiments.step_counts import PARTS

    lines = [["", "parameters", "set-up", "batched", "forward", "backward", *_MOVED,
              *(["PEFT: launches", *_MOVED] if against_peft else [])]]
    for row in rows:
        theirs = sum(row.get(f"peft_{part}_launches", 0) for part in PARTS)
        lines.append([row["name"], f"{row['trained']:,}", _of_setup(row), _of_setup(row, "batched_"),
                      f"{row['forward_launches']:,}", f"{row['backward_launches']:,}", *_moved(row),
                      *([f"{theirs:,}", *_moved(row, "peft_")] if theirs else [])])
    output.say("\n".join([
        what, "", *aligned(lines), "",
        "set-up, forward, backward: launches, those of a set-up in both directions; batched: its launches inside of",
        "surgeon.batched_setups(), where like layers make theirs at once; passes: how often a number for every token",
        "and feature is read or written, in each operated layer, beyond what the frozen model does"]))
    _note_peft(output, rows)
    output.data(rows=rows)


def _of_setup(row: dict[str, Any], how: str = "") -> str:
    forward, backward = (row.get(f"{how}{part}_launches") for part in ("setup", "setup_backward"))
    return "-" if forward is None or backward is None else f"{forward:,} + {backward:,}"


def _note_peft(output: Output, rows: list[dict[str, Any]]) -> None:
    """Why PEFT has no row beside a spec."""
    for row in rows[1:]:
        if row["peft_note"]:
            output.note(f"{row['name']}: {row['peft_note']}")


_MOVED = ["read", "written", "passes"]


def _moved(row: dict[str, Any], prefix: str = "") -> list[str]:
    passes = row.get(f"{prefix}passes")
    return [size_text(row[f"{prefix}bytes_read"]), size_text(row[f"{prefix}bytes_written"]),
            "-" if passes is None else f"{passes:.1f}"]


_HEAD = ["", "parameters", "forward", "step", "peak"]
_PEFT_HEAD = ["PEFT: forward", "step", "peak", "our step / PEFT's"]


def _table(rows: list[dict[str, Any]], against_peft: bool, has_merged: bool) -> list[str]:
    """The frozen model's row in milliseconds, then every spec's as multiples of it."""
    frozen, *specs = rows
    times = [frozen[f"{phase}_seconds"] for phase in ("forward", "step")]
    lines = [[*_HEAD, *["merged: forward"][:has_merged], *_PEFT_HEAD[: 4 * against_peft]],
             ["frozen", "0", *("-" if t is None else f"{1000 * t:.4g} ms" for t in times), _peak(frozen["peak_bytes"])]]
    for row in specs:
        cells = [row["name"], f"{row['trained']:,}", _ratio(row, "forward"), _ratio(row, "step"),
                 _peak(row["peak_bytes"])]
        if has_merged:
            cells.append(_ratio(row, "merged_forward"))
        if against_peft:
            over = row["step_over_peft"]
            cells += [_ratio(row, "peft_forward"), _ratio(row, "peft_step"), _peak(row["peft_peak_bytes"]),
                      "-" if over is None else f"{over:.2f}"]
        lines.append(cells)
    return aligned(lines)


def _ratio(row: dict[str, Any], of: str) -> str:
    ratio, spread = row[f"{of}_ratio"], row[f"{of}_ratio_spread"]
    return "-" if ratio is None else f"{ratio:.2f}" + ("" if spread is None else f" ±{spread:.2f}")


def _peak(size: int | None) -> str:
    return "-" if size is None else size_text(size)
