"""`surgery modules`: a model as a tree of modules."""

from __future__ import annotations

import click

from surgery.cli.options import command, model_argument, skeleton_of, trust_option
from surgery.cli.output import Output


@command(model_argument, click.argument("pattern", required=False), trust_option,
         click.option("--all", "every", is_flag=True,
                      help="Write every layer of a list out, also where they are alike."),
         example="surgery modules demo:llama '**.mlp.*'")
def modules(output: Output, model: str, pattern: str | None, every: bool) -> None:
    """Show a model as a tree of modules.

    With the kind and shape of every weight that a spec can take; PATTERN narrows it.
    """
    from surgery.cli.module_tree_view import tree
    from surgery.matching.module_tree import matching_names
    from surgery.matching.module_tree import modules as entries

    skeleton = skeleton_of(output, model)
    output.say(tree(skeleton, matching_names(skeleton, pattern), every))
    output.data(model=model, modules=entries(skeleton, pattern))
