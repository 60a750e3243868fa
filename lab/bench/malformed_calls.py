"""Malformed image folders, options and environments.

Every kind is a generator (random source, stand) -> Inputs; `stand` is the folder of intact files.
"""

import random
import shutil
from collections.abc import Iterator
from pathlib import Path

from PIL import Image

from lab.bench.malformed import HERE, OUT, QUICK, SMALL, Input, given


def photos(rng: random.Random, stand: Path) -> Iterator[Input]:
    kind = "image folders"
    weights = stand / "two-classes.safetensors"

    def reading(name, change, inner="", **more):
        def make(folder):
            copy = shutil.copytree(stand / "photos", folder / "photos")
            change(copy)
            where = ("--task", "imagefolder", "--data-dir", copy / inner)
            return ["quantize.py", "--weights", weights, "--model", "xxs", *where, *QUICK, *OUT]

        return Input(kind, name, make, **more)

    def each(make):
        """Return a change of all pictures of a class: which of them are looked at is drawn."""

        def change(folder):
            for path in list((folder / "cat").iterdir()):
                path.unlink()
                make(path)

        return change

    def pictures(content: bytes, suffix: str):
        return each(lambda path: path.with_suffix(suffix).write_bytes(content))

    png = (stand / "photos" / "cat" / "0.png").read_bytes()
    yield reading("no folder", shutil.rmtree)
    yield reading("an empty folder", lambda f: [shutil.rmtree(sub) for sub in f.iterdir()])
    yield reading("one class", lambda f: shutil.rmtree(f / "cat"))
    yield reading("three classes", lambda f: shutil.copytree(f / "cat", f / "bird"))
    yield reading("a class without pictures", lambda f: [p.unlink() for p in (f / "cat").iterdir()])
    yield reading("four pictures", lambda f: [p.unlink() for p in f.rglob("[2-9]*.png")])
    yield reading("a file", lambda f: None, inner="cat/0.png")
    yield reading("train without test", lambda f: shutil.copytree(f, f / "train"))

    def other_classes(folder):
        shutil.copytree(folder, folder.parent / "photos2" / "train")
        shutil.copytree(folder / "cat", folder.parent / "photos2" / "test" / "cat")
        shutil.copytree(folder / "cat", folder.parent / "photos2" / "test" / "bird")

    yield reading("train and test of other classes", other_classes, inner="../photos2")
    for name, content in {
        "text": b"this is no picture",
        "empty": b"",
        "half": png[: len(png) // 2],
        "a header alone": png[:33],
        "of 2**31 pixels a side": png[:16] + (2**31 - 1).to_bytes(4, "big") * 2 + png[24:],
        "of no pixels": png[:16] + bytes(8) + png[24:],
        "zeros": bytes(999),
    }.items():
        for suffix in (".png", ".jpg", ".webp"):
            yield reading(f"pictures {suffix} that are {name}", pictures(content, suffix))

    yield reading("a broken link", each(lambda p: p.symlink_to("nowhere.png")))
    yield reading("a link to itself", each(lambda p: p.symlink_to(p.name)))
    yield reading("a device", each(lambda p: p.symlink_to("/dev/zero")))
    floats = each(lambda p: Image.new("F", (9, 9)).save(p.with_suffix(".tif")))
    yield reading("pictures of floats", floats)
    folder = each(lambda p: p.mkdir())
    yield reading("a folder named as a picture", folder, may_pass=True)  # its pictures would count


LONG = "a" * 300
OPTIONS = {
    "train.py": (
        *("--img-size 1000000", "--img-size -32", "--img-size nan", "--img-size 31", "--epochs 0"),
        *(f"--epochs {10**30}", "--epochs 1e3", "--batch-size 0", f"--batch-size {2**40}"),
        *("--lr nan", "--lr inf", "--lr -1", "--lr 0", "--lr 1e400", "--min-lr 5", "--wd nan"),
        *("--workers 1000000", "--workers -1", f"--seed {2**64}", "--seed -1", "--seed 1.5"),
        *("--label-smooth 1", "--label-smooth nan", "--warmup 1e9", "--clip-norm 0"),
        *("--resolutions 64", "--resolutions 64:nan", "--resolutions 1000000:1", "--heads 7"),
        *(f"--resolutions 64:{10**30}", "--resolutions 64:1,,", f"--heads {2**31 - 1}"),
        *("--val-size 0", "--val-size 1999", "--val-size 2000000", "--mixup nan", "--erase 2"),
        *("--ema-decay 1", "--max-minutes nan", "--max-minutes 0", "--model resnet", "--task x"),
        *(f"--output {LONG}", f"--data-dir {LONG} --task cifar10", "--patience 3", "--model"),
        *("--output /dev/null/x", "--device tpu", "--precision fp8", "--batch-size 2000"),
        *(f"--init {LONG}", "--init /", "--init /dev/null", "--widen /dev/null", "--eval"),
        *("--eval --checkpoint /dev/null", f"--eval --checkpoint {LONG}", "--no-such-option"),
        *("--img-size 4096 --batch-size 200", "--pretrained --heads 4", "--init a --widen b"),
    ),
    "quantize.py": (
        *(f"--checkpoint {HERE} --recipes none", f"--checkpoint {HERE} --engines none"),
        *(f"--checkpoint {HERE} --latency-runs {10**30}", f"--checkpoint {HERE} --workers 1000000"),
        *(f"--checkpoint {HERE} --img-size 1000000", f"--checkpoint {HERE} --seed {2**64}"),
        *(f"--checkpoint {HERE} --test-images 0", f"--checkpoint {HERE} --output {LONG}"),
        *(f"--checkpoint {HERE} --export /dev/null/x --recipes w4", f"--checkpoint {HERE} {HERE}2"),
        *(f"--checkpoint {HERE} --per-layer --export x", f"--checkpoint {HERE} --model s"),
        *(f"--checkpoint {HERE} --calibration-images {10**20}", f"--checkpoint {HERE} --heads 4"),
        *(f"--checkpoint {HERE} --task imagefolder --data-dir /dev/null", "", "--checkpoint"),
        *(f"--checkpoint {LONG}", "--checkpoint /", f"--from {LONG}", "--from /", "--from"),
        *("--weights x", f"--weights {LONG} --model s", "--weights / --model s", "--model s"),
        *(f"--checkpoint {HERE} --calibration-batches 3", f"--checkpoint {HERE} --force=3"),
        f"--checkpoint {HERE} --recipes fp32 --export OUT",
        *(f"--checkpoint {HERE} --suggest float", f"--checkpoint {HERE} --recipes /dev/x.json"),
        *(
            f"--checkpoint {HERE} --recipes fp32 --profile",
            f"--checkpoint {HERE} --profile --export x",
        ),
    ),
    "plots.py": (
        *(f"--results {LONG}", "--results /dev/null", f"--pages {LONG}", "--pages /dev/null"),
        *("--check --readme", "--checkpoints", "--no-such-option"),
    ),
}


def options(rng: random.Random, stand: Path) -> Iterator[Input]:
    drawn = [(script, text) for script, texts in OPTIONS.items() for text in texts]
    for i, (script, text) in enumerate(rng.sample(drawn, len(drawn))):
        usual = ()
        if script == "train.py" and "--eval" not in text:
            usual = (*SMALL, *OUT)
        elif script == "quantize.py" and "--recipes" in text:
            usual = (*QUICK[2:], *OUT)
        elif script == "plots.py" and "--pages" in text:
            usual = ("--check",)
        command = given([script, *usual, *text.split()], stand / "run" / "best.pth")
        shown_text = text.replace(LONG, "(a name of 300 bytes)").replace(HERE, "A.pth")
        make = lambda folder, command=command: command  # noqa: E731
        yield Input("options", f"{script} {shown_text}", make, own_process=i % 6 == 0)


def surroundings(rng: random.Random, stand: Path) -> Iterator[Input]:
    sizes = ("0", "-1", "1.5", "", "text", "nan", "1e3", "99999999999999999999", "2")
    env = [(("WORLD_SIZE", size),) for size in sizes]
    env += [(("RANK", rank),) for rank in ("-1", "1", "text", "")]
    env.append((("WORLD_SIZE", "2"), ("RANK", "5"), ("LOCAL_RANK", "0"), ("MASTER_ADDR", "x"),
                ("MASTER_PORT", "1")))  # fmt: skip
    env.append((("WORLD_SIZE", "2"), ("RANK", "0"), ("LOCAL_RANK", "0"),
                ("MASTER_ADDR", "127.0.0.1"), ("MASTER_PORT", "text")))  # fmt: skip
    for i, variables in enumerate(env):
        name = " ".join(f"{key}={value}" for key, value in variables)
        make = lambda folder: ["train.py", *SMALL, *OUT]  # noqa: E731
        yield Input("environment", name, make, env=variables, own_process=i % 2 == 0)
