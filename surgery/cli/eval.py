"""`surgery eval`: the scores of a model on data files."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import click

from surgery.cli.options import command, dtype_option, import_libraries, trust_option
from surgery.cli.output import Output
from surgery.cli.training_options import ASKED, COUNT, READ, given


@command(click.argument("model", metavar="DIR|MODEL"),
         click.option("--data", "files", multiple=True, required=True, metavar="FILE",
                      help="TSV, CSV, JSON Lines, Parquet or text; may be said again."), *READ,
         click.option("--limit", type=COUNT, help="Use so many of the items of each file."),
         click.option("--batch", type=COUNT, help="Items at a time.  [default: 16]"),
         *ASKED, dtype_option, trust_option, example="surgery eval out --data arc-easy-test.jsonl --limit 200")
def eval_(output: Output, model: str, files: tuple[str, ...], kind: str | None, label: str | None,
          threshold: float | None, limit: int | None, dtype: str | None, **how: Any) -> None:
    """Score a model on data files.

    A base model, the folder of a saved adapter (on its base model), or a merged model. The columns tell the task:
    labelled texts or pairs, {question, choices, answer} by log-likelihood, conversations and texts by perplexity,
    questions whose answer is a number (`#### 42`) by what the model writes. Each score has its standard error.
    """
    import_libraries(output)
    from surgery.experiments.evaluation import Scoring, open_model, read_for, scored

    scoring = Scoring(**given(how))
    with output.busy(f"loading {model}"):
        opened = open_model(model, dtype, output.trust)
    tasks = [read_for(opened, file, kind, label, threshold).limited(limit) for file in files]
    found = []
    for task in tasks:
        with output.progress() as now:
            found.append(scored(opened.model, opened.words, task, scoring, partial(_told, now, task.name)))
        output.say(str(found[-1]))
        if found[-1].cut:
            output.note(f"{found[-1].cut} items are longer than {scoring.length} tokens, and were cut")
    output.data(model=model, evaluations=[each.to_json() for each in found])


def _told(now: Callable[[str], None], task: str, done: int, of: int) -> None:
    now(f"{task} {done}/{of}")
