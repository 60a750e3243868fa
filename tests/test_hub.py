"""The torch.hub entry points, loaded as a user loads them."""

import subprocess
import sys

import pytest
import torch
from conftest import ROOT
from torchvision.transforms.v2.functional import to_pil_image

from lab.models.checkpoint import model_from_checkpoint
from lab.tasks import photo
from lab.tasks.cifar10 import CLASSES, to_input
from mobilevit import VARIANTS, MobileViT

LOAD = f"torch.hub.load({str(ROOT)!r}, 'mobilevit_xxs', source='local', pretrained=True)"


def load(name, **kwargs):
    return torch.hub.load(str(ROOT), name, source="local", **kwargs)


def python(folder, code):
    """What a script in `folder` prints that runs `code`."""
    (folder / "main.py").write_text(code)
    command = [sys.executable, "main.py"]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_variant_can_be_had_untrained(variant):
    model = load(f"mobilevit_{variant}", num_classes=7)
    assert isinstance(model, MobileViT) and (model.variant, model.num_classes) == (variant, 7)


@pytest.mark.parametrize("variant", VARIANTS)
def test_pretrained_is_the_shipped_checkpoint(variant):
    model = load(f"mobilevit_{variant}", pretrained=True)
    shipped, _ = model_from_checkpoint(ROOT / "checkpoints" / f"mobilevit_{variant}" / "best.pth")
    x = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        assert torch.equal(model(x), shipped(x)) and not model.training


def test_from_image_file_to_class_name(tmp_path):
    model = load("mobilevit_xxs", pretrained=True)
    to_pil_image(torch.randint(256, (3, 90, 120), dtype=torch.uint8)).save(tmp_path / "photo.jpg")
    with torch.inference_mode():
        logits = model(to_input(photo.thumbnail(tmp_path / "photo.jpg")[None], 256))
    assert logits.shape == (1, len(CLASSES)) and logits.isfinite().all()


def test_shipped_weights_have_ten_classes():
    with pytest.raises(ValueError, match="10 classes, not 7"):
        load("mobilevit_xxs", pretrained=True, num_classes=7)


@pytest.mark.parametrize("when", ["before", "after"])
def test_a_projects_own_modules_stay_its_own(tmp_path, when):
    names = ("mobilevit", "lab", "ptq", "weights", "rows")
    for name in names[1:3]:
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text("MINE = 'theirs'\n")
    for name in (names[0], *names[3:]):
        (tmp_path / f"{name}.py").write_text("MINE = 'theirs'\n")
    theirs = f"import {', '.join(names)}\n"
    before, after = (theirs, "") if when == "before" else ("", theirs)
    printed = python(
        tmp_path,
        f"import pickle, sys, torch\n{before}path = list(sys.path)\nmodel = {LOAD}\n"
        f"assert sys.path == path\n{after}"
        "assert type(pickle.loads(pickle.dumps(model))) is type(model)\n"
        f"print(*(m.MINE for m in ({', '.join(names)})))\n",
    )
    assert printed == ["theirs"] * len(names)


def test_where_mobilevit_can_be_imported_the_network_is_of_its_class(tmp_path):
    found = python(
        tmp_path,
        f"import sys, torch\nsys.path.append({str(ROOT)!r})\nmodel = {LOAD}\n"
        "import mobilevit\nprint(type(model) is mobilevit.MobileViT)\n",
    )
    assert found == ["True"]
