"""What a run writes and reads: files that are whole or absent, versions, commit and hardware."""

import contextlib
import hashlib
import json
import os
import re
import tempfile
from pathlib import Path

from lab.cli import BadInput

MB = 2**20  # bytes


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
    """Write plain values, indented, but each list of whole numbers on one line."""
    text = json.dumps(value, indent=1)
    short = re.sub(r"\[\s+(-?\d+(?:,\s+-?\d+)*)\s+\]", lambda m: _one_line(m[1]), text)
    write_text(path, short + "\n")


def _one_line(numbers: str) -> str:
    return f"[{' '.join(numbers.split())}]"


def read_json(path):
    try:
        return json.loads(Path(path).read_text())
    except (OSError, ValueError) as error:
        raise BadInput(f"cannot read {path}: {error}") from error


def sha256(data) -> str:
    """Hex digest of a file's content, or of bytes."""
    return hashlib.sha256(data if isinstance(data, bytes) else Path(data).read_bytes()).hexdigest()
