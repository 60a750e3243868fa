import multiprocessing
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest
import torch
from small import draw, small_network

from lab import cli
from lab.bench.forked import Outcome, become, command
from mobilevit import MobileViT
from ptq.methods.norms import replace_norms

ROOT = Path(__file__).parent.parent
FLAGS = "--img-size 32 --batch-size 50 --epochs 2 --warmup-epochs 0.5 --augment crop-flip"
SYNTHETIC = ("--task", "synthetic", *FLAGS.split())
TIMEOUT_S = 300

torch.set_num_threads(1)  # two busy thread pools on two cores slow each other many times
os.environ["OMP_NUM_THREADS"] = "1"  # of processes that tests start
FORKS = None
if "forkserver" in multiprocessing.get_all_start_methods():
    FORKS = multiprocessing.get_context("forkserver")
    FORKS.set_forkserver_preload(["train", "quantize", "plots", "conftest"])


def start(*args, module=(), group=False, **env):
    """A script of this project in a process of its own, on one thread; `group`: and in a process
    group of its own."""
    return subprocess.Popen(
        [sys.executable, *module, *map(str, args)],
        cwd=ROOT,
        text=True,
        env=os.environ | env,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        start_new_session=group,
    )


def run(*args, code=0, module=(), **env):
    """Run a script to its end, require its exit code, return (stdout, stderr).

    In a process forked from one that has imported the scripts already, where there is such a thing:
    importing torch anew takes longer than most tests. `module`: in a fresh one, by way of that.
    """
    outcome = fresh(*args, module=module, **env) if module or not FORKS else forked(args, env)
    assert outcome.code == code, f"exit code {outcome.code}\n{outcome.out}\n{outcome.err}"
    return outcome.out, outcome.err


def fresh(*args, **how) -> Outcome:
    """How a script ends in a process of its own."""
    process = start(*args, **how)
    try:
        out, err = process.communicate(timeout=TIMEOUT_S)
    finally:
        process.kill()  # nothing to one that has ended
    return Outcome(process.returncode, out, err)


def forked(args, env) -> Outcome:
    """How a script ends in a process that need not import it."""
    with tempfile.TemporaryDirectory() as folder:
        files = [Path(folder, name) for name in ("stdout", "stderr")]
        process = FORKS.Process(target=_script, args=(list(map(str, args)), *files, env))
        process.start()
        process.join(TIMEOUT_S)
        process.kill()  # nothing to one that has ended
        process.join()
        return Outcome(process.exitcode, *(f.read_text(errors="replace") for f in files))


def _script(argv, out, err, env):
    os.chdir(ROOT)
    cli.BEGAN = time.monotonic()  # not when it was imported
    become(command(argv), out, err, env)


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
def network():
    """A network with every kind of layer of MobileViT."""
    return small_network()


@pytest.fixture(scope="session")
def images():
    """Calibration images for `network`."""
    return [(draw(4, 3, 32, 32, seed=i), None) for i in range(2)]


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
