import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from small import draw

from mobilevit import MobileViT
from ptq.methods.norms import replace_norms

ROOT = Path(__file__).parent.parent
SYNTHETIC = (
    "--task",
    "synthetic",
    "--img-size",
    "32",
    "--batch-size",
    "50",
    "--epochs",
    "2",
    "--warmup-epochs",
    "0.5",
    "--augment",
    "crop-flip",
)

torch.set_num_threads(1)  # two busy thread pools on two cores slow each other many times


def start(*args, module=(), group=False, **env):
    """A script of this project in a process of its own, on one thread; `group`: and in a process
    group of its own."""
    return subprocess.Popen(
        [sys.executable, *module, *map(str, args)],
        cwd=ROOT,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"} | env,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        start_new_session=group,
    )


def run(*args, code=0, **kwargs):
    """Run a script to its end, require its exit code, return (stdout, stderr)."""
    process = start(*args, **kwargs)
    try:
        out, err = process.communicate(timeout=300)
    finally:
        process.kill()  # nothing to one that has ended
    assert process.returncode == code, f"exit code {process.returncode}\n{out}\n{err}"
    return out, err


def fails_with_one_line(*args, says, **kwargs):
    """Require exit code 2 and, on stderr, one line that contains `says` and no traceback."""
    _, err = run(*args, code=2, **kwargs)
    assert len(err.splitlines()) == 1 and says in err and len(err) < 600, err


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory):
    """best.pth of a finished run on the synthetic data."""
    folder = tmp_path_factory.mktemp("trained") / "mobilevit_xxs-synthetic"
    run("train.py", *SYNTHETIC, "--output", folder)
    return folder / "best.pth"


@pytest.fixture(scope="session")
def batches():
    """Calibration images for `model`."""
    return [(draw(4, 3, 64, 64, seed=i), None) for i in range(2)]


@pytest.fixture(scope="session")
def model(batches):
    """MobileViT XXS with the statistics of its images: otherwise all its logits are alike."""
    torch.manual_seed(0)
    model = MobileViT("xxs").eval()
    replace_norms(model, None, batches, None)
    return model
