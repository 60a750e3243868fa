"""`quantize.py` on detectors and segmenters: rows, tables, files, and what is refused."""

import numpy as np
import pytest
import torch
from conftest import fails_with_one_line, run
from PIL import ExifTags, Image
from test_coco import annotated
from test_segmentation import NAMES, picture

from lab import files
from lab.cli import BadInput
from lab.models import build
from lab.models.checkpoint import save_checkpoint
from lab.models.foreign import as_checkpoint, family_of
from lab.pictures import COLOURS, draw_boxes, draw_classes
from lab.report import style
from lab.tasks import TASKS
from lab.tasks.batches import EvalBatches
from ptq.methods.norms import replace_norms

SIDE = 64
METRICS = {"detection": "map50_pct", "segmentation": "miou_pct"}


def write_scenes(folder):
    """With objects that fill the picture: some anchor is on them without having learnt it."""
    rng = np.random.default_rng(0)
    for part, n in (("train", 12), ("val", 3), ("test", 6)):
        bboxes = {9: (3, 2, 58, 44), 2: (8, 6, 48, 36)}
        objects = [
            {"image_id": 7 + i, "category_id": kind, "bbox": bbox}
            for i in range(n)
            for kind, bbox in bboxes.items()
        ]
        annotated(folder, part, n, annotations=objects)
        for path in sorted((folder / part).iterdir()):  # all alike so far
            pixels = np.array(Image.open(path)) // 2 + rng.integers(0, 100, (48, 64, 3))
            Image.fromarray(pixels.astype(np.uint8)).save(path)


def write_masks(folder):
    (folder / "classes.txt").write_text("\n".join(NAMES))
    for part, n in (("train", 12), ("val", 3), ("test", 6)):
        for kind in ("images", "labels"):
            (folder / part / kind).mkdir(parents=True)
        for i in range(n):
            for kind, image in zip(("images", "labels"), picture((60, 40 + i), i)):
                image.save(folder / part / kind / f"{i}.png")


WRITERS = {"detection": write_scenes, "segmentation": write_masks}


@pytest.fixture(scope="module", params=METRICS)
def made(request, tmp_path_factory):
    """(task, folder of its images, checkpoint of a network that never learnt)."""
    task, folder = request.param, tmp_path_factory.mktemp(request.param)
    WRITERS[task](folder)
    name = {"detection": "ssdlite_mobilevit_xxs", "segmentation": "deeplab_mobilevit_xxs"}[task]
    images = TASKS[task].load(folder, train=True)
    torch.manual_seed(0)
    network = build(name, num_classes=len(images.classes)).eval()
    replace_norms(network, None, EvalBatches(images, SIDE, 12), None)
    path = folder / "run" / "best.pth"
    path.parent.mkdir()
    checkpoint = as_checkpoint(network, name, family_of(name).layouts[0], images.classes)
    save_checkpoint(path, checkpoint | {"img_size": SIDE})
    return task, folder, path


@pytest.mark.parametrize("task", WRITERS)
def test_a_picture_that_viewers_turn_is_refused(task, tmp_path):
    """What is annotated lies on it as it is stored."""
    WRITERS[task](tmp_path)
    file = TASKS[task].load(tmp_path, train=True).files[2]
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 3  # upside down: the size stays
    Image.open(file).save(file, exif=exif)
    with pytest.raises(BadInput, match=f"{file.name}: its EXIF says to turn it"):
        TASKS[task].load(tmp_path, train=True)


def of(made):
    _, folder, path = made
    return "quantize.py", "--checkpoint", path, "--data-dir", folder


def test_rows_hold_the_metric_of_the_task(made, tmp_path):
    task, folder, path = made
    metric = METRICS[task]
    column = {"detection": "mAP@0.5 %", "segmentation": "mIoU %"}[task]
    command = (*of(made), "--latency-runs", "3", "--output", tmp_path)
    run(*command, "--recipes", "fp32")
    command += ("--recipes", "w8a8")
    out, _ = run(*command)
    rows = {p.stem: files.read_json(p) for p in tmp_path.rglob("*.json")}
    fp32, simulated = (rows.pop(f"{name}-64@torch-eager") for name in ("fp32", "w8a8"))
    assert not rows
    line, _ = run("train.py", "--eval", "--checkpoint", path, "--data-dir", folder)
    assert f"test {fp32['score'][metric]:.2f} %" in line and fp32["score"][metric] > 0
    assert simulated["calibration"]["n"] == 12 and simulated["n_images"] == 6
    assert simulated["size_bytes"] < 0.4 * fp32["size_bytes"]
    assert not {"predictions", "confusion", "n_correct"} & simulated.keys()
    header, *_, last = (line for line in out.splitlines() if line.startswith("|"))
    assert f"| {column} | Δ points | MB |" in header and "w8a8" in last and "changed" not in out
    again, _ = run(*command)
    assert again.count(", kept") == 1
    shipped = next(tmp_path.rglob("fp32-64@torch-eager.json"))
    repeat = ("quantize.py", "--from", shipped, "--data-dir", folder, "--latency-runs", "3")
    repeat += ("--output", tmp_path / "again")
    out, _ = run(*repeat)
    assert f"| {column} | Changed |" in out and "| - |" in out and "| yes |" in out
    fails_with_one_line(*repeat, "--test-images", "2", says="has one score for 6 images")
    files.write_json(shipped, fp32 | {"score": {"map_pct": 3.0}})
    fails_with_one_line(*repeat, says="score lacks accuracy_pct or map50_pct or miou_pct")


def test_an_engine_scores_about_what_the_simulation_does(made, tmp_path):
    """A detector that never learnt ranks its boxes by chance: the next test compares outputs."""
    pytest.importorskip("openvino")
    metric, bound = METRICS[made[0]], {"detection": 20, "segmentation": 3}[made[0]]
    command = (*of(made), "--recipes", "w8a8", "--engines", "torch-eager", "openvino")
    run(*command, "--latency-runs", "3", "--output", tmp_path)
    simulated, measured = (
        files.read_json(next(tmp_path.rglob(f"w8a8-64@{engine}.json")))["score"][metric]
        for engine in ("torch-eager", "openvino")
    )
    assert abs(measured - simulated) < bound


def test_held_out_are_the_images_that_choose_the_weights(made, tmp_path):
    command = (*of(made), "--latency-runs", "3", "--output", tmp_path)
    run(*command, "--recipes", "fp32", "--held-out")
    (path,) = tmp_path.rglob("*.json")
    row = files.read_json(path)
    assert (row["split"], row["n_images"], path.parent.name) == ("held-out", 3, "ablation")


@pytest.mark.parametrize("made", ["detection"], indirect=True)  # masks are compared as boxes are
def test_an_exported_file_gives_what_was_simulated(made, tmp_path):
    pytest.importorskip("openvino")
    out, _ = run(*of(made), "--recipes", "w8a8", "--export", tmp_path)
    assert len(list(tmp_path.iterdir())) == 2
    assert out.count("predicts as simulated on 12 of 12 images") == 8


def test_a_picture_shows_each_network_beside_float(made, tmp_path):
    task, folder, _ = made
    photo = TASKS[task].load(folder, train=False).files[1]
    command = (*of(made), "--recipes", "w8a8", "--image", photo, "--output", tmp_path)
    out, _ = run(*command)
    (path,) = tmp_path.rglob("pictures/1.png")
    assert out == f"{path}\n"
    assert Image.open(path).size[0] == 1275
    fails_with_one_line(*command, says="1.png is there already: --force replaces it")


def test_boxes_and_classes_are_drawn_where_they_are():
    _, (axis, other) = style.plt.subplots(1, 2)
    outputs = torch.tensor([[0, 0, 0, 0, -9, -9, 9, 0.5, 0.5, 0.4, 0.2]])  # on its anchor
    unsure = torch.tensor([[0, 0, 0, 0, 0, 0, 0, 0.2, 0.2, 0.1, 0.1]])
    assert draw_boxes(axis, torch.stack((outputs, unsure), 1), height=100, width=200) == {1}
    (box,) = axis.patches
    assert box.get_bbox().bounds == pytest.approx((60, 40, 80, 20))
    outputs = torch.tensor([[[[9.0, 0]], [[0, 9]]]])  # left and right
    assert draw_classes(other, outputs, height=2, width=4) == {0, 1}
    (drawn,) = other.images
    assert drawn.get_array().shape == (2, 4, 3)
    assert (drawn.get_array()[:, :2] == COLOURS[0]).all()
    style.plt.close()


@pytest.mark.parametrize(
    "options, says",
    [
        (("--per-layer",), "--per-layer is for classifiers"),
        (("--profile",), "--profile is for classifiers"),
        (("--task", "synthetic"), "not for synthetic"),
    ],
)
def test_what_only_classifiers_have_is_refused(made, options, says):
    fails_with_one_line(*of(made), "--recipes", "w8a8", *options, says=says)
