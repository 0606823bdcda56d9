"""The published methods that no spec can say, because they have no single W': each with the reason.

A table that imports nothing of the package's but diagnostics. Names are those of PEFT's `peft_type`, in lower case; how
a name is cased or hyphenated does not count.
"""

from __future__ import annotations

from surgery.diagnostics import SurgeryError, fail

NO_WEIGHT: dict[str, str] = {
    "prompt_tuning": "it puts trained vectors before the input's embeddings, and every weight stays as it is",
    "p_tuning": "it puts vectors that a trained encoder makes before the input's embeddings, and every weight stays as "
                "it is",
    "multitask_prompt_tuning": "it puts trained vectors, others for each task, before the input's embeddings",
    "prefix_tuning": "it puts trained keys and values before those that each attention layer computes",
    "cartridge": "it puts trained keys and values, as if of a text already read, before those that each attention "
                 "layer computes",
    "cpt": "it puts bounded changes of a context's token embeddings before the input's, and weights the loss",
    "adaption_prompt": "it adds a gated attention over a learned prompt to what an attention layer gives",
    "xlora": "it mixes several LoRAs with weights that it chooses anew for each token",
    "poly": "it mixes several LoRAs with weights that depend on the task of each example",
    "lily": "a router chooses from each input how the shared factors are mixed",
    "arrow": "a router chooses for each token which of several LoRAs act on it",
    "alora": "it acts on the tokens after an invocation string alone, so that a token's place decides whether W' or W "
             "is used",
    "shadow": "a small network beside the model corrects its states as they pass, by what they are",
    "mixed": "it holds adapters of several methods, and has no formula of its own",
}
# Switches of PEFT's LoRA that make it one of these.
SWITCHES = {"arrow_config": "arrow", "alora_invocation_tokens": "alora"}
_INSTEAD = {"mixed": "import each adapter on its own, or write the steps into one spec"}


def refusal(name: str) -> SurgeryError | None:
    """The error that says why there is no spec of that name; None for a name that is not in the table."""
    known = {_plain(each): each for each in NO_WEIGHT}
    method = known.get(_plain(name))
    if method is None:
        return None
    return fail("no-weight", f"{method} has no single W', so it is no surgery: {NO_WEIGHT[method]}",
                helps=(_INSTEAD.get(method, "`surgery specs` lists the methods that change weights"),))


def _plain(name: str) -> str:
    return name.lower().replace("_", "").replace("-", "")
