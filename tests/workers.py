"""Which tests are `fast`, and which of the workers that run side by side a test goes to."""

from functools import cache

# Files whose tests' last parameter is a case.
_OF_ZOO = ("test_zoo", "test_as_cuda", "test_step", "test_verify", "test_batched_setups")
# What takes more than a few seconds, trains, or starts Python again and again. A new file is fast until it stands here.
_SLOW = {
    "test_activate.py", "test_apply_files.py", "test_batched_setups.py", "test_bench.py", "test_called.py",
    "test_called_life.py",
    "test_catalogue.py", "test_check_fuzz.py", "test_checkpoints.py", "test_cli.py", "test_cli_operating.py",
    "test_compare.py", "test_dequantise.py", "test_diagnostics_docs.py", "test_docs.py", "test_effective.py",
    "test_examples.py", "test_export.py", "test_fine_tuning.py", "test_fingerprint.py", "test_folders.py",
    "test_gpu.py", "test_gpu_kernels.py", "test_grammar_fuzz.py", "test_grid.py", "test_grouped.py", "test_hub.py",
    "test_imports.py", "test_invented.py", "test_large.py", "test_layout.py", "test_likelihood.py",
    "test_matrix_free.py", "test_measure.py", "test_merge_files.py", "test_minilm.py", "test_minilm_peft.py",
    "test_model_tensors.py", "test_noise.py", "test_notebooks.py", "test_packages.py", "test_page.py", "test_papers.py",
    "test_peft_export.py", "test_peft_import.py", "test_peft_parity.py", "test_peft_trips.py", "test_pictures.py",
    "test_plan_memory.py", "test_printer.py", "test_proof.py", "test_python_api.py", "test_random_specs.py",
    "test_reference.py", "test_remade.py", "test_routed_experts.py", "test_rules.py", "test_server.py",
    "test_sharing_scopes.py", "test_small_operations.py", "test_spectra.py", "test_spectrum_cli.py", "test_standing.py",
    "test_step_counts.py", "test_store.py", "test_sums.py", "test_tasks.py", "test_terminal.py", "test_tools.py",
    "test_train_cli.py", "test_training_memory.py", "test_transactions.py", "test_two_processes.py", "test_typed.py",
    "test_validate.py", "test_wheel.py", "test_wrappers.py", "test_zero_rows.py",
}
_DAILY = {"lora", "dora", "sora", "oft"}  # cases that are tried whenever some are
_ZOO = "zoo: "


@cache
def piece(nodeid: str) -> str:
    """The piece of work that a test belongs to, which one worker does.

    A file is one, so that what its tests share is made once. The tests over the zoo are one for each case: then what is
    compiled for a case and a layer is compiled by one worker alone.
    """
    file, _, test = nodeid.partition("::")
    if file.rpartition("/")[2].startswith(_OF_ZOO) and test.endswith("]"):
        return f"{_ZOO}{test[:-1].partition('[')[2].rpartition('-')[2]}"
    return file


def is_of_zoo(nodeid: str) -> bool:
    return piece(nodeid).startswith(_ZOO)


def is_daily(nodeid: str) -> bool:
    """Whether a test is of a case that is tried whenever some are."""
    return any(f"{end}{case}]" in nodeid for case in _DAILY for end in "[-")


def is_left_out(file: str, wanted: str) -> bool:
    """Whether no test of a file is among those that pytest's `-m` asks for."""
    return wanted == "fast" and file in _SLOW or file.startswith("test_gpu") and (wanted == "fast" or "not gpu" in wanted)


def is_fast(nodeid: str) -> bool:
    file, place = nodeid.partition("::")[0].rpartition("/")[2], piece(nodeid)
    return place.removeprefix(_ZOO) in _DAILY if place.startswith(_ZOO) else file not in _SLOW
