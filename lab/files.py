"""What a run writes and reads: files that are whole or absent, and folders of one process."""

import contextlib
import hashlib
import json
import os
import re
import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from lab.cli import BadInput, shortened

try:
    import fcntl
except ImportError:  # Windows: nothing is locked there
    fcntl = None

MB = 2**20  # bytes
PREFIX, SUFFIX = ".writing-", ".tmp"  # of the folders that files are written in
NEW_S = 2  # seconds in which one that is written in is surely locked
DAY_S = 24 * 3600


@contextlib.contextmanager
def atomic(path) -> Iterator[Path]:
    """Give a path to write to; what was written there becomes `path` when all went well.

    It lies in a new folder beside `path` that no other user can enter. The folder is locked, so one
    without a lock was left by a killed process: the next write to the same place removes it. The
    file gets the mode of a new file, whatever wrote it.
    """
    path = Path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _remove_abandoned(path.parent)
        scratch = Path(tempfile.mkdtemp(SUFFIX, PREFIX, path.parent))
        try:
            with _flock(scratch):
                new = scratch / path.name
                new.touch()
                mode = new.stat().st_mode
                yield new
                new.chmod(mode)
                os.replace(new, path)
        finally:
            shutil.rmtree(scratch, ignore_errors=True)
    except OSError as error:
        raise BadInput(f"cannot write {shortened(path)}: {error.strerror or error}") from error


def _remove_abandoned(folder: Path) -> None:
    for scratch in folder.glob(f"{PREFIX}*{SUFFIX}"):
        with contextlib.suppress(OSError):  # locked, a stranger's, or gone already
            age_s = time.time() - scratch.lstat().st_mtime
            if age_s < NEW_S:
                continue
            with _flock(scratch) as could:
                if could or age_s > DAY_S:
                    shutil.rmtree(scratch, ignore_errors=True)


@contextlib.contextmanager
def locked(folder) -> Iterator[None]:
    """Make `folder` and keep other processes out of it; BadInput if one is in it.

    The lock is the kernel's and goes with its process, however that ends. Windows and some network
    file systems have none: nothing is locked there.
    """
    folder = Path(folder)
    new = not folder.exists()
    with contextlib.ExitStack() as stack:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            stack.enter_context(_flock(folder.resolve()))
        except BlockingIOError as error:
            raise BadInput(f"another process is at work in {folder}: wait for it") from error
        except OSError as error:
            raise BadInput(f"cannot write to {shortened(folder)}: {error.strerror}") from error
        try:
            yield
        finally:
            if new:
                with contextlib.suppress(OSError):  # not empty
                    folder.rmdir()


_locks: set[int] = set()  # descriptors


@contextlib.contextmanager
def _flock(folder: Path) -> Iterator[bool]:
    """Lock a folder, and give whether it could be; BlockingIOError if another process has it."""
    if fcntl is None:
        yield False
        return
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    _locks.add(descriptor)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            could = True
        except BlockingIOError:
            raise
        except OSError:  # this file system has no locks
            could = False
        yield could
    finally:
        _locks.discard(descriptor)
        os.close(descriptor)


def _close_locks() -> None:
    """Close all locks in a forked process: it must not keep those of a parent that has ended."""
    for descriptor in _locks:
        os.close(descriptor)
    _locks.clear()


if fcntl:
    os.register_at_fork(after_in_child=_close_locks)


def require_writable(folder) -> None:
    """Make `folder` if need be; raise BadInput now if files can't be written to it later."""
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except FileExistsError as error:
        raise BadInput(f"cannot write to {shortened(folder)}: it is no folder") from error
    except OSError as error:
        raise BadInput(f"cannot write to {shortened(folder)}: {error.strerror or error}") from error


def require_absent(path: Path, force: bool) -> None:
    """Raise BadInput if `path` is there already, unless `force` says to replace it."""
    if path.exists() and not force:
        raise BadInput(f"{path} is there already: --force replaces it")


def write_text(path, text: str) -> None:
    with atomic(path) as new:
        new.write_text(text, encoding="utf-8", newline="\n")


def write_json(path, value) -> None:
    """Write plain values, indented, but each list of whole numbers on one line.

    ValueError for numbers that are not finite, which JSON can't hold.
    """
    text = json.dumps(value, indent=1, allow_nan=False)
    numbers = r"\[\s+(-?\d+(?:,\s+-?\d+)*)\s+\]"
    short = re.sub(numbers, lambda found: f"[{' '.join(found[1].split())}]", text)
    write_text(path, short + "\n")


def _not_finite(name: str):
    raise ValueError(f"{name} is no number of JSON")


def read_json(path):
    """Return what a JSON file holds; BadInput if it can't be read or has numbers without end."""
    try:
        text = Path(path).read_text(encoding="utf-8")
        return json.loads(text, parse_constant=_not_finite)
    except (OSError, ValueError, RecursionError) as error:
        raise BadInput(f"cannot read {shortened(path)}: {error}") from error


def sha256(data) -> str:
    """Return the hex digest of a file's content, or of bytes."""
    return hashlib.sha256(data if isinstance(data, bytes) else Path(data).read_bytes()).hexdigest()
