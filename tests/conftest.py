"""What all tests share: no network, one thread each since two workers run side by side, and a terminal of one width."""

import os
from collections.abc import Iterator
from typing import Any

import pytest


def pytest_configure() -> None:
    os.environ |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "OMP_NUM_THREADS": "1"}
    import torch

    torch.set_num_threads(1)


@pytest.fixture(scope="session", autouse=True)
def _width() -> Iterator[None]:
    """What a command shows is as wide as COLUMNS says. (Set while tests run and not before: what pytest itself shows is
    as wide as the terminal.)"""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("COLUMNS", "200")
        yield


@pytest.fixture(scope="session", autouse=True)
def _proven() -> Iterator[None]:
    """Every program and every step that a test runs is proven to compute its expressions."""
    from surgery.codegen import autograd_node, program
    from surgery.codegen.validate import program_faults, step_faults

    write_program, write_step = program.program_text, autograd_node.step_text

    def proven_program(plan: Any) -> str:
        source = write_program(plan)
        assert program_faults(source, plan.outputs, plan.is_called) == [], source
        return source

    def proven_step(*of: Any) -> Any:
        text = write_step(*of)
        assert text is None or step_faults(text.source, text.body, text.gradients, text.forwarded) == [], text.source
        return text

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(program, "program_text", proven_program)
        patch.setattr(autograd_node, "step_text", proven_step)
        yield
