"""A malformed input: what it is, and how intact files and values are spoilt."""

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
    """`make(folder)` writes the spoilt files there and gives what is to be run with them: a command
    (its words; OUT stands for the folder of its output) or a function.

    `may_pass`: exit code 0 is no fault, as the change can be one that nothing hangs on.
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
    """Where something stands in nested dicts and lists; of a list, the first element alone."""
    if path:
        yield path
    items = value.items() if isinstance(value, dict) else list(enumerate(value))[:1] if isinstance(
        value, list) else ()  # fmt: skip
    for key, part in items:
        yield from places(part, (*path, key))


def at(value, path):
    for key in path:
        value = value[key]
    return value


def changed(value, path, new):
    """A copy of nested dicts and lists with `new` at `path`; nothing else is copied."""
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
    """Values of which none can be right where `good` is."""
    if isinstance(good, bool):
        return [None, "yes", 2, MISSING]
    if isinstance(good, int | float):
        return [None, "text", str(good), [], {}, math.nan, math.inf, -math.inf, True, MISSING]
    if isinstance(good, str):
        return [None, 3, math.nan, [], {}, nested(300), MISSING]
    if isinstance(good, dict):
        return [None, [], "text", 3, MISSING]
    if isinstance(good, list | tuple):
        return [None, {}, "text", 3, nested(300), MISSING]
    return [[[]], {"a": [{}]}] if good is None else [None, 3, "text", [], {}, MISSING]


def shown(value) -> str:
    text = "deeply nested lists" if isinstance(value, list) and len(str(value)) > 99 else str(value)
    return text[:40].encode("unicode_escape").decode()


def spoilt_file(source: Path, how: str, target: Path) -> None:
    """Write to `target` what no reader of text can take for the file `source`."""
    content = source.read_bytes()
    bad = {
        "empty": b"",
        "not UTF-8": content[: len(content) // 2] + b"\xff\xfe" + content[len(content) // 2 :],
        "half": content[: len(content) // 2],
        "nested 10,000 deep": b"[" * 10_000 + b"]" * 10_000,
        "a number": b"3",
        "null": b"null",
        "a number of 10,000 digits": b"9" * 10_000,
        "zeros": bytes(4096),
    }
    if target.exists():
        target.unlink()
    if how == "a folder":
        target.mkdir()
    elif how == "nothing at all":
        return
    else:
        target.write_bytes(bad[how])


SPOILT = ("empty", "not UTF-8", "half", "nested 10,000 deep", "a number", "null")
SPOILT += ("a number of 10,000 digits", "zeros", "a folder", "nothing at all")


def given(command, path: Path) -> list:
    """A command with the path of the spoilt file in its place."""
    return [path if word == HERE else word for word in command]
