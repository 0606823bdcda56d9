"""The kernels of one pass where there is no GPU: Triton's interpreter runs them on a CPU."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from surgery.codegen.kernels_one_pass import has_triton

KERNELS = Path(__file__).with_name("test_gpu_kernels.py")


@pytest.mark.skipif(not has_triton(), reason="Triton is not installed")
def test_kernels_are_their_plain_forms_in_the_interpreter():
    """A process of its own: what is imported once is no longer interpreted."""
    asked = {"TRITON_INTERPRET": "1", "SURGERY_GPU_DEVICE": "cpu"}
    done = subprocess.run([sys.executable, "-m", "pytest", "-m", "gpu", "-k", "plain_form", "-p", "no:cacheprovider", KERNELS],
                          capture_output=True, text=True, env=os.environ | asked)
    assert done.returncode == 0, done.stdout[-3000:]
