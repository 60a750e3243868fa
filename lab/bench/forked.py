"""Commands and functions run in forked processes, which need not import torch each time anew."""

import importlib
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from lab import cli
from lab.cli import BadInput

try:
    import resource
except ImportError:  # Windows, which can't fork either
    resource = None

ROOT = Path(__file__).parents[2]
TIMEOUT_S, CPU_S = 900, 120  # a process that takes longer, or more of the CPU's time, hangs
HANGS = "hangs"


@dataclass(frozen=True)
class Outcome:
    """How a process ended: its exit code (minus the signal that ended it, or HANGS) and output."""

    code: int | str
    out: str
    err: str


def script(name: str):
    """Return the module of a script of this project, such as "train.py".

    Imported by name while the program runs, as nothing else in lab hangs on the scripts.
    """
    return importlib.import_module(Path(name).stem)


def command(argv) -> Callable[[], None]:
    """Return a function that runs a script of this project with its options.

    `argv`: the name of the script, then the options.
    """

    def run():
        sys.argv = [str(arg) for arg in argv]
        cli.BEGAN = time.monotonic()  # the command's, and not that of this process
        script(sys.argv[0]).main()

    return run


def library(function: Callable[[], object]) -> Callable[[], None]:
    """Return `function` so that it ends as a command: what it refuses is one line, exit code 2."""

    def run():
        try:
            function()
        except (BadInput, ValueError) as error:
            print(f"{type(error).__name__}: {error}", file=sys.stderr)
            sys.exit(2)

    return run


def forked(function: Callable[[], object], folder: Path, env=(), kill_after_s=None) -> Outcome:
    """Run `function` in a forked process and return how it ended.

    Its output goes through files in `folder`. `env`: variables to set. `kill_after_s`: end it then
    by SIGKILL.
    """
    out, err = folder / "stdout", folder / "stderr"
    sys.stdout.flush()
    sys.stderr.flush()
    pid = os.fork()
    if pid == 0:
        resource.setrlimit(resource.RLIMIT_CPU, (CPU_S, CPU_S))
        become(function, out, err, dict(env))
    status = _wait(pid, TIMEOUT_S if kill_after_s is None else kill_after_s)
    if status is None:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        code = HANGS if kill_after_s is None else -signal.SIGKILL
    else:
        code = os.waitstatus_to_exitcode(status)
    return Outcome(code, *(path.read_text(errors="replace") for path in (out, err)))


def become(function: Callable[[], object], out: Path, err: Path, env: dict[str, str]):
    """Go on as a process that runs `function` alone and ends with it.

    Its output goes to the files `out` and `err`.
    """
    for number, path in ((1, out), (2, err)):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
    sys.stdout, sys.stderr = (os.fdopen(number, "w", errors="replace") for number in (1, 2))
    os.environ |= env
    code = 1
    try:
        function()
        code = 0
    except SystemExit as end:
        if isinstance(end.code, str):
            print(end.code, file=sys.stderr)
        else:
            code = end.code or 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)  # without what the parent would do at its own end


def _wait(pid: int, seconds: float) -> int | None:
    """Return the status of a process, or None if it has not ended after so many seconds."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        ended, status = os.waitpid(pid, os.WNOHANG)
        if ended:
            return status
        time.sleep(0.005)
    return None
