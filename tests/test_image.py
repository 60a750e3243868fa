"""`quantize.py --image`: what networks of three families see in pictures of every kind."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import fails_with_one_line, run
from PIL import Image
from test_imagefolder import picture

from lab.cli import BadInput
from lab.models import build
from lab.models.checkpoint import save_checkpoint
from lab.models.foreign import as_checkpoint, family_of
from lab.pictures import picture_path
from lab.tasks import TASKS
from lab.tasks.cifar10 import to_input
from lab.tasks.photo import thumbnail

CLASSES = TASKS["synthetic"].load(None, train=False).classes
NETWORKS = ("mobilevit_xxs", "vit_cifar", "resnet18")


def save(image, path, **options):
    image.save(path, **options)
    return path


def sideways(path):
    exif = Image.Exif()
    exif[274] = 6  # stored a quarter turn from how it is shown
    return save(picture(), path / "turned.jpg", exif=exif)


PICTURES = {
    "jpeg": lambda path: save(picture(), path / "a.jpg"),
    "CMYK": lambda path: save(picture().convert("CMYK"), path / "a.jpg"),
    "palette": lambda path: save(picture().convert("P"), path / "a.gif"),
    "gray": lambda path: save(picture().convert("L"), path / "a.png"),
    "16 bits": lambda path: save(
        Image.fromarray(np.arange(2400, dtype=np.uint16).reshape(40, 60) * 27), path / "a.png"
    ),
    "turned by EXIF": sideways,
}


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    """{name: a checkpoint of a fresh network, as a run on the synthetic task would write it, and
    the network}."""
    folder, made = tmp_path_factory.mktemp("checkpoints"), {}
    for name in NETWORKS:
        torch.manual_seed(0)
        network = build(name, num_classes=len(CLASSES)).eval()
        *_, bias = network.parameters()
        bias.data.normal_()  # or its classes are all alike
        checkpoint = as_checkpoint(network, name, family_of(name).layouts[0], CLASSES)
        path = folder / name / "best.pth"
        path.parent.mkdir()
        save_checkpoint(path, checkpoint | {"task": "synthetic", "img_size": 32})
        made[name] = path, network
    return made


@pytest.mark.parametrize("name", NETWORKS)
def test_both_predictions_are_printed(name, checkpoints, tmp_path):
    path, network = checkpoints[name]
    image = PICTURES["jpeg"](tmp_path)
    flags = ("--recipes", "w8a8", "--calibration-images", "8", "--image", image)
    out, _ = run("quantize.py", "--checkpoint", path, *flags)
    lines = out.splitlines()
    assert [line.split(":")[0] for line in lines] == [
        f"{name}-synthetic {recipe}@torch-eager" for recipe in ("fp32", "w8a8")
    ]
    with torch.no_grad():
        shares = network(to_input(thumbnail(image)[None], 32))[0].softmax(0)
    best = shares.argsort(descending=True)[:3]
    expected = ", ".join(f"{CLASSES[k]} {100 * shares[k]:.1f} %" for k in best)
    assert lines[0].endswith(f": {expected}")
    assert lines[1].count("%") == 3


@pytest.mark.parametrize("kind", PICTURES)
def test_pictures_of_every_kind_are_taken(kind, checkpoints, tmp_path):
    path, _ = checkpoints["mobilevit_xxs"]
    image = PICTURES[kind](tmp_path)
    out, _ = run("quantize.py", "--checkpoint", path, "--recipes", "fp32", "--image", image)
    assert len(out.splitlines()) == 1 and out.count("%") == 3


def test_a_picture_that_is_none_gets_one_line(checkpoints, tmp_path):
    path, _ = checkpoints["mobilevit_xxs"]
    (tmp_path / "text.jpg").write_text("no picture")
    (tmp_path / "cut.jpg").write_bytes(PICTURES["jpeg"](tmp_path).read_bytes()[:500])
    for name, says in {
        "text.jpg": "is not an image of a kind that can be read",
        "cut.jpg": "can't be read as an image",
        "none.jpg": "no image file at",
        ".": "no image file at",
    }.items():
        command = ("--checkpoint", path, "--recipes", "w8a8", "--image", tmp_path / name)
        fails_with_one_line("quantize.py", *command, says=says)


@pytest.mark.parametrize(
    "option",
    [
        *(("--held-out",), ("--test-images", "5"), ("--export", "x"), ("--per-layer",)),
        ("--latency-runs", "5"),
    ],
)
def test_options_that_do_nothing_to_a_picture_are_refused(option):
    command = ("--checkpoint", "a.pth", "--image", "b.jpg", *option)
    fails_with_one_line("quantize.py", *command, says="exclude")


def test_of_a_task_of_which_nothing_is_drawn_there_is_no_picture(tmp_path):
    subject = SimpleNamespace(task="depth", folder="a")
    with pytest.raises(BadInput, match="--image: nothing is drawn of what networks for depth"):
        picture_path(subject, "a.jpg", str(tmp_path), force=False)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_an_engine_that_is_missing_is_left_out(checkpoints, tmp_path):
    path, _ = checkpoints["mobilevit_xxs"]
    image, engines = PICTURES["jpeg"](tmp_path), ("--engines", "torch-eager", "tensorrt")
    command = ("--checkpoint", path, "--recipes", "fp32", "--image", image, *engines)
    out, _ = run("quantize.py", *command)
    assert out.splitlines()[1].endswith(
        "left out, TensorRT needs an NVIDIA GPU, and torch sees none"
    )
