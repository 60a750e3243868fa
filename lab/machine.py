"""What a result must say of its origin: commit, versions, hardware, command and time."""

import contextlib
import ctypes
import datetime
import functools
import os
import platform
import shlex
import subprocess
import sys
from importlib import metadata
from pathlib import Path

try:
    import resource
except ImportError:  # Windows
    resource = None


def provenance() -> dict:
    """Return commit, versions, hardware, command and time, as every run records them."""
    commit, dirty = code()
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
def code() -> tuple[str | None, bool | None]:
    """Return the commit and whether Python files differ from it; None for both without git.

    It says what was so at the first call.
    """

    def git(*args):
        command = ["git", "-C", Path(__file__).parents[1], *args]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    try:
        changes = git("status", "--porcelain", "--untracked-files=no", "--", "*.py")
        return git("rev-parse", "HEAD"), bool(changes)
    except (OSError, subprocess.CalledProcessError):
        return None, None


def _command() -> str:
    world = os.environ.get("WORLD_SIZE")
    launcher = ["torchrun", f"--nproc-per-node={world}"] if world else ["python"]
    name = script()
    run = [name] if name == Path(sys.argv[0]).name else ["-m", name]
    return shlex.join([*launcher, *run, *sys.argv[1:]])


def script() -> str:
    """Return the name of what runs: train.py or, of `python -m lab.bench`, lab.bench."""
    path, root = Path(sys.argv[0]), Path(__file__).parents[1]
    if path.name == "__main__.py" and path.is_relative_to(root):
        return ".".join(path.parent.relative_to(root).parts)
    return path.name


def wait_for(device_type: str) -> None:
    """Return when what was asked of a device of this type is done; on a CPU that is always so."""
    import torch  # as in cpu_name

    if device_type == "cuda":
        torch.cuda.synchronize()


def cpu_name() -> str:
    """Return name and widest vector instructions, for example "AMD EPYC, AVX512 with VNNI"."""
    import torch  # takes seconds, and this module is imported before it

    name = platform.processor() or platform.machine()
    with contextlib.suppress(StopIteration):
        name = next(
            line.split(": ")[1] for line in _cpuinfo().splitlines() if line.startswith("model name")
        )
    return f"{name}, {torch.backends.cpu.get_cpu_capability()}" + " with VNNI" * has_vnni()


def has_vnni() -> bool:
    """Say whether the CPU multiplies 8-bit integers without an overflow of sums of two products."""
    return "vnni" in _cpuinfo()


def has_bf16() -> bool:
    """Say whether the CPU has instructions that multiply in BF16: of AVX-512, AMX or ARM."""
    return not {"avx512_bf16", "amx_bf16", "bf16"}.isdisjoint(_cpuinfo().split())


def memory_bytes() -> float:
    """Return the bytes of main memory, or infinity where the system does not say."""
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):  # Windows
        return float("inf")


def peak_memory_bytes() -> int:
    """Return the most bytes of memory that this process has had; 0 if the system does not say."""
    if resource is None:
        return 0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak


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
