"""What every command shares: its parser, checked options, and one clear line for bad input."""

import argparse
import functools
import sys
from pathlib import Path

import torch

from lab import machine

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
        machine.code()  # what runs is the code of now, whatever is checked out later
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
