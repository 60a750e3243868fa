"""What all commands share: files that are whole or absent, locks, signals, outputs, exit codes."""

import argparse
import contextlib
import os
import signal
import stat
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import ROOT

from lab import cli, files
from lab.cli import BadInput

# Files and folders


@pytest.mark.parametrize("umask", [0o022, 0o077, 0o002])
def test_a_file_has_the_mode_of_a_new_one_whatever_its_writer_does(umask, tmp_path):
    before = os.umask(umask)
    try:
        (tmp_path / "new").touch()
        with files.atomic(tmp_path / "written") as path:
            path.write_text("a")
            path.chmod(0o600)  # as safetensors does
    finally:
        os.umask(before)
    new, written = (stat.S_IMODE((tmp_path / n).stat().st_mode) for n in ("new", "written"))
    assert new == written == 0o666 & ~umask


def test_a_failed_write_leaves_the_file_as_it_was(tmp_path):
    files.write_text(tmp_path / "a", "before")
    with pytest.raises(ZeroDivisionError), files.atomic(tmp_path / "a") as path:
        path.write_text("half")
        raise ZeroDivisionError
    assert (tmp_path / "a").read_text() == "before" and os.listdir(tmp_path) == ["a"]


def test_the_longest_name_can_be_written_and_a_longer_one_is_one_line(tmp_path):
    files.write_text(tmp_path / ("a" * 255), "text")
    with pytest.raises(BadInput, match="File name too long"):
        files.write_text(tmp_path / ("a" * 256), "text")


def test_text_is_utf8_and_deep_json_is_refused(tmp_path):
    files.write_text(tmp_path / "a", "Δ\n")
    assert (tmp_path / "a").read_bytes() == b"\xce\x94\n"
    (tmp_path / "deep").write_text("[" * 100_000)
    with pytest.raises(BadInput, match="cannot read"):
        files.read_json(tmp_path / "deep")


def process(body: str) -> subprocess.Popen:
    code = f"import os, time\nfrom pathlib import Path\nfrom lab import files\n{body}"
    return subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE)


def test_what_killed_processes_leave_goes_and_what_others_write_in_stays(tmp_path):
    body = (
        f"with files.atomic({str(tmp_path / 'a')!r}) as path:\n"
        " path.write_text('half')\n print(path.parent.name, flush=True)\n time.sleep(60)"
    )
    dead, alive = process(body), process(body)
    folders = [Path(tmp_path, p.stdout.readline().decode().strip()) for p in (dead, alive)]
    dead.kill()
    dead.wait()
    stranger = tmp_path / ".writing-notes.tmp"  # a file, not a folder: not ours
    stranger.write_text("mine")
    old = time.time() - 10
    for path in (*folders, stranger):
        os.utime(path, (old, old))
    files.write_text(tmp_path / "b", "text")
    assert [path.exists() for path in (*folders, stranger)] == [False, True, True]
    alive.kill()
    alive.wait()


def test_a_locked_folder_is_refused_until_its_process_has_ended(tmp_path):
    run = tmp_path / "run"
    body = f"with files.locked({str(run)!r}):\n print('locked', flush=True)\n"
    # A forked process, such as a loader's, does not keep the lock when its parent is killed.
    body += " if os.fork() == 0: time.sleep(20)\n time.sleep(60)"
    holder = process(body)
    holder.stdout.readline()
    with pytest.raises(BadInput, match="another process"), files.locked(run):
        pass
    holder.kill()
    holder.wait()
    for _ in range(100):  # the fork may not have come to closing what it inherited
        with contextlib.suppress(BadInput), files.locked(run):
            (run / "a").touch()
            break
        time.sleep(0.1)
    assert (run / "a").exists()
    with files.locked(tmp_path / "unused"):
        pass
    assert run.exists() and not (tmp_path / "unused").exists()


# Options


@pytest.mark.parametrize(
    "kind, good, bad",
    [
        (cli.at_least(1, 9), {"1": 1, "9": 9}, ("0", "10", "1.5", "x", "", "nan", "9" * 5000)),
        (cli.within(0, 1), {"0": 0.0, "1e-3": 0.001, "1": 1.0}, ("-0.1", "1.1", "nan", "inf")),
        (cli.above(0), {"1e9": 1e9}, ("0", "-1", "inf", "nan", "x")),
        (cli.seed, {str(2**63 - 1): 2**63 - 1}, (str(2**63), "-1")),
    ],
)
def test_types_of_options(kind, good, bad):
    for text, value in good.items():
        assert kind(text) == value
    for text in bad:
        with pytest.raises(argparse.ArgumentTypeError) as error:
            kind(text)
        assert len(str(error.value)) < 150


def test_refused_options_name_ours(capsys):
    p = cli.parser("Doc.")
    p.add_argument("--calibration-images", type=int)
    cli.refused(p, "--calibration-batches", why="is --calibration-images here: images, not batches")
    assert p.parse_args(["--calibration-images", "3"]) == argparse.Namespace(calibration_images=3)
    for flags in (["--calibration-batches"], ["--calibration-batches", "10"]):
        with pytest.raises(SystemExit) as end:
            p.parse_args(flags)
        assert end.value.code == 2
        err = capsys.readouterr().err
        assert "--calibration-batches is --calibration-images here" in err and err.count("\n") == 1
    assert "--calibration-batches" not in p.format_help()


# The end of a command


@pytest.fixture
def command(tmp_path):
    """Run a command with this body of `main`: exit code, stdout and stderr.

    `around` is a line of bash in which {} stands for it. With `number` it gets that signal when it
    has printed a line.
    """

    def run(body: str, around="{}", number=None, before="", **env):
        path = tmp_path / "command.py"
        body = "\n    ".join(body.splitlines())
        path.write_text(
            "import sys, time\nfrom lab import cli\ncli.exit_on_signals()\n"
            f"{before}\n@cli.command\ndef main():\n    {body}\nmain()\n"
        )
        line = around.format(f"exec {sys.executable} {path}")
        process = subprocess.Popen(
            ["bash", "-o", "pipefail", "-c", line],
            env=os.environ | {"PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": ""} | env,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        if number:
            process.stdout.readline()
            process.send_signal(number)
        out, err = (stream.decode(errors="replace") for stream in process.communicate(timeout=60))
        return process.returncode, out, err

    return run


@pytest.mark.parametrize("number, name", [(signal.SIGINT, "SIGINT"), (signal.SIGTERM, "SIGTERM")])
@pytest.mark.parametrize("starting", [True, False])
def test_a_signal_ends_a_command_in_one_line(number, name, starting, command):
    waits = "print('ready', flush=True); time.sleep(60)"
    how = {"body": "pass", "before": waits} if starting else {"body": waits}
    code, _, err = command(**how, number=number)
    assert code == 128 + number and err == f"command.py: stopped by {name}\n"


def test_signals_are_noted_where_a_command_wants_to_stop_by_itself(command):
    body = (
        "with cli.noted_signals() as signals:\n"
        "    print('ready', flush=True)\n"
        "    while not signals: time.sleep(0.01)\n"
        "print('saved')\n"
        "return cli.exit_code(signals)"
    )
    assert command(body, number=signal.SIGTERM) == (143, "saved\n", "")


@pytest.mark.parametrize(
    "body, code, says",
    [
        ("raise cli.BadInput('no\\nsuch thing')", 2, "error: no such thing"),
        ("open('/absent/file')", 2, "error: /absent/file: No such file or directory"),
        ("open('/' + 'a' * 300)", 2, "...: File name too long"),
        ('raise RuntimeError("DefaultCPUAllocator: can\'t allocate memory")', 2, "out of memory"),
        ("bytearray(2**60)", 2, "error: out of memory, take smaller"),
        ("return cli.TIME_IS_UP", 3, ""),
    ],
)
def test_what_a_machine_refuses_is_one_line(body, code, says, command):
    got, _, err = command(body)
    assert got == code and says in err and len(err.splitlines()) == bool(says)


def test_a_fault_of_the_code_keeps_its_traceback(command):
    code, _, err = command("raise RuntimeError('a bug')")
    assert code == 1 and "Traceback" in err


MANY = "for i in range(10**5): print('a line', i)"


@pytest.mark.parametrize(
    "body, around, code, says",
    [
        (MANY, "({}) | head -1", 141, "Broken pipe"),
        (MANY, "{} > /dev/full", 2, "No space left"),
        ("print('short')", "{} > /dev/full", 2, "No space left"),
        ("cli.parser('Doc.').parse_args(['--help'])", "{} > /dev/full", 2, "No space left"),
        (MANY, "{} >&-", 0, ""),
        ("raise cli.BadInput('x')", "{} > /dev/full 2>&1", 2, ""),
        ("raise cli.BadInput('x')", "{} >&- 2>&-", 2, ""),
    ],
)
def test_an_output_that_is_full_or_gone_is_no_traceback(body, around, code, says, command):
    got, _, err = command(body, around)
    assert got == code and says in err and len(err.splitlines()) == bool(says)


def test_a_terminal_without_utf8_gets_question_marks(command):
    assert command("print('\u0394 100 %')", PYTHONIOENCODING="ascii") == (0, "? 100 %\n", "")
