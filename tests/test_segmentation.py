"""Segmentation: pictures with masks in, crops, the metric against torchmetrics, a run."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import fails_with_one_line, run
from PIL import Image

from lab.cli import BadInput
from lab.models.checkpoint import read_tensors
from lab.tasks import masks, segmentation
from lab.tasks.augment import Augmentation
from lab.tasks.batches import EvalBatches, TrainBatches
from lab.tasks.sampler import Sampler
from lab.tasks.segmentation import IGNORED, OUTSIDE, judge, scaled_crop, score
from lab.training.run import Run
from lab.training.schedule import Stage

NAMES = ("sky", "void", "road")


def picture(size=(60, 40), seed=0):
    """A picture whose upper part is sky (0), with a line of void (1) above the road (2)."""
    width, height = size
    rng = np.random.default_rng(seed)
    horizon = int(rng.integers(height // 4, 3 * height // 4))
    mask = np.full((height, width), 2, np.uint8)
    mask[:horizon], mask[horizon] = 0, 1
    image = np.where(mask[..., None] == 0, (90, 140, 250), (120, 110, 100))
    return Image.fromarray(image.astype(np.uint8)), Image.fromarray(mask)


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "classes.txt").write_text("\n".join(NAMES) + "\n")
    for part, n in (("train", 8), ("val", 3), ("test", 3)):
        for kind in ("images", "labels"):
            (tmp_path / part / kind).mkdir(parents=True)
        for i in range(n):
            image, mask = picture((60, 40) if i else (50, 44), i)
            image.save(tmp_path / part / "images" / f"{i}.jpg")
            mask.save(tmp_path / part / "labels" / f"{i}.png")
    return tmp_path


def test_masks_are_classes_without_void_filled_up_to_one_size(folder):
    data = masks.load(folder, train=True)
    assert (len(data), data.classes) == (8, ("sky", "road"))
    labels = data.labels
    assert labels.shape == (8, 44, 60)
    assert (labels[0, :, 50:] == OUTSIDE).all() and (labels[1, 40:] == OUTSIDE).all()
    assert set(labels[0, :, :50].unique().tolist()) == {0, 1, IGNORED}
    assert torch.equal(data[2:4].labels, labels[2:4, :40])


def test_names_may_have_a_byte_order_mark_and_blank_lines_behind_them(folder):
    (folder / "classes.txt").write_bytes(b"\xef\xbb\xbfsky\r\nvoid\r\nroad\r\n \r\n\r\n")
    assert masks.load(folder, train=True).classes == ("sky", "road")


def test_voc_folders_give_the_same(folder, tmp_path):
    plain = masks.load(folder, False)
    for name in ("JPEGImages", "SegmentationClass", "ImageSets/Segmentation"):
        (folder / name).mkdir(parents=True)
    for file, mask in zip(plain.files, plain.masks):
        file.rename(folder / "JPEGImages" / file.name)
        image = Image.open(mask)
        image.putpalette([0, 0, 0, 9, 9, 9, 128, 64, 128])  # VOC's masks have colours
        image.save(folder / "SegmentationClass" / mask.name)
    (folder / "ImageSets/Segmentation/test.txt").write_text("0\n1\n2\n")
    labels = plain.labels
    voc = masks.load(folder, False)
    assert voc.files[0].parent.name == "JPEGImages" and torch.equal(voc.labels, labels)
    with pytest.raises(BadInput, match="no file at .*val.txt"):
        masks.load_val(folder)


def test_crops_move_picture_and_mask_alike():
    mask = torch.arange(40 * 60).view(40, 60).div(60, rounding_mode="floor").to(torch.uint8)
    image = mask.expand(3, -1, -1).clone()
    for draw in torch.rand(20, 4, generator=torch.Generator().manual_seed(0)).tolist():
        x, y = scaled_crop(image, mask, draw, 32)
        assert x.shape == (3, 32, 32) and y.shape == (32, 32)
        assert (x[0].int() - y.int()).abs().max() <= 1  # rows keep their numbers


@pytest.mark.parametrize("u, columns", [(0.0, 40), (1 / 3, 40), (2 / 3, 26.7), (0.999, 20)])
def test_the_short_side_is_half_to_twice_the_crop_but_covers_it(u, columns):
    mask = torch.arange(80, dtype=torch.uint8).expand(40, 80)
    image = torch.zeros(3, 40, 80, dtype=torch.uint8)
    _, left = scaled_crop(image, mask, (u, 0, 0, 1), 32)
    _, right = scaled_crop(image, mask, (u, 0, 0.999, 1), 32)
    assert left.min() == 0 and right.max() == 79  # all of the picture can be seen
    for y in (left, right):
        assert abs(int(y.max() - y.min()) + 1 - columns) <= 1
    assert torch.equal(scaled_crop(image, mask, (u, 0, 0, 0.4), 32)[1], left.flip(-1))


def test_a_tall_picture_can_be_seen_to_its_ends():
    mask = torch.arange(80, dtype=torch.uint8)[:, None].expand(80, 40)
    image = torch.zeros(3, 80, 40, dtype=torch.uint8)
    _, top = scaled_crop(image, mask, (1 / 3, 0, 0, 1), 32)
    _, bottom = scaled_crop(image, mask, (1 / 3, 0.999, 0, 1), 32)
    assert (top.min(), bottom.max()) == (0, 79) and (top[:, 0] == top[:, -1]).all()


def test_batches_are_a_function_of_the_step_and_shared_out(folder):
    data = masks.load(folder, True)
    stages = [Stage(32, 32, 1)] * 2
    how = (segmentation.batch, data, 4, 0, Augmentation("scale-crop"))
    images, targets = TrainBatches(*how, stages=stages)[3]
    assert images.shape == (4, 3, 32, 32) and targets.shape == (4, 32, 32)
    for rank in range(2):
        x, y = TrainBatches(*how, rank, 2, stages)[3]
        assert torch.equal(x, images[rank::2]) and torch.equal(y, targets[rank::2])


def test_loss_and_share_of_right_pixels_leave_ignored_ones_out():
    logits = torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    targets = torch.full((2, 4, 4), IGNORED, dtype=torch.uint8)
    targets[0, 0] = torch.tensor([0, 1, 2, 0])
    loss, right = segmentation.loss(logits, targets, 0.0)
    expected = torch.nn.functional.cross_entropy(logits[0, :, 0].T, targets[0, 0].long())
    torch.testing.assert_close(loss, expected)
    assert right == (logits[0, :, 0].argmax(0) == targets[0, 0]).float().mean()
    assert segmentation.loss(logits, targets.fill_(IGNORED), 0.0)[0] == 0


def test_score_equals_scikit_learns():
    from sklearn.metrics import jaccard_score

    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(3, 4, 8, 8, generator=generator)
    targets = torch.randint(0, 4, (3, 8, 8), generator=generator, dtype=torch.uint8)
    targets[0, :2] = IGNORED
    ours = score(*judge(logits, targets), tuple("abcd"))
    known = targets != IGNORED
    expected = jaccard_score(targets[known].numpy(), logits.argmax(1)[known].numpy(), average=None)
    assert list(ours["iou_pct"].values()) == pytest.approx(list(100 * expected))
    assert ours["miou_pct"] == pytest.approx(100 * expected.mean())
    mean = torch.nn.functional.cross_entropy(logits, targets.long(), ignore_index=IGNORED)
    assert ours["loss"] == pytest.approx(mean.item(), abs=1e-6)


def test_pictures_are_judged_at_their_own_size():
    targets = torch.full((2, 6, 8), OUTSIDE, dtype=torch.uint8)
    targets[0, :, :4], targets[0, :, 4:] = 0, 1  # 8 x 6 pixels
    targets[1, :2, :4] = 1  # 4 x 2
    logits = torch.zeros(2, 2, 4, 4)
    logits[0, 0, :, :2], logits[0, 1, :, 2:] = 9, 9
    logits[1, 1] = 9
    counts, _ = judge(logits, targets)
    assert counts.tolist() == [[[24, 0], [0, 24]], [[0, 0], [0, 8]]]
    assert score(counts, torch.zeros(2), ("a", "b"))["iou_pct"] == {"a": 100, "b": 100}


def test_logits_between_two_pixels_are_in_proportion_to_their_distances():
    logits = torch.zeros(1, 2, 1, 2)
    logits[0, 0, 0] = torch.tensor([3.0, -1.0])
    counts, losses = judge(logits, torch.zeros(1, 3, 8, dtype=torch.uint8))
    across = torch.tensor([3, 3, 2.5, 1.5, 0.5, -0.5, -1, -1])  # 8 pixels of 2
    assert counts.tolist() == [[[15, 9], [0, 0]]]
    assert losses.item() == pytest.approx(3 * (1 + (-across).exp()).log().sum().item())


def test_classes_that_are_nowhere_do_not_count():
    counts = torch.tensor([[[3, 1, 0], [0, 4, 0], [0, 0, 0]]])
    result = score(counts, torch.zeros(1), ("a", "b", "c"))
    assert result["iou_pct"] == {"a": 75.0, "b": 80.0} and result["miou_pct"] == 77.5
    with pytest.raises(BadInput, match="no pixel"):
        score(torch.zeros_like(counts), torch.zeros(1), ("a", "b", "c"))


def spoiled(path, content=None):
    path.unlink() if content is None else path.write_bytes(content)


@pytest.mark.parametrize(
    "spoil, says",
    [
        (lambda d: spoiled(d / "classes.txt"), "classes.txt"),
        (lambda d: spoiled(d / "classes.txt", b"sky\n"), "2 to 250"),
        (lambda d: spoiled(d / "classes.txt", b"sky\nvoid\nsky\n"), "different"),
        (lambda d: spoiled(d / "classes.txt", b"sky\n\nvoid\nroad\n"), "a blank line before"),
        (lambda d: spoiled(d / "classes.txt", b"\nsky\nvoid\nroad\n"), "a blank line before"),
        (lambda d: spoiled(d / "classes.txt", b"sky\nvoid\n"), "pixels of 2, which is no line"),
        (lambda d: spoiled(d / "classes.txt", b"\xff\xfe"), "not text"),
        (lambda d: spoiled(d / "train/labels/1.png"), "no image at .*1.png"),
        (lambda d: spoiled(d / "train/labels/1.png", b"no image"), "1.png can't be read"),
        (lambda d: picture((9, 9))[1].save(d / "train/labels/1.png"), "9x9 pixels, .* 60x40"),
        (lambda d: picture()[0].save(d / "train/labels/1.png"), "kind RGB"),
        (lambda d: (d / "train").rename(d / "other"), "no folder at .*train"),
        (lambda d: [p.unlink() for p in (d / "train/images").iterdir()], "no images for train"),
    ],
)
def test_folders_of_another_kind_are_refused_in_one_line(folder, spoil, says):
    spoil(folder)
    with pytest.raises(BadInput, match=says) as error:
        assert masks.load(folder, True).labels.numel()
    assert "\n" not in str(error.value)


def test_a_run_is_judged_by_miou_and_can_be_read_again(folder, tmp_path):
    output = tmp_path / "run"
    what = ("--task", "segmentation", "--model", "deeplab_mobilevit_xxs", "--img-size", "32")
    how = ("--batch-size", "4", "--warmup-epochs", "0.5", "--epochs", "2", "--output", output)
    out, _ = run("train.py", *what, *how, "--data-dir", folder)
    assert "% mIoU (sky " in out and "3 images" in out
    metrics = json.loads((output / "metrics.json").read_text())
    assert 0 <= metrics["test_miou_pct"] <= 100 and set(metrics["iou_pct"]) == {"sky", "road"}
    out, _ = run("train.py", "--eval", "--checkpoint", output / "best.pth", "--data-dir", folder)
    assert out.strip().endswith(metrics["printed"].split("test ")[1])


def test_a_stopped_run_resumes_to_the_same_bits(folder, tmp_path):
    """Dropout, too, draws what it would have drawn."""
    what = ("--task", "segmentation", "--model", "deeplab_mobilevit_xxs", "--img-size", "32")
    how = ("--batch-size", "4", "--warmup-epochs", "0.5", "--epochs", "2", "--data-dir", folder)
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    run("train.py", *what, *how, "--output", whole)
    run("train.py", *what, *how, "--output", broken, "--max-minutes", "0.001", code=3)
    run("train.py", *what, *how, "--output", broken, "--resume")
    states = [read_tensors(path / "last.pth")["model"] for path in (whole, broken)]
    assert all(torch.equal(tensor, states[1][name]) for name, tensor in states[0].items())


def test_a_trial_takes_pictures_from_all_over_the_validation_set(folder, tmp_path):
    """Masks of its first eighth may have no pixel to judge by."""
    for i in range(16):
        image, mask = picture(seed=i)
        image.save(folder / "val/images" / f"{i}.jpg")
        mask = Image.new("L", mask.size, 1) if i < 2 else mask
        mask.save(folder / "val/labels" / f"{i}.png")
    what = ("--task", "segmentation", "--model", "deeplab_mobilevit_xxs", "--img-size", "32")
    how = ("--batch-size", "4", "--minutes", "2", "--max-minutes", "0.0001")
    run("train.py", *what, *how, "--data-dir", folder, "--output", tmp_path / "run", code=3)


def test_every_process_and_step_draws_for_itself():
    sampler = Sampler(8, 4, seed=0)
    found = [
        Run.seed(SimpleNamespace(sampler=sampler, step=step, world=SimpleNamespace(rank=rank)))
        for step in range(3)
        for rank in range(3)
    ]
    assert len(set(found)) == len(found)


@pytest.mark.parametrize("workers", ["0", "1"])
def test_a_mask_that_is_no_good_ends_a_run_in_one_line(folder, tmp_path, workers):
    """In the process that reads it, too."""
    Image.new("L", (60, 40), 3).save(folder / "train" / "labels" / "5.png")
    what = ("--task", "segmentation", "--model", "deeplab_mobilevit_xxs", "--img-size", "32")
    how = ("--batch-size", "4", "--warmup-epochs", "0", "--epochs", "1", "--workers", workers)
    fails_with_one_line(
        "train.py", *what, *how, "--data-dir", folder, "--output", tmp_path / "run",
        says="train.py: error: " + str(folder / "train/labels/5.png") + " has pixels of 3",
    )  # fmt: skip


@pytest.mark.parametrize(
    "options, says",
    [
        (["--model", "xxs"], "--task segmentation is not for mobilevit_xxs"),
        (["--model", "deeplab_mobilevit_xxs", "--mixup", "1"], "--mixup is not for"),
        (["--model", "deeplab_mobilevit_xxs", "--batch-size", "1"], "--batch-size 1 is not for"),
    ],
)
def test_options_of_other_tasks_are_one_line(options, says):
    fails_with_one_line("train.py", "--task", "segmentation", *options, says=says)


def test_eval_batches_hold_pictures_and_masks(folder):
    x, targets = EvalBatches(masks.load(folder, False), 32, 2)[0]
    assert x.shape == (2, 3, 32, 32) and targets.shape == (2, 44, 60)
    assert 0 <= x.min() and x.max() <= 1
