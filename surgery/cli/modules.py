"""`surgery modules`: a model as a tree of modules."""

from __future__ import annotations

import click

from surgery.cli.options import command, import_libraries, revision_option, skeleton_of, trust_option
from surgery.cli.output import Output


@command(click.argument("model", required=False), click.argument("pattern", required=False), trust_option,
         revision_option,
         click.option("--all", "every", is_flag=True,
                      help="Write every layer of a list out, also where they are alike."),
         example="surgery modules demo:llama '**.mlp.*'")
def modules(output: Output, model: str | None, pattern: str | None, every: bool) -> None:
    """Show a model as a tree of modules.

    With the kind and shape of every weight that a spec can take; PATTERN narrows it. Without a MODEL: the models that
    installed Python packages carry, and the demos.
    """
    if model is None:
        return _models(output)
    import_libraries(output)
    from surgery.cli.module_tree_view import tree
    from surgery.matching.module_tree import matching_names
    from surgery.matching.module_tree import modules as entries

    skeleton = skeleton_of(output, model)
    output.say(tree(skeleton, matching_names(skeleton, pattern), every))
    output.data(model=model, modules=entries(skeleton, pattern))


def _models(output: Output) -> None:
    """The models that are here already, by the names that a command takes."""
    from surgery.models.demo import DEMOS, LARGER
    from surgery.models.names import DEMO
    from surgery.models.packages import carried

    packages, demos = carried(), [DEMO + name for name in (*DEMOS, *LARGER)]
    output.say("\n".join((*packages, *demos)))
    output.data(packages=packages, demos=demos)
