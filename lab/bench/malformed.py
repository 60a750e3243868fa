"""A malformed input: what it is, and how intact files and values are spoilt."""

import json
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

MISSING = "(missing)"  # as a wrong value: the field is taken out
HERE = "FILE"  # stands for the spoilt file in a command
QUICK = ("--recipes", "fp32", "--test-images", "20", "--latency-runs", "1", "--workers", "1")
OUT = ("--output", "OUT")
SMALL = (  # a training run of a second, on the first images of the task
    *("--task", "synthetic", "--img-size", "32", "--batch-size", "50", "--epochs", "2"),
    *("--warmup-epochs", "0.5", "--val-size", "100", "--ema-decay", "0.9", "--device", "cpu"),
)


@dataclass(frozen=True)
class Input:
    """A malformed input, and what is run with it.

    `make(folder)` writes the spoilt files there and gives a command (its words; OUT stands for the
    folder of its output) or a function.
    `may_pass`: exit code 0 is no fault, as nothing may depend on what was changed.
    `own_process`: it is run by a Python of its own.
    """

    kind: str
    name: str
    make: Callable[[Path], list | Callable[[], None]]
    may_pass: bool = False
    env: tuple[tuple[str, str], ...] = ()
    own_process: bool = False


def nested(depth: int) -> list:
    value = []
    for _ in range(depth):
        value = [value]
    return value


def places(value, path=()) -> Iterator[tuple]:
    """Yield the path of each part of nested dicts and lists; of a list, the first element alone."""
    if path:
        yield path
    if isinstance(value, dict):
        parts = value.items()
    else:
        parts = enumerate(value[:1]) if isinstance(value, list) else ()
    for key, part in parts:
        yield from places(part, (*path, key))


def at(value, path):
    for key in path:
        value = value[key]
    return value


def changed(value, path, new):
    """Return a copy of nested dicts and lists with `new` at `path`; nothing else is copied."""
    key, *rest = path
    copy = dict(value) if isinstance(value, dict) else list(value)
    if rest:
        copy[key] = changed(value[key], rest, new)
    elif isinstance(new, str) and new == MISSING:
        del copy[key]
    else:
        copy[key] = new
    return copy


def wrong_values(good) -> list:
    """Return values of which none can be right where `good` is."""
    if isinstance(good, bool):
        return [None, "yes", 2, MISSING]
    if isinstance(good, int | float):
        beyond = (math.nan, math.inf, -math.inf, 10**400)
        return [None, "text", str(good), [], {}, *beyond, True, MISSING]
    if isinstance(good, str):
        return [None, 3, math.nan, [], {}, nested(300), MISSING]
    if isinstance(good, dict):
        return [None, [], "text", 3, MISSING]
    if isinstance(good, list | tuple):
        return [None, {}, "text", 3, nested(300), MISSING]
    return [[[]], {"a": [{}]}] if good is None else [None, 3, "text", [], {}, MISSING]


def wrong_fields(value) -> list[tuple]:
    """Return (place, a value that is wrong there) of everything in nested dicts and lists."""
    return [(path, wrong) for path in places(value) for wrong in wrong_values(at(value, path))]


def shown(value) -> str:
    text = "deeply nested lists" if isinstance(value, list) and len(str(value)) > 99 else str(value)
    return text[:40].encode("unicode_escape").decode()


def _first_half(content: bytes) -> bytes:
    return content[: len(content) // 2]


CONTENTS = {  # of a spoilt file, made of its intact content
    "empty": lambda content: b"",
    "not UTF-8": lambda content: _first_half(content) + b"\xff\xfe" + content,
    "half": _first_half,
    "nested 10,000 deep": lambda content: b"[" * 10_000 + b"]" * 10_000,
    "a number": lambda content: b"3",
    "null": lambda content: b"null",
    "a number of 10,000 digits": lambda content: b"9" * 10_000,
    "zeros": lambda content: bytes(4096),
}
SPOILT = (*CONTENTS, "a folder", "nothing at all")


def spoil(intact: Path, how: str, path: Path) -> None:
    """Put something at `path` that no reader of text can take for the file `intact`."""
    content = intact.read_bytes()  # before it goes, where it is at `path` itself
    path.unlink(missing_ok=True)
    if how == "a folder":
        path.mkdir()
    elif how in CONTENTS:
        path.write_bytes(CONTENTS[how](content))


def write_changed(good, place: tuple, wrong, path: Path) -> None:
    """Write `good` with one wrong value as JSON."""
    try:
        path.write_text(json.dumps(changed(good, place, wrong)))
    except RecursionError:
        path.write_text("[" * 10_000)


def in_words(place: tuple, wrong) -> str:
    """Say what `changed` does, for the name of an input."""
    return f"{'.'.join(map(str, place))} is {shown(wrong)}"


def given(command, path: Path) -> list:
    """Return a command with the path of the spoilt file in its place."""
    return [path if word == HERE else word for word in command]


def of_file(kind: str, name: str, write, run, file: str = "bad.pth", **more) -> Input:
    """Return an input of one file that `write(path)` makes.

    `run`: the command that reads it, with HERE in its place, or a function from its path to a
    function.
    """

    def make(folder):
        path = folder / file
        write(path)
        return run(path) if callable(run) else given(run, path)

    return Input(kind, name, make, **more)
