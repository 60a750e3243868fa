"""What the splits of a data set must have in common, and with the network that reads them."""

import pytest
import torch
from PIL import Image
from test_coco import annotated

from lab import files
from lab.cli import BadInput
from lab.models import build
from lab.models.checkpoint import save_checkpoint
from lab.models.foreign import as_checkpoint, family_of
from lab.subject import as_known, load_subject
from lab.tasks import coco, imagefolder
from lab.training.evaluation import score_on_test_set
from lab.training.start import training_data

pytest.importorskip("pycocotools")

SWAPPED = [{"id": 2, "name": "red"}, {"id": 9, "name": "blue"}]  # the names of each other
RENAMED = [{"id": 2, "name": "blue"}, {"id": 9, "name": "green"}]


@pytest.fixture
def folder(tmp_path):
    for part, n in (("train", 4), ("val", 2), ("test", 2)):
        annotated(tmp_path, part, n)
    return tmp_path


def recategorise(path, categories):
    """Give annotations other categories; boxes of those that go go as well."""
    content = files.read_json(path)
    kept = [a for a in content["annotations"] if a["category_id"] in {c["id"] for c in categories}]
    files.write_json(path, content | {"categories": categories, "annotations": kept})


@pytest.mark.parametrize(
    "categories, says",
    [
        (SWAPPED, "class 0 is 'blue' in {}, but 'red' in {}"),
        (RENAMED, "class 1 is 'red' in {}, but 'green' in {}"),
        (RENAMED[:1], "2 classes in {}, but 1 in {}"),
    ],
)
def test_splits_of_other_classes_are_refused(categories, says, folder, tmp_path):
    train = coco.load(folder, train=True)
    path = tmp_path / "best.pth"
    torch.manual_seed(0)
    name = "ssdlite_mobilevit_xxs"
    network = build(name, num_classes=2).eval()
    checkpoint = as_checkpoint(network, name, family_of(name).layouts[0], train.classes)
    save_checkpoint(path, checkpoint | {"img_size": 64})
    for part, images in (("val", "the validation images"), ("test", "the test images")):
        recategorise(folder / f"{part}.json", categories)
        with pytest.raises(BadInput, match=says.format("the training images", images)):
            training_data(coco, folder, None, 1)
    with pytest.raises(BadInput, match=says.format(path, "the test images")):
        score_on_test_set(path, folder, "cpu")
    with pytest.raises(BadInput, match=f"{says.split('{')[0]}|1 classes, the network tells 2"):
        load_subject(path, str(folder))


def test_folders_name_all_classes_as_the_network_does_or_none():
    known = ("airplane", "automobile", "bird")
    checkpoint = {"task": "synthetic", "classes": known}

    def found(*names):
        photos = imagefolder.Photos(("a.jpg",) * 3, torch.arange(3), names)
        return as_known(photos, "imagefolder", checkpoint)

    assert found("bird", "airplane", "automobile").labels.tolist() == [2, 0, 1]
    assert found("n01", "n02", "n03").labels.tolist() == [0, 1, 2]
    with pytest.raises(BadInput, match="has a class plane, which .*: airplane, automobile, bird"):
        found("automobile", "bird", "plane")


@pytest.mark.parametrize(
    "spoil, says",
    [
        (lambda d: (d / "test.json").unlink(), "no annotations at .*test.json"),
        (lambda d: (d / "test/1.png").unlink(), "no image at .*test/1.png"),
        (lambda d: (d / "test/1.png").write_text("no picture"), "1.png can't be read as an image"),
        (lambda d: Image.new("RGB", (8, 9)).save(d / "test/1.png"), "1.png has 8x9 pixels, its"),
    ],
)
def test_faults_of_the_test_images_show_before_the_training(spoil, says, folder):
    spoil(folder)
    with pytest.raises(BadInput, match=says):
        training_data(coco, folder, None, 1)
