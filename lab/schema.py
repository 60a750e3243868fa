"""What a file must hold, declared once and checked once, where the file is read.

A schema is a function (value, where) that raises BadInput if `value` is not what it describes. The
message names the file and field, what is there, and what should be. Behind the check nothing looks
again.

    >>> ROW = record({"model": text, "n_images": integer(1), "score": mapping(number())})
    >>> ROW(read_json(path), path)
"""

import math
import sys
from collections.abc import Callable

from lab.cli import BadInput, shortened

Schema = Callable[[object, str], None]


def _require(ok: bool, value, where: str, expected: str) -> None:
    if not ok:
        shown = repr(value) if isinstance(value, str | int | float | None) else type(value).__name__
        raise BadInput(f"{where} is {shortened(shown)}, but should be {expected}")


def text(value, where: str) -> None:
    """Raise BadInput unless `value` is a string that can be written to a file.

    That is one without half of a surrogate pair, which JSON can hold.
    """
    ok = isinstance(value, str) and not any("\ud800" <= c <= "\udfff" for c in value)
    _require(ok, value, where, "text")


def flag(value, where: str) -> None:
    """Raise BadInput unless `value` is True or False."""
    _require(isinstance(value, bool), value, where, "true or false")


def anything(value, where: str) -> None:
    """Let any value pass, for what is only shown or passed on."""


def number(low: float = -math.inf, high: float = math.inf) -> Schema:
    """Return the schema of a finite int or float within `low` and `high`."""

    def check(value, where):
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        # Also of a whole number beyond all floats.
        ok = is_number and abs(value) <= sys.float_info.max and low <= value <= high
        _require(ok, value, where, f"a finite number{_bounds(low, high)}")

    return check


percent = number(0, 100)


def integer(low: float = -math.inf, high: float = math.inf) -> Schema:
    """Return the schema of an int within `low` and `high`."""

    def check(value, where):
        ok = isinstance(value, int) and not isinstance(value, bool) and low <= value <= high
        _require(ok, value, where, f"a whole number{_bounds(low, high)}")

    return check


def _bounds(low: float, high: float) -> str:
    if high < math.inf:
        return f" from {low} to {high}"
    return f" of at least {low}" if low > -math.inf else ""


def one_of(*values) -> Schema:
    """Return the schema of one of `values`."""

    def check(value, where):
        names = ", ".join(map(str, values))
        _require(any(type(value) is type(v) and value == v for v in values), value, where, names)

    return check


def maybe(schema: Schema) -> Schema:
    """Return the schema of None, or what `schema` describes."""

    def check(value, where):
        if value is not None:
            schema(value, where)

    return check


def sequence(schema: Schema, length: int | None = None) -> Schema:
    """Return the schema of a list whose elements `schema` describes, of `length` if given."""

    def check(value, where):
        of = "" if length is None else f" of {length}"
        ok = isinstance(value, list | tuple) and length in (None, len(value))
        _require(ok, value, where, f"a list{of}")
        for i, element in enumerate(value):
            schema(element, f"{where}[{i}]")

    return check


def mapping(schema: Schema) -> Schema:
    """Return the schema of a dict with names as keys, whose values `schema` describes."""

    def check(value, where):
        _require(isinstance(value, dict), value, where, "a mapping")
        for key, element in value.items():
            _require(isinstance(key, str), key, f"a key of {where}", "text")
            schema(element, f"{where}: {key}")

    return check


def record(fields: dict[str, Schema], optional: dict[str, Schema] | None = None) -> Schema:
    """Return the schema of a dict that has each of `fields`, and may have those of `optional`.

    Both are {name: schema of the value}. Other names are let pass.
    """

    def check(value, where):
        _require(isinstance(value, dict), value, where, "a mapping")
        missing = [name for name in fields if name not in value]
        if missing:
            raise BadInput(f"{where} lacks {', '.join(missing)}")
        for name, schema in (fields | (optional or {})).items():
            if name in value:
                schema(value[name], f"{where}: {name}")

    return check
