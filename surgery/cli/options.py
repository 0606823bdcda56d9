"""The options that commands share, and the spec that they describe."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Container, Iterable, Sequence
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from surgery.cli.output import FORMATS, Output

if TYPE_CHECKING:
    from torch import nn

    from surgery.language.tree import Spec

HELP = {"help_option_names": ["-h", "--help"], "max_content_width": 120}


def _keep(field: str, change: Callable[[Any, Any], Any]) -> Callable[[click.Context, click.Parameter, Any], None]:
    """Puts an option's value into the run's `Output`, wherever on the line the option stands."""

    def callback(context: click.Context, parameter: click.Parameter, value: Any) -> None:
        output = context.ensure_object(Output)
        # The group and its command both have the option: the one that was not given must not undo the other.
        if value not in (None, False, 0):
            setattr(output, field, change(getattr(output, field), value))

    return callback


_COMMON = (
    click.option("--json", is_flag=True, expose_value=False, callback=_keep("as_json", lambda old, new: True),
                 help="Print one JSON object."),
    click.option("-q", "--quiet", count=True, expose_value=False, callback=_keep("verbosity", lambda old, n: old - n),
                 help="No warnings, notes or progress."),
    click.option("-v", "--verbose", count=True, expose_value=False, callback=_keep("verbosity", lambda old, n: old + n),
                 help="Say more."),
    click.option("--color", type=click.Choice(["auto", "always", "never"]), expose_value=False,
                 callback=_keep("color", lambda old, new: new), help="When to use colour."),
    click.option("--debug", is_flag=True, expose_value=False, callback=_keep("debug", lambda old, new: True),
                 help="Show the traceback of an internal error."),
)


def asked_format(words: Sequence[str]) -> str:
    """What `--output-format` says on a command line, `full` where it says nothing."""
    # Click's own parsing comes later, and an error in it must already be written in this format.
    formats = [after if word == "--output-format" else word.partition("=")[2]
            for word, after in zip(words, [*words[1:], ""])
            if word == "--output-format" or word.startswith("--output-format=")]
    return formats[-1] if formats and formats[-1] in FORMATS else "full"


def common(function: Callable) -> Callable:
    """Adds `--json -q -v --color --debug`."""
    for option in reversed(_COMMON):  # the decorator that is applied last shows first
        function = option(function)
    return function


class Command(click.Command):
    """A command whose help shows its own options first, and then those that every command has."""

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        shared = {"--json", "--quiet", "--verbose", "--color", "--debug", "--help"}
        rows: dict[str, list[tuple[str, str]]] = {"Options": [], "Common options": []}
        for parameter in self.get_params(ctx):
            # an argument has its place in the usage line, not here; a hidden option has no record
            record = parameter.get_help_record(ctx) if isinstance(parameter, click.Option) else None
            if record is not None:
                rows["Common options" if shared & {*parameter.opts} else "Options"].append(record)
        for title, records in rows.items():
            if records:
                with formatter.section(title):
                    formatter.write_dl(records)


def command(*options: Callable, example: str, as_project: bool = True) -> Callable[[Callable], click.Command]:
    """A command with the shared options; its help ends with an example. `as_project`: warnings are as severe as the
    nearest `surgery.toml` says."""

    def make(function: Callable) -> click.Command:
        wrapped = common(click.pass_obj(_as_project(function) if as_project else function))
        for option in reversed(options):
            wrapped = option(wrapped)
        name = function.__name__.rstrip("_")  # `import_` is named so for Python's sake
        wrapped.__doc__ = function.__doc__
        return click.command(name, Command, context_settings=HELP, epilog=f"Example:  {example}")(wrapped)

    return make


def _as_project(function: Callable) -> Callable:
    @wraps(function)
    def run(*arguments: Any, **options: Any) -> Any:
        from surgery.diagnostics import severities
        from surgery.settings import settings

        with severities(settings().severity):
            return function(*arguments, **options)

    return run


class Pair(click.ParamType):
    """Two whole numbers: `4,128`."""

    name = "N,N"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[int, int]:
        if isinstance(value, tuple):  # click converts a default that is converted already
            return value
        parts = value.split(",")
        digits = [p.strip() for p in parts]
        if len(parts) != 2 or not all(d.isdecimal() and len(d) <= _MOST_DIGITS and int(d) > 0 for d in digits):
            self.fail(f"'{value[:40]}' is not two whole numbers such as 4,128", param, ctx)
        return int(parts[0]), int(parts[1])


_MOST_DIGITS = 9  # of a side of a weight
PAIR = Pair()
DTYPES = ("float32", "bfloat16", "float16")
_NUMBERED = re.compile(r"(?:(\d{1,9})=)?(.*)", re.DOTALL)
sets = click.option("--set", "sets", multiple=True, metavar="NAME=VALUE", help="Set a parameter of the spec.")
targets = click.option("--target", "targets", multiple=True, metavar="[N=]PATTERN",
                       help="Operate on these modules, not on those that the spec names, or its target N.")
spec_argument = click.argument("spec")
model_argument = click.argument("model")
strict_option = click.option("--strict", is_flag=True, help="A warning is an error.")
dtype_option = click.option("--dtype", type=click.Choice(DTYPES),
                            help="Load the model in this dtype. Default: the one it was saved in.")
force_option = click.option("--force", is_flag=True, help="Replace what an earlier run wrote there.")
self_contained_option = click.option("--self-contained", is_flag=True,
                                     help="Save frozen parameters too, in place of making them again.")
trust_option = click.option("--trust-remote-code", is_flag=True, expose_value=False,
                            callback=_keep("trust", lambda old, new: True),
                            help="Run the Python code that lies in the model's folder.")
revision_option = click.option("--revision", metavar="REV", expose_value=False, callback=_keep(
    "revision", lambda old, new: new), help="MODEL at this commit, branch or tag of the hub; MODEL@REV is the same.")


def opened(spec: str, sets: Iterable[str] = (), targets: Iterable[str] = ()) -> Spec:
    """The spec of a path or shipped name, changed by `--set` and `--target`. Raises: SurgeryError."""
    from surgery.diagnostics import Collector
    from surgery.language.library import assignment, bind, locate, read, retarget
    from surgery.semantics.arguments import guard

    report, arguments = Collector(), []
    for text in sets:
        with guard(report):
            arguments.append(assignment(text))
    report.raise_errors()  # every wrong --set in one run
    changed = bind(read(locate(spec)), arguments)
    # The patterns for one target replace its own together, so they are gathered before the spec changes.
    patterns: dict[int | None, list[str]] = {}
    for text in targets:
        match = _NUMBERED.fullmatch(text)
        assert match is not None  # any text is a pattern for that
        number, pattern = match.groups()
        patterns.setdefault(int(number) if number else None, []).append(pattern)
    for number, of_target in patterns.items():
        changed = retarget(changed, *of_target, at=number)
    return changed


def checked(spec: str, sets: Iterable[str] = (), targets: Iterable[str] = ()) -> Spec:
    """`opened`, for a command that goes on to a model: what is wrong by its text alone is told at once, and not after
    the seconds that importing torch and reading a model take. Raises: SurgeryError."""
    from surgery.diagnostics import Collector
    from surgery.semantics.lint import linted

    asked, report = opened(spec, sets, targets), Collector()
    linted(asked, report)  # what it warns of, the plan tells
    report.raise_errors()
    return asked


def opened_together(specs: Sequence[str], sets: Sequence[str], targets: Sequence[str]) -> dict[str, Spec]:
    """Several specs, of a folder all below it, each by a name of its own and with those settings that it has a
    parameter for; `targets` are for those that have a target.

    Raises: SurgeryError, for a setting that none of them has a parameter for too."""
    from surgery.diagnostics import did_you_mean, fail
    from surgery.language.library import assignment, shipped

    plain = {spec: opened(spec) for spec in files_below(specs, shipped())}
    known = {spec: [p.name for p in read.params] for spec, read in plain.items()}
    of_any = [name for names in known.values() for name in names]
    for text in (text for text in sets if _name(text) not in of_any):
        name = assignment(text).name  # a text that is no setting at all is refused as that
        raise fail("unknown-parameter", f"none of these specs has a parameter `{name}`",
                   helps=tuple(filter(None, [did_you_mean(name or "", of_any)])))
    # Where no spec has a target, --target goes to all of them, and each then says that it has none to change.
    no_targets = not any(read.targets for read in plain.values())
    stems, together = [Path(spec).stem for spec in plain], {}
    for spec, read in plain.items():
        mine = [text for text in sets if _name(text) in known[spec]]
        # Results are shown and kept under these names: two files of one name are told apart by their paths.
        stem = Path(spec).stem
        name = stem if stems.count(stem) == 1 else spec.replace(os.sep, "_")
        together[name] = checked(spec, mine, targets if read.targets or no_targets else ())
    return together


def _name(text: str) -> str:
    return text.partition("=")[0].strip()


def files_below(names: Iterable[str], not_folders: Container[str] = ()) -> list[str]:
    """The files that names of files and folders mean: of a folder all the `.surg` files below, but for those in hidden
    folders; a name of `not_folders` stands for itself. Raises: SurgeryError (missing-file) for a folder with none."""
    from surgery.diagnostics import fail

    def report(error: OSError) -> None:
        raise error  # os.walk passes over a folder that it cannot read, and its specs would count as right

    files: dict[str, None] = {}
    for name in names:
        if name in not_folders or not os.path.isdir(name):
            files[name] = None
            continue
        below: list[str] = []
        for folder, inner, others in os.walk(name, onerror=report):
            # Written in place, where os.walk reads which folders to enter and in what order.
            inner[:] = sorted(each for each in inner if not each.startswith("."))
            paths = (os.path.join(folder, file) for file in sorted(others) if file.endswith(".surg"))
            below += filter(os.path.isfile, paths)
        if not below:
            raise fail("missing-file", f"there is no .surg file below {name}")
        files |= dict.fromkeys(below)
    return list(files)


def import_libraries(output: Output, *folders: str) -> None:
    """Import torch and transformers, whose bars show where ours do. A command that needs them begins with it, once what
    is wrong in a spec is told: what it imports itself then comes after what is looked through for garbage no more. Not
    where one of the `folders` that it reads is not there: it will say so, and needs no transformers for that."""
    from surgery.models.loading import quiet_libraries

    if all(map(os.path.exists, folders)):
        quiet_libraries(output.animated)


def skeleton_of(output: Output, model: str) -> nn.Module:
    from surgery.models.loading import skeleton
    from surgery.models.names import revised

    with output.busy(f"reading the configuration of {model}"):
        import_libraries(output)
        return skeleton(revised(model, output.revision), output.trust)
