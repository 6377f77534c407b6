import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parent.parent
# Small matrices: more threads only wait for each other. And what is compared to the bit must have as many
# in this process as in those that tests start.
torch.set_num_threads(1)
os.environ["OMP_NUM_THREADS"] = "1"


@pytest.fixture
def run_script(tmp_path):
    """Run a script of the repository in an empty folder, as a user does; returns the process."""

    def run(*arguments, timeout=300):
        command = [sys.executable, str(ROOT / arguments[0]), *map(str, arguments[1:])]
        return subprocess.run(
            command, cwd=tmp_path, capture_output=True, text=True, timeout=timeout
        )

    return run
