"""What a run writes and reads: files that are whole or absent, versions, commit and hardware."""

import argparse
import contextlib
import ctypes
import datetime
import functools
import hashlib
import json
import os
import platform
import shlex
import subprocess
import sys
import tempfile
from importlib import metadata
from pathlib import Path

import torch

MB = 2**20  # bytes
PRECISIONS = ("fp32", "bf16", "fp16")  # of training


class BadInput(Exception):
    """Something the user gave can't be used; the message says what and what to do."""


def parser(doc: str) -> argparse.ArgumentParser:
    """A parser for the options of a script with this docstring."""
    return argparse.ArgumentParser(description=doc.split("\n")[0], formatter_class=_Help)


def device(p: argparse.ArgumentParser, asked_for: str | None) -> str:
    """The device to compute on: what was asked for, or CUDA if there is any."""
    if asked_for == "cuda" and not torch.cuda.is_available():
        p.error("--device cuda: torch sees no CUDA device")
    return asked_for or ("cuda" if torch.cuda.is_available() else "cpu")


def precision(p: argparse.ArgumentParser, asked_for: str | None, device: str) -> str:
    """What training computes in: what was asked for, or what suits the device."""
    if asked_for == "fp16" and device == "cpu":
        p.error("--precision fp16 needs CUDA")
    if asked_for or device == "cpu":
        return asked_for or "fp32"
    return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"


def check_seed(p: argparse.ArgumentParser, seed: int) -> None:
    if not 0 <= seed < 2**63:
        p.error("--seed must be at least 0 and less than 2**63")


class _Help(argparse.ArgumentDefaultsHelpFormatter):
    """Help that shows defaults, but not those of switches and of options that may be absent."""

    def _get_help_string(self, action):
        absent = action.default is None or action.default is False
        return action.help if absent else super()._get_help_string(action)


def command(main):
    """Wrap a script's `main`: a BadInput becomes one line on stderr and exit code 2."""

    @functools.wraps(main)
    def wrapper():
        _code()  # what runs is the code of now, whatever is checked out later
        try:
            main()
        except BadInput as error:
            sys.exit(_fail(f"{Path(sys.argv[0]).name}: error: {error}", 2))
        except torch.OutOfMemoryError as error:
            sys.exit(_fail(f"{Path(sys.argv[0]).name}: error: take smaller batches: {error}", 2))
        except KeyboardInterrupt:
            sys.exit(_fail("stopped", 130))

    return wrapper


def _fail(message: str, code: int) -> int:
    print(" ".join(message.split()), file=sys.stderr)
    return code


@contextlib.contextmanager
def atomic(path):
    """Give a temporary path beside `path` to write to; rename it to `path` when all went well."""
    path = Path(path)
    tmp = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield tmp
        os.replace(tmp, path)
    except OSError as error:
        raise BadInput(f"cannot write {path}: {error.strerror or error}") from error
    finally:
        with contextlib.suppress(OSError):
            tmp.unlink()


def require_writable(folder) -> None:
    """Raise BadInput now if files can't be written to `folder` later; makes it if need be."""
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise BadInput(f"cannot write to {folder}: {error.strerror or error}") from error


def write_text(path, text: str) -> None:
    with atomic(path) as tmp:
        tmp.write_text(text)


def write_json(path, value) -> None:
    write_text(path, json.dumps(value, indent=1) + "\n")


def read_json(path):
    try:
        return json.loads(Path(path).read_text())
    except (OSError, ValueError) as error:
        raise BadInput(f"cannot read {path}: {error}") from error


def sha256(data) -> str:
    """Hex digest of a file's content, or of bytes."""
    return hashlib.sha256(data if isinstance(data, bytes) else Path(data).read_bytes()).hexdigest()


def model_name(variant: str, dataset: str) -> str:
    """A run's name in paths and tables; another data set than CIFAR-10 shows in it."""
    return f"mobilevit_{variant}" + ("" if dataset == "cifar10" else f"-{dataset}")


def provenance() -> dict:
    """Commit, versions, hardware, command and time, as every run records them."""
    commit, dirty = _code()
    return {
        "commit": commit,
        "dirty": dirty,
        "versions": {
            "python": platform.python_version(),
            **{name: metadata.version(name) for name in ("torch", "torchvision")},
        },
        "cpu": cpu_name(),
        "cores": os.cpu_count(),
        "command": _command(),
        "created": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
    }


@functools.cache
def _code() -> tuple[str | None, bool | None]:
    """Commit and whether scripts differ from it, as of the first call; None without git."""

    def git(*args):
        command = ["git", "-C", Path(__file__).parent, *args]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    try:
        changes = git("status", "--porcelain", "--untracked-files=no", "--", "*.py")
        return git("rev-parse", "HEAD"), bool(changes)
    except (OSError, subprocess.CalledProcessError):
        return None, None


def _command() -> str:
    world = os.environ.get("WORLD_SIZE")
    launcher = ["torchrun", f"--nproc-per-node={world}"] if world else ["python"]
    return shlex.join([*launcher, Path(sys.argv[0]).name, *sys.argv[1:]])


def cpu_name() -> str:
    """Name and widest vector instructions, for example "AMD EPYC, AVX512 with VNNI"."""
    name = platform.processor() or platform.machine()
    with contextlib.suppress(StopIteration):
        name = next(
            line.split(": ")[1] for line in _cpuinfo().splitlines() if line.startswith("model name")
        )
    return f"{name}, {torch.backends.cpu.get_cpu_capability()}" + " with VNNI" * has_vnni()


def has_vnni() -> bool:
    """Whether the CPU multiplies 8-bit integers without an overflow of the sums of two products."""
    return "vnni" in _cpuinfo()


def _cpuinfo() -> str:
    try:
        return Path("/proc/cpuinfo").read_text()
    except OSError:  # not Linux
        return ""


def keep_freed_memory() -> None:
    """Let glibc keep freed memory instead of returning each large tensor to the kernel.

    Without it every activation is page-faulted in anew on every step, which costs a third of
    training throughput on a CPU. No effect on other C libraries.
    """
    with contextlib.suppress(OSError, AttributeError):
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(-4, 0)  # M_MMAP_MAX: no allocation gets a mapping of its own
        mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD: bytes free at the top before they are given back
        mallopt(-2, 2**29)  # M_TOP_PAD: bytes to ask for beyond what is needed
        mallopt(-8, 1)  # M_ARENA_MAX: all threads share what is kept
