"""Scenes from annotation files, under augmentation, and detectors trained on them."""

import csv
import json

import pytest
import torch
from conftest import run
from PIL import Image, ImageDraw

from lab import files
from lab.cli import BadInput
from lab.models.checkpoint import load_checkpoint, save_checkpoint
from lab.tasks import coco
from lab.tasks.augment import Augmentation
from lab.tasks.batches import TrainBatches
from lab.tasks.detection import batch
from lab.training.options import parse_args
from lab.training.schedule import Stage
from lab.training.start import fresh_model, network_settings

pytest.importorskip("pycocotools")

BOXES = {"red": (8, 16, 24, 16), "blue": (40, 8, 16, 32)}  # x, y, width, height of 64 x 48 pixels


def annotated(folder, part, n, **changes):
    """Write `n` pictures of a red and a blue box on grey, and their annotations."""
    (folder / part).mkdir(parents=True)
    images = [{"id": 7 + i, "file_name": f"{i}.png", "width": 64, "height": 48} for i in range(n)]
    annotations = [
        {"image_id": 7 + i, "category_id": kind, "bbox": list(box), "iscrowd": 0}
        for i in range(n)
        for kind, box in zip((9, 2), BOXES.values())
    ]
    categories = [{"id": 9, "name": "red"}, {"id": 2, "name": "blue"}]
    for i in range(n):
        picture = Image.new("RGB", (64, 48), "grey")
        for colour, (x, y, w, h) in BOXES.items():
            ImageDraw.Draw(picture).rectangle((x, y, x + w - 1, y + h - 1), colour)
        picture.save(folder / part / f"{i}.png")
    content = {"images": images, "annotations": annotations, "categories": categories} | changes
    (folder / f"{part}.json").write_text(json.dumps(content))
    return content


@pytest.fixture(scope="module")
def scenes(tmp_path_factory):
    folder = tmp_path_factory.mktemp("scenes")
    for part, n in (("train", 12), ("val", 3), ("test", 4)):
        annotated(folder, part, n)
    return folder


def test_boxes_are_fractions_and_classes_follow_the_ids(scenes):
    train = coco.load(scenes, train=True)
    assert (len(train), train.classes) == (12, ("blue", "red"))
    assert (len(coco.load_val(scenes)), len(coco.load(scenes, train=False))) == (3, 4)
    expected = [
        [8 / 64, 16 / 48, 32 / 64, 32 / 48, 1, 0],
        [40 / 64, 8 / 48, 56 / 64, 40 / 48, 0, 0],
    ]
    assert torch.allclose(train.labels[3], torch.tensor(expected))
    x = train[2:4].inputs(32)
    assert x.shape == (2, 3, 32, 32)
    assert x[0, :, 16, 10].tolist() == [1, 0, 0] and x[0, :, 16, 24].tolist() == [0, 0, 1]


def test_what_lies_outside_or_has_no_area_is_left_out(tmp_path):
    def box(image, *bbox, **more):
        return {"image_id": image, "category_id": 2, "bbox": bbox, **more}

    content = annotated(
        tmp_path,
        "train",
        4,
        annotations=[
            *(box(7, -10, -10, 26, 34), box(7, 60, 40, 100, 100)),  # cut off at the edges
            *(box(7, 70, 0, 5, 5), box(7, 5, 5, 0, 9), box(7, 5, 5, -3, 9)),
            box(7, 60, 10, 1e-7, 20),  # of no width in float32
            box(8, 64, 0, 5, 5),
            *(box(9, 0, 0, 64, 48, iscrowd=1), box(9, 0, 0, 32, 48)),
            box(10, 0, 0, 64, 48, iscrowd=1),
        ],
    )
    train = coco.load(tmp_path, train=True)
    # Neither the image whose only box is outside nor the one of a crowd alone.
    assert [file.name for file in train.files] == ["0.png", "2.png"]
    rows = [row[row[:, 4] >= 0] for row in train.labels]
    expected = [[0, 0, 0.25, 0.5], [60 / 64, 40 / 48, 1, 1]]
    assert torch.allclose(rows[0][:, :4], torch.tensor(expected))
    assert rows[1][:, 5].tolist() == [1, 0]
    _, targets = TrainBatches(batch, train, 2, 0, Augmentation("none"), stages=STAGES)[0]
    assert sorted((targets[..., 4] >= 0).sum(1).tolist()) == [1, 2]  # without the crowd
    (tmp_path / "train").rename(tmp_path / "test")
    (tmp_path / "test.json").write_text(json.dumps(content))
    assert len(coco.load(tmp_path, train=False)) == 4  # an image without objects judges, too


def test_settings_make_the_network():
    settings = network_settings(["first_stride=8", "heads=1,1,1"])
    assert settings == {"first_stride": 8, "heads": [1, 1, 1]} and network_settings(None) == {}
    model = fresh_model("ssdlite_mobilevit_xxs", 3, None, 0, [64], settings)
    assert (model.first_stride, model.num_classes) == (8, 3)
    for unknown in ("stride", "name"):
        with pytest.raises(BadInput, match="can't be built"):
            fresh_model("ssdlite_mobilevit_xxs", 3, None, 0, [64], {unknown: 8})
    with pytest.raises(BadInput, match="says already how many"):
        fresh_model("ssdlite_mobilevit_xxs", 3, 2, 0, [64], settings)


STAGES = [Stage(64, 64, 1), Stage(96, 96, 1)]


def test_boxes_stay_on_their_objects(scenes):
    train = coco.load(scenes, True)
    batches = TrainBatches(batch, train, 12, 0, Augmentation("ssd"), stages=STAGES)
    shapes = set()
    for step in range(2):
        images, targets = batches[step]
        assert images.dtype == torch.uint8 and images.shape == (12, 3, *[STAGES[step].side] * 2)
        for image, rows in zip(images.float(), targets):
            assert (rows[:, 4] >= 0).any()
            for x1, y1, x2, y2, kind, _ in rows[rows[:, 4] >= 0].tolist():
                shapes.add(round((x2 - x1) / (y2 - y1), 1))
                coloured = image[2] > image[0] if kind == 0 else image[0] > image[2]
                coloured &= (image.amax(0) - image.amin(0)) > 25  # grey has none, its jitter little
                y, x = coloured.nonzero(as_tuple=True)
                edges = (x.min(), y.min(), x.max() + 1, y.max() + 1)
                for edge, ours in zip(edges, (x1, y1, x2, y2)):
                    assert abs(edge - ours * image.shape[-1]) <= 4  # blurred by enlarging
    assert len(shapes) > 5  # crops of many shapes


def test_batches_hang_on_the_step_alone_and_are_shared_out(scenes):
    def batches(*share):
        train = coco.load(scenes, True)
        return TrainBatches(batch, train, 6, 3, Augmentation("ssd"), *share, stages=STAGES)

    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    images, targets = batches()[3]
    assert torch.equal(torch.rand(3), expected)  # the global generator is left alone
    again, _ = batches()[3]
    assert torch.equal(images, again) and not torch.equal(images, batches()[2][0])
    for rank in range(2):
        part, part_targets = batches(rank, 2)[3]
        assert torch.equal(part, images[rank::2]) and torch.equal(part_targets, targets[rank::2])


@pytest.mark.parametrize(
    "changes, says",
    [
        ({"images": []}, "has 0 images and 2 categories"),
        ({"categories": []}, "has 2 images and 0 categories"),
        ({"annotations": {}}, "annotations is dict, but should be a list"),
        ({"categories": [{"id": 2, "name": "a"}] * 2}, "two categories have the same id"),
        ({"categories": [{"id": i, "name": "a"} for i in (2, 9)]}, "have the same name"),
        ({"annotations": [{"image_id": 1, "category_id": 2, "bbox": [0] * 4}]}, "has image_id 1"),
        ({"annotations": [{"image_id": 7, "category_id": 3, "bbox": [0] * 4}]}, "category_id 3"),
        ({"annotations": [{"image_id": 7, "category_id": 2, "bbox": [0] * 3}]}, "a list of 4"),
        ({"annotations": []}, "has no box of any area"),
    ],
)
def test_bad_annotations_are_one_line(changes, says, tmp_path):
    annotated(tmp_path, "train", 2, **changes)
    with pytest.raises(BadInput, match=rf"train.json.*{says}"):
        coco.load(tmp_path, train=True)


def test_missing_and_wrong_files_are_one_line(tmp_path):
    annotated(tmp_path, "train", 2)
    with pytest.raises(BadInput, match="no annotations at .*val.json"):
        coco.load_val(tmp_path)
    Image.new("RGB", (48, 64)).save(tmp_path / "train" / "1.png")
    with pytest.raises(BadInput, match=r"1.png has 48x64 pixels, its annotations say 64x48"):
        coco.load(tmp_path, train=True)
    (tmp_path / "train" / "0.png").unlink()
    with pytest.raises(BadInput, match=r"no image at .*0.png, .* \(1 are missing\)"):
        coco.load(tmp_path, train=True)


def test_a_detector_learns_and_is_judged(scenes, checkpoint, tmp_path):
    detects = ("--task", "detection", "--data-dir", scenes, "--model", "ssdlite_mobilevit_xxs")
    small = ("--img-size", "64", "--batch-size", "6", "--epochs", "2", "--warmup-epochs", "0.5")
    more = ("--settings", "first_stride=8", "--init", checkpoint, "--output", tmp_path / "out")
    out, _ = run("train.py", *detects, *small, *more)
    assert "mAP@0.5 (blue " in out and "4 images)" in out
    with (tmp_path / "out" / "log.csv").open() as file:
        first, last = csv.DictReader(file)
    assert {"train_matched_pct", "val_map50_pct"} < first.keys()
    assert float(last["train_loss"]) < float(first["train_loss"])
    metrics = files.read_json(tmp_path / "out" / "metrics.json")
    assert metrics["ap50_pct"].keys() == {"blue", "red"} and metrics["n_images"] == 4
    best = load_checkpoint(tmp_path / "out" / "best.pth")
    assert best["test_map50_pct"] == metrics["test_map50_pct"] and "val_accuracy_pct" not in best
    assert best["settings"]["first_stride"] == 8 and best["config"]["val_size"] is None
    line, _ = run(
        "train.py", "--eval", "--checkpoint", tmp_path / "out" / "best.pth", "--data-dir", scenes
    )
    assert line.split("test ")[1] == out.splitlines()[-1].split("test ")[1] + "\n"
    save_checkpoint(tmp_path / "a.pth", {k: v for k, v in best.items() if k != "val_map50_pct"})
    with pytest.raises(BadInput, match="a.pth lacks val_map50_pct"):
        load_checkpoint(tmp_path / "a.pth")


@pytest.mark.parametrize(
    "flags, says",
    [
        (("--model", "mobilevit_xxs"), "--task detection is not for mobilevit_xxs: choose from"),
        (("--task", "synthetic"), "ssdlite_mobilevit_xxs is for --task detection"),
        (("--augment", "autoaugment"), "--augment autoaugment is not for --task detection"),
        (("--mixup", "0.2"), "--mixup is not for --task detection"),
        (("--val-size", "5"), "--val-size is not for --task detection"),
        (("--resolutions", "64/128:2"), "windows"),
        (("--batch-size", "1"), "--batch-size 1 is not for --task detection"),
        (("--settings", "first_stride=x"), "give NAME=NUMBER"),
        (("--settings", "num_classes=3"), "the images say how many classes"),
    ],
)
def test_options_that_are_not_for_detection_are_refused(flags, says, monkeypatch, capsys):
    detects = ("--task", "detection", "--model", "ssdlite_mobilevit_xxs", "--warmup-epochs", "0.5")
    monkeypatch.setattr("sys.argv", ["train.py", *detects, *flags])
    with pytest.raises((SystemExit, BadInput)) as refused:
        network_settings(parse_args("train").settings)
    assert says in capsys.readouterr().err + str(refused.value)
