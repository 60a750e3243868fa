"""Malformed checkpoints, weights, packed files and calibration batches.

Every kind is a generator (random source, stand) -> Inputs; `stand` is the folder of intact files.
"""

import itertools
import json
import math
import random
import warnings
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import ptq
from lab.bench.forked import library
from lab.bench.malformed import (
    HERE,
    MISSING,
    OUT,
    QUICK,
    SMALL,
    Input,
    changed,
    in_words,
    nested,
    of_file,
    shown,
    spoil,
    wrong_fields,
)
from lab.engines import published
from lab.models import build
from lab.models.checkpoint import load_checkpoint, read_tensors
from ptq import packing

# Checkpoints


def _readers(rng) -> tuple:
    return rng.choice(
        [
            ("train.py", "--eval", "--checkpoint", HERE),
            ("train.py", *SMALL, "--init", HERE, *OUT),
            ("train.py", *SMALL, "--model", "xs", "--widen", HERE, *OUT),
            ("quantize.py", "--checkpoint", HERE, *QUICK, *OUT),
        ]
    )


def _of_content(kind, name, content, command) -> Input:
    return of_file(kind, name, partial(torch.save, content), command)


def checkpoint_fields(rng: random.Random, stand: Path) -> Iterator[Input]:
    kind, good = "checkpoints: fields", read_tensors(stand / "run" / "best.pth")
    top = {k: v for k, v in good.items() if k not in ("state_dict", "epoch", "commit")}
    fixed = [
        (("format",), 3), (("format",), torch.zeros(2)), (("model",), "resnet"),
        (("settings",), [1]), (("settings", "heads"), [1.0, 1.0, 1.0]),
        (("settings", "heads"), [3, 3, 3]), (("settings", "heads"), [0, 0, 0]),
        (("settings", "heads"), [10**30] * 3), (("settings", "num_classes"), 10**12),
        (("settings", "depth"), 3), (("classes",), ["a"]), (("img_size",), 0),
        (("img_size",), 10**9), (("img_size",), -32), (("task",), "../../etc"),
        (("config", "init"), nested(300)), (("val_accuracy_pct",), 1e30),
    ]  # fmt: skip
    checked = ("model", "settings", "task", "classes", "img_size", "config")
    drawn = [
        (place, wrong)
        for place, wrong in wrong_fields(top)
        if place[0] in checked and not (place[0] == "config" and len(place) > 1)
    ]
    rng.shuffle(drawn)
    for change in (*fixed, *drawn):
        yield _of_content(kind, in_words(*change), changed(good, *change), _readers(rng))
    calibrated = ("--recipes", "w8a8", "--calibration-images", "8", *QUICK[2:])
    for wrong in ("200", 10**12, -5, 1.5, [200], math.nan, True, nested(300)):
        content = changed(good, ("config", "val_size"), wrong)
        for more in (calibrated, (*QUICK, "--held-out")):
            command = ("quantize.py", "--checkpoint", HERE, *more, *OUT)
            name = f"config.val_size is {shown(wrong)}, {more[-1]}"
            yield _of_content(kind, name, content, command)


def _quantized(x):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it is deprecated
        return torch.quantize_per_tensor(x, 0.1, 0, torch.qint8)


def checkpoint_tensors(rng: random.Random, stand: Path) -> Iterator[Input]:
    kind, good = "checkpoints: tensors", read_tensors(stand / "run" / "best.pth")
    names = [n for n, t in good["state_dict"].items() if t.is_floating_point() and t.numel() > 8]
    wrongs = {
        "NaN": lambda t: torch.full_like(t, math.nan),
        "infinite": lambda t: t / 0,
        "complex": lambda t: t + 0j,
        "int8": lambda t: t.to(torch.int8),
        "bool": lambda t: t > 0,
        "sparse": lambda t: t.to_sparse(),
        "quantized": _quantized,
        "of another shape": lambda t: t[1:],
        "flat": lambda t: t.flatten()[:-1],
        "empty": lambda t: t[:0],
        "10**12 of one number": lambda t: torch.zeros(1).expand(10**12),
        "None": lambda t: None,
        "a list": lambda t: t.flatten()[:3].tolist(),
        "missing": lambda t: MISSING,
        "under a number": lambda t: 7,
    }
    more = good["state_dict"] | {"more": torch.ones(1)}
    for wrong in ([], None, {}, {3: torch.zeros(1)}, {"a": {}}, more):
        content = good | {"state_dict": wrong}
        yield _of_content(kind, f"state_dict is {shown(wrong)}", content, _readers(rng))
    for what, of in itertools.cycle(wrongs.items()):
        name = rng.choice(names)
        content = changed(good, ("state_dict", name), of(good["state_dict"][name]))
        yield _of_content(kind, f"{name} is {what}", content, _readers(rng))


class Attack:
    """Pickled, it would make a file when it is read by a reader that runs code."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


def archives(rng: random.Random, stand: Path) -> Iterator[Input]:
    kind, good = "checkpoints: archives", stand / "run" / "best.pth"
    for wrong in ([], 3, torch.zeros(3), None, {}, {"state_dict": 3}, nested(300), {"format": 2}):
        yield _of_content(kind, f"holds {shown(wrong)}", wrong, _readers(rng))

    def pickled(folder):
        torch.save({"format": 2, "state_dict": Attack(folder / "out" / "run")}, folder / "bad.pth")
        (folder / "out").mkdir()
        return ["train.py", "--eval", "--checkpoint", folder / "bad.pth"]

    yield Input(kind, "a pickled call", pickled)
    network = partial(torch.save, build("mobilevit_xxs"))
    yield of_file(kind, "a pickled network", network, ("train.py", "--eval", "--checkpoint", HERE))
    for how in ("empty", "zeros", "a folder", "nothing at all", "a number", "half"):
        yield of_file(kind, f"is {how}", partial(spoil, good, how), _readers(rng))
    content = good.read_bytes()

    def flip(bit, path):
        flipped = bytearray(content)
        flipped[bit // 8] ^= 1 << bit % 8
        path.write_bytes(flipped)

    def compare(path):
        """Read the file, which must be refused or give the same tensors and values."""
        ours, theirs = load_checkpoint(good), load_checkpoint(path)
        states = ours.pop("state_dict"), theirs.pop("state_dict")
        equal = states[0].keys() == states[1].keys()
        assert equal and all(torch.equal(t, states[1][n]) for n, t in states[0].items())
        assert ours == theirs

    def same(path):
        return library(partial(compare, path))

    while True:
        bit, end = rng.randrange(8 * len(content)), rng.randrange(len(content))
        yield of_file(kind, f"bit {bit} flipped", partial(flip, bit), same, may_pass=True)
        cut = lambda path, end=end: path.write_bytes(content[:end])  # noqa: E731
        yield of_file(kind, f"cut off at byte {end}", cut, _readers(rng))


# Files of weights


def packed(rng: random.Random, stand: Path) -> Iterator[Input]:
    kind, good = "packed files", stand / "packed.safetensors"
    tensors = load_file(good)
    with safe_open(good, "pt") as file:
        header = file.metadata()
    recipe = json.loads(header["recipe"])

    def load(path):
        return library(lambda: packing.load(path, build("mobilevit_xxs", num_classes=10)))

    reading = partial(of_file, kind, run=load, file="bad.safetensors")

    def saved(name, tensors=tensors, header=header):
        return reading(name, partial(save_file, tensors, metadata=header))

    def of_recipe(name, recipe):
        return saved(name, header=header | {"recipe": json.dumps(recipe)})

    layer = "layers", 0
    evil = ("(a+)+$", "(a|a)*b", "[", "(", "*", "(?P<n", "a{1,99}{1,99}{1,99}", "(.*)(.*)(.*)(.*)x",
            ".*" * 20 + "x", "(?=(a+))*b", None, 3, [])  # fmt: skip
    for pattern in evil:
        yield of_recipe(f"pattern {pattern}", changed(recipe, (*layer, "pattern"), pattern))
    for wrong in (0, -1, 1, 64, 10**9, "4", 4.0, None, True):
        yield of_recipe(f"bits is {wrong}", changed(recipe, (*layer, "weight", "bits"), wrong))
    for key, wrong in itertools.product(
        sorted(header), (MISSING, "", "null", "[", "3", "[" * 10_000)
    ):
        yield saved(f"{key} is {wrong[:9]}", header=changed(header, (key,), wrong))
    for how in ("empty", "zeros", "a folder", "nothing at all", "half"):
        yield reading(f"is {how}", partial(spoil, good, how))
    scales = [n for n in tensors if n.endswith(".scale")]
    codes = [n for n in tensors if n.endswith(".codes")]
    wrongs = {
        "NaN": lambda t: torch.full_like(t, math.nan),
        "zero": torch.zeros_like,
        "negative": lambda t: -t,
        "infinite": lambda t: t / 0,
        "float64": lambda t: t.double(),
        "int32": lambda t: t.int(),
        "a column": lambda t: t[:, None],
        "one too few": lambda t: t[1:],
        "empty": lambda t: t[:0].clone(),
    }
    drawn = [*itertools.product(scales, wrongs)]
    drawn += itertools.product(codes, ("float64", "int32", "a column", "empty"))
    for name, what in rng.sample(drawn, len(drawn)):
        yield saved(f"{name} is {what}", tensors | {name: wrongs[what](tensors[name]).contiguous()})


def foreign(rng: random.Random, stand: Path) -> Iterator[Input]:
    kind = "weights of other projects"
    good = load_file(stand / "two-classes.safetensors")

    photos = ("--task", "imagefolder", "--data-dir", stand / "photos")

    def reading(name, content, *options, save=torch.save, file="bad.pth"):
        model = () if "--model" in options else ("--model", "xxs")
        command = ("quantize.py", "--weights", HERE, *model, *photos, *options, *QUICK, *OUT)
        return of_file(kind, name, partial(save, content), command, file)

    safe = {"save": save_file, "file": "bad.safetensors"}

    weight, bias = "classifier.weight", "classifier.bias"
    for name, content in {
        "nothing": {}, "a list": [], "a number": 3, "a tensor": torch.zeros(3),
        "numbers as names": dict(enumerate(good.values())),
        "names of another network": {f"layer{i}.0.conv": t for i, t in enumerate(good.values())},
        "a wrapper in a wrapper": {"state_dict": {"state_dict": {"model": {}}}},
        "a network as it is": build("mobilevit_xxs"),
        "NaN": good | {weight: good[weight] * math.nan},
        "integers": {n: t.int() for n, t in good.items()},
        "complex numbers": {n: t + 0j for n, t in good.items()},
        "texts": {n: "text" for n in good},
        "no classifier": {n: t for n, t in good.items() if "classifier" not in n},
        "a flat classifier": good | {weight: good[weight].flatten()},
        "a classifier of no class": good | {weight: good[weight][:0], bias: good[bias][:0]},
        "a scalar": good | {"stem.conv.weight": torch.tensor(1.0)},
        "one tensor too many": good | {"head.more": torch.zeros(1)},
        "an unknown prefix": {f"net.{n}": t for n, t in good.items()},
        "other classes": good | {weight: good[weight].repeat(3, 1), bias: good[bias].repeat(3)},
        "our checkpoint": read_tensors(stand / "run" / "best.pth"),
    }.items():  # fmt: skip
        yield reading(name, content)
    for options in (("--model", "xs"), ("--heads", "7"), ("--heads", str(2**31 - 1))):
        yield reading(" ".join(options), good, *options)
    yield reading("a scalar, safetensors", {weight: torch.tensor(1.0)}, **safe)
    for name, tensor in rng.sample(sorted(good.items()), 12):
        if tensor.dim():
            yield reading(f"{name} cut", good | {name: tensor[1:]}, **safe)


def refused_by_methods(rng: random.Random, stand: Path) -> Iterator[Input]:
    """Yield what shows while a network is quantized: numbers that overflow, what is no batch."""
    kind = "weights and batches that overflow"

    def quantizing(name, recipe, batches):
        def make(folder):
            model = build("mobilevit_xxs", num_classes=10).eval()
            return library(lambda: ptq.quantize(model, ptq.recipe(recipe, model), batches))

        return Input(kind, f"{recipe}: {name}", make)

    huge = [(torch.randn(4, 3, 32, 32) * 1e30, 0)]
    for recipe in ("w8a8", "w4-gptq", "w4a8", "w4"):
        yield quantizing("images of 1e30", recipe, huge)
    yield quantizing("uint8 images", "w8a8", [(torch.zeros(4, 3, 32, 32).byte(), 0)])
    yield quantizing("float64 images", "w8a8", [(torch.zeros(4, 3, 32, 32).double(), 0)])
    yield quantizing("NaN images", "w8a8", [(torch.full((4, 3, 32, 32), math.nan), 0)])
    yield quantizing("images of one channel", "w8a8", [(torch.zeros(4, 1, 32, 32), 0)])
    yield quantizing("no images", "w8a8", [])
    yield quantizing("None", "w8a8", None)

    model = build("mobilevit_xxs", num_classes=10).eval()
    model.stages[1][0].expand.norm.running_var[0] = 7e4
    convert = library(lambda: published.load(model, ptq.RECIPES["fp16"], None, None))
    yield Input(kind, "fp16: a variance of 70,000", lambda folder: convert)
