"""What every command shares: its parser, types of options, signals, and one line for what fails.

Exit codes: 0 done; 1 something failed that nobody foresaw, or results differ from what they should
be; 2 bad input, or a machine that refuses (a full disk, too little memory); 3 training stopped by
--max-minutes; 130 and 143 stopped by Ctrl-C (SIGINT) and by SIGTERM; 141 the reader of the output
has gone (`| head -1`).
"""

import argparse
import contextlib
import difflib
import functools
import math
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator

# torch is imported where it is used: a script imports this module first, for its signals.
from lab import machine

PRECISIONS = ("fp32", "bf16", "fp16")  # of training
SIGNALS = (signal.SIGINT, signal.SIGTERM)
TIME_IS_UP, READER_GONE = 3, 141  # exit codes
MAX_COUNT = 2**31 - 1
SHOWN = 60  # characters of a wrong value that a message repeats
# When the script began, from which its minutes count: torch's import behind this takes seconds.
BEGAN = time.monotonic()


class BadInput(Exception):
    """Something the user gave can't be used; the message says what and what to do."""


class Stopped(KeyboardInterrupt):
    """SIGINT or SIGTERM came while a command was at work."""

    def __init__(self, number: int):
        super().__init__(number)
        self.number = number


# Options


class _Parser(argparse.ArgumentParser):
    """A parser whose errors are one line, without the usage, which --help shows.

    It refuses empty values: a script would take them for options that were not given.
    """

    def __init__(self, **how):
        super().__init__(**{"formatter_class": _Help} | how)

    def parse_known_args(self, args=None, namespace=None):  # also of a sub-command
        parsed, rest = super().parse_known_args(args, namespace)
        for action in self._actions:
            value = getattr(parsed, action.dest, None)
            if value == "" or (isinstance(value, list) and "" in value):
                self.error(f"{'/'.join(action.option_strings) or action.dest} is empty")
        return parsed, rest

    def error(self, message):
        self.exit(2, f"{self.prog}: error: {_one_line(message)} (--help lists all options)\n")


class _Help(argparse.ArgumentDefaultsHelpFormatter):
    """Help that shows defaults, but not those of switches and of options that may be absent."""

    def _get_help_string(self, action):
        absent = action.default is None or action.default is False
        return action.help if absent else super()._get_help_string(action)


def flags(*names: str) -> str:
    """Return the names of options as they are typed, in a list."""
    *first, last = (f"--{name.replace('_', '-')}" for name in names)
    return f"{', '.join(first)} and {last}" if first else last


def parser(doc: str) -> argparse.ArgumentParser:
    """Return a parser for the options of a script with this docstring."""
    return _Parser(prog=machine.script(), description=doc.split("\n")[0])


def at_least(low: int, high: int = MAX_COUNT) -> Callable[[str], int]:
    """Return the type of an option that is a whole number from `low` to `high`."""
    return _number_type(int, lambda n: low <= n <= high, f"a whole number from {low} to {high}")


def within(low: float, high: float) -> Callable[[str], float]:
    """Return the type of an option that is a number from `low` to `high`, both included."""
    return _number_type(float, lambda x: low <= x <= high, f"a number from {low} to {high}")


def above(low: float, high: float = math.inf) -> Callable[[str], float]:
    """Return the type of an option that is a finite number above `low` and at most `high`."""
    at_most = f" and at most {high}" if high < math.inf else ""
    in_range = lambda x: low < x <= high and x < math.inf  # noqa: E731
    return _number_type(float, in_range, f"a number above {low}{at_most}")


def _number_type(kind: type, in_range: Callable, described: str) -> Callable:
    def read(text: str):
        try:
            value = kind(text)
        except ValueError:
            value = math.nan  # within no range
        if not in_range(value):
            raise argparse.ArgumentTypeError(f"{shortened(text) or 'nothing'} is not {described}")
        return value

    return read


seed = at_least(0, 2**63 - 1)  # what torch's generators take


def known(names, what: str) -> Callable[[str], str]:
    """Return the type of an option that is one of `names`; its error tells names that are close."""

    def read(text: str):
        if text not in names:
            close = difflib.get_close_matches(text, names, cutoff=0.3)
            told = f"closest are {', '.join(close)}" if close else "--help lists them"
            raise argparse.ArgumentTypeError(f"no {what} is called {shortened(text)}: {told}")
        return text

    return read


class _Refused(argparse.Action):
    def __call__(self, p, namespace, values, option_string=None):
        p.error(f"{option_string} {self.const}")


def refused(p, *options: str, why: str) -> None:
    """Refuse options of published scripts that do not fit here, with `why` naming ours.

    >>> refused(p, "--patience", why="is not known: the best epoch is kept anyway")
    """
    hidden = argparse.SUPPRESS
    p.add_argument(*options, action=_Refused, const=why, nargs="*", help=hidden, default=hidden)


def device(p: argparse.ArgumentParser, asked_for: str | None) -> str:
    """Return the device to compute on: what was asked for, or CUDA if there is any.

    Ends the program in one line if CUDA was asked for and there is none.
    """
    import torch

    if asked_for == "cuda" and not torch.cuda.is_available():
        p.error("--device cuda: torch sees no CUDA device")
    return asked_for or ("cuda" if torch.cuda.is_available() else "cpu")


def precision(p: argparse.ArgumentParser, asked_for: str | None, device: str, amp=False) -> str:
    """Return what training computes in: what was asked for, or what suits the device.

    With `amp`, that is mixed precision on every device that has instructions for it.
    """
    import torch

    if asked_for == "fp16" and device == "cpu":
        p.error("--precision fp16 needs CUDA")
    if asked_for:
        return asked_for
    if device == "cpu":
        return "bf16" if amp and machine.has_bf16() else "fp32"
    return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"


def shortened(value) -> str:
    """Return a value as a message shows it."""
    text = str(value)
    return text if len(text) <= SHOWN else text[:SHOWN] + "..."


# Signals


def exit_on_signals() -> None:
    """End at once and in one line on Ctrl-C and SIGTERM, from now on.

    For the seconds in which a script imports torch; `command` then takes over.
    """
    for number in SIGNALS:
        signal.signal(number, _exit_at_once)


def _exit_at_once(number, frame) -> None:
    with contextlib.suppress(OSError):
        os.write(2, f"{machine.script()}: {_stopped_by(number)}\n".encode())
    os._exit(128 + number)


def _raise_stopped(number, frame) -> None:
    raise Stopped(number)


def _stopped_by(number: int) -> str:
    return f"stopped by {signal.Signals(number).name}"


@contextlib.contextmanager
def noted_signals() -> Iterator[list[int]]:
    """Give a list to which SIGINT and SIGTERM only add their number, to be looked at."""
    noted = []
    with _handled_by(lambda number, frame: noted.append(number)):
        yield noted


def exit_code(signals: list[int]) -> int:
    """Return the exit code of a command that the first of these signals stops; 0 without any."""
    return 128 + signals[0] if signals else 0


@contextlib.contextmanager
def _handled_by(handler) -> Iterator[None]:
    before = {number: signal.signal(number, handler) for number in SIGNALS}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


# The end of a command


def command(main: Callable[[], int | None]):
    """Wrap a script's `main`, which may return an exit code: what fails becomes one line."""

    @functools.wraps(main)
    def wrapper():
        _prepare_output()
        exit_on_signals()
        code, message = _run(main)
        if message:
            with contextlib.suppress(OSError):
                print(f"{machine.script()}: {_one_line(message)}", file=sys.stderr)
        _give_up_output()
        sys.exit(code)

    return wrapper


def _run(main) -> tuple[int, str]:
    """Run `main`; return its exit code, and what to say on stderr."""
    try:
        with _handled_by(_raise_stopped):
            machine.code()  # what runs is the code of now, whatever is checked out later
            try:
                code = main() or 0
            except SystemExit as end:  # of argparse
                code = end.code
            sys.stdout.flush()
            return code, ""
    except BadInput as error:
        return 2, f"error: {error}"
    except Stopped as stop:
        return exit_code([stop.number]), _stopped_by(stop.number)
    except OSError as error:  # what the system says of a file or of the output
        name = f"{shortened(error.filename)}: " if error.filename else ""
        code = READER_GONE if isinstance(error, BrokenPipeError) else 2
        return code, f"error: {name}{error.strerror or error}"
    except (RuntimeError, MemoryError) as error:
        if not _out_of_memory(error):
            raise
        return 2, f"error: out of memory, take smaller batches or images: {error}"


def _out_of_memory(error: Exception) -> bool:
    torchs = ("OutOfMemoryError", "MemoryError")
    texts = ("can't allocate memory", "not enough memory", "Storage size calculation overflowed")
    return type(error).__name__ in torchs or any(text in str(error) for text in texts)


def _prepare_output() -> None:
    """Let no output end a command: not a closed stream, not a terminal that lacks a character."""
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:  # closed
            setattr(sys, name, open(os.devnull, "w"))
    with contextlib.suppress(AttributeError):  # stdout is not a stream of text to the system
        sys.stdout.reconfigure(errors="replace")


def _give_up_output() -> None:
    """Send what an output does not take into the void, or Python's exit would fail over it."""
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except OSError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def _one_line(message: str) -> str:
    return " ".join(message.split())
