"""Splits, batches and inputs against torchvision and by hand."""

import pickle

import numpy as np
import pytest
import torch
from conftest import fails_with_one_line
from torchvision.io import decode_jpeg, encode_jpeg
from torchvision.transforms import v2

from lab.cli import BadInput
from lab.tasks import TASKS, cifar10, synthetic
from lab.tasks.augment import DRAWS, POLICIES, Augmentation, crop, flip
from lab.tasks.batches import EvalBatches, TrainBatches, balanced_subset, split
from lab.tasks.classification import batch
from lab.training.schedule import Stage


def numbered(n=100):
    """Images whose pixels spell their index, with labels 0..9 in turn."""
    index = torch.arange(n)
    images = index.to(torch.uint8).view(n, 1, 1, 1).expand(n, 3, 32, 32).contiguous()
    return cifar10.Images(images, index % 10)


def test_split_is_balanced_nested_and_disjoint():
    labels = torch.arange(5000) % 10
    train, val = split(labels, 200)
    assert labels[val].bincount().tolist() == [20] * 10
    assert sorted(torch.cat((train, val)).tolist()) == list(range(5000))
    assert set(split(labels, 100)[1].tolist()) < set(val.tolist())


def test_balanced_subset_keeps_to_its_indices_and_depends_on_the_seed():
    labels = torch.arange(5000) % 10
    usable, held_out = split(labels, 200)
    first, second = (balanced_subset(labels, usable, 128, seed) for seed in (0, 1))
    assert not set(first.tolist()) & set(held_out.tolist())
    assert set(labels[first].bincount().tolist()) == {12, 13}
    assert not torch.equal(first, second)
    with pytest.raises(BadInput, match="cannot draw"):
        balanced_subset(labels, usable, 5000, 0)


def test_an_epoch_shows_every_image_once_and_the_next_one_in_another_order():
    batches = TrainBatches(batch, numbered(), 20, 0, Augmentation("none"))
    epochs = [
        [i for s in range(5 * e, 5 * e + 5) for i in batches[s][0][:, 0, 0, 0].tolist()]
        for e in (0, 1)
    ]
    assert sorted(epochs[0]) == sorted(epochs[1]) == list(range(100))
    assert epochs[0] != epochs[1]


@pytest.mark.parametrize("augment", POLICIES)
def test_windows_change_with_the_epoch(augment):
    stages = [Stage(64, 64, 1), Stage(32, 64, 1)]
    images = synthetic.load(None, True)
    batches = TrainBatches(batch, images, 500, 0, Augmentation(augment), stages=stages)
    assert [batches[step][0].shape[-1] for step in (0, 3, 4, 7)] == [32, 32, 16, 16]


@pytest.mark.parametrize("augment", POLICIES)
def test_processes_share_out_the_batch_that_one_would_get(augment):
    images = synthetic.load(None, True)
    whole, labels = TrainBatches(batch, images, 12, 3, Augmentation(augment))[7]
    for rank in range(3):
        part, part_labels = TrainBatches(batch, images, 12, 3, Augmentation(augment), rank, 3)[7]
        assert torch.equal(part, whole[rank::3]) and torch.equal(part_labels, labels[rank::3])


def test_augmentation_leaves_the_global_generator_alone():
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    TrainBatches(batch, synthetic.load(None, True), 10, 0, Augmentation("autoaugment"))[0]
    assert torch.equal(torch.rand(3), expected)


@pytest.mark.parametrize("side, padding", [(32, 4), (16, 4), (20, 0), (32, 0)])
def test_crop_and_flip_against_torchvision(side, padding):
    x = torch.randint(256, (9, 3, 32, 32), dtype=torch.uint8)
    top, left, draw = torch.arange(9), torch.arange(9) * 5, torch.arange(9)
    ours = flip(crop(x, top, left, side, padding), draw)
    places = 32 + 2 * padding - side + 1
    for i in range(9):
        padded = v2.functional.pad(x[i], [padding])
        expected = v2.functional.crop(padded, i % places, 5 * i % places, side, side)
        expected = v2.functional.horizontal_flip(expected) if i % 2 else expected
        assert torch.equal(ours[i], expected)


def test_input_against_torchvision():
    x = torch.randint(256, (2, 3, 32, 32), dtype=torch.uint8)
    steps = [
        v2.ToDtype(torch.float32, scale=True),
        v2.Resize(80, antialias=False),
        v2.Normalize(cifar10.MEAN, cifar10.STD),
    ]
    torch.testing.assert_close(cifar10.to_input(x, 80), v2.Compose(steps)(x), rtol=0, atol=1e-5)


def test_eval_batches_cover_everything_in_order():
    batches = EvalBatches(numbered(), 32, 30)
    assert len(batches) == 4
    assert torch.cat([labels for _, labels in batches]).equal(numbered().labels)


def test_batch_sizes_that_do_not_fit_are_refused():
    with pytest.raises(BadInput, match="batch size 101"):
        TrainBatches(batch, numbered(), 101, 0, Augmentation("none"))
    with pytest.raises(BadInput, match="3 processes"):
        TrainBatches(batch, numbered(), 20, 0, Augmentation("none"), 0, 3)


def test_a_damaged_file_is_one_line(tmp_path):
    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()
    names = [f"data_batch_{i}" for i in range(1, 6)] + ["test_batch", "batches.meta"]
    for name in names:  # all there, with readable contents of another MD5
        (folder / name).write_bytes(pickle.dumps({"data": []}))
    command = ("train.py", "--data-dir", tmp_path, "--output", tmp_path / "out")
    fails_with_one_line(*command, says="incomplete or damaged")
    assert not (tmp_path / "out").exists()


def test_a_failed_download_is_one_line(tmp_path, monkeypatch):
    def no_network(*args, **kwargs):
        raise OSError("no network")

    monkeypatch.setattr("torchvision.datasets.cifar.download_and_extract_archive", no_network)
    with pytest.raises(BadInput, match="could not be downloaded"):
        TASKS["cifar10"].load(tmp_path / "absent", True)


STRONG = Augmentation("crop-flip", erase=1.0, mixup=0.8, cutmix=1.0)


def test_mixed_images_and_targets_keep_the_same_shares():
    black = torch.zeros(4, 3, 32, 32, dtype=torch.uint8)
    x = torch.cat((black, black + 200))  # halves, so that each image meets the other colour
    targets = torch.nn.functional.one_hot(torch.arange(8) // 4, 10).float()
    for augment in (Augmentation(mixup=1.0), Augmentation(cutmix=1.0)):
        for seed in range(20):
            rng = np.random.default_rng(seed)
            mixed, shares = augment.mixed(x, targets, rng)
            bright = mixed.float().mean((1, 2, 3)) / 200
            torch.testing.assert_close(bright, shares[:, 1], atol=0.003, rtol=0)
            torch.testing.assert_close(shares.sum(1), torch.ones(8))


def test_erasing_leaves_the_rest_alone():
    x = synthetic.load(None, True).images[:50]
    draws = torch.randint(2**31, (50, DRAWS), generator=torch.Generator().manual_seed(0))
    erased = Augmentation("none", erase=1.0).images(x, draws, 32)
    share = (erased != x).any(1).float().mean((1, 2))
    assert (share > 0.01).all() and (share < 0.4).all()
    assert torch.equal(Augmentation("none", erase=1.0).images(x, draws, 32), erased)


def test_as_much_is_erased_as_by_torchvision():
    x = torch.zeros(3000, 3, 32, 32, dtype=torch.uint8)
    draws = torch.randint(2**31, (3000, DRAWS), generator=torch.Generator().manual_seed(0))
    ours = (Augmentation("none", erase=0.5).images(x, draws, 32) > 0).any(1).float()
    theirs = v2.RandomErasing(0.5, value=[1, 1, 1])
    torch.manual_seed(0)
    theirs = torch.stack([theirs(image)[0] for image in x.float()])
    for of in (lambda m: m.any(-1).any(-1), lambda m: m.mean((1, 2)), lambda m: m.any(1)):
        assert of(ours).float().mean() == pytest.approx(of(theirs).float().mean().item(), abs=0.02)
    assert ours.mean(0)[8:24, 8:24].mean() > ours.mean(0)[:4].mean() > 0  # in the middle more often


@pytest.mark.filterwarnings("ignore:The image decoding and encoding")
def test_some_images_are_what_torchvision_reads_of_a_jpeg_file():
    x = synthetic.load(None, True).images[:40]
    draws = torch.randint(2**31, (40, DRAWS), generator=torch.Generator().manual_seed(0))
    draws[:, 5] = 2**31 // 2  # the quality in the middle
    stored = Augmentation("none", jpeg=0.5).images(x, draws, 32)
    changed = (stored != x).flatten(1).any(1)
    assert 10 < changed.sum() < 30
    for image, before in zip(stored[changed], x[changed]):
        theirs = decode_jpeg(encode_jpeg(before, quality=63))
        assert (image.float() - theirs.float()).abs().mean() < 1


def test_processes_mix_what_one_process_would():
    images = synthetic.load(None, True)
    whole, targets = TrainBatches(batch, images, 12, 3, STRONG)[7]
    for rank in range(3):
        part, part_targets = TrainBatches(batch, images, 12, 3, STRONG, rank, 3)[7]
        assert torch.equal(part, whole[rank::3]) and torch.equal(part_targets, targets[rank::3])
    with pytest.raises(BadInput, match="mix images in pairs"):
        TrainBatches(batch, images, 15, 0, STRONG, 0, 3)


def test_every_choice_of_an_augmentation_has_a_number_of_its_own():
    x = synthetic.load(None, True).images[:20]
    draws = torch.randint(2**31, (20, DRAWS), generator=torch.Generator().manual_seed(0))
    augment, other = Augmentation("crop-flip"), draws.clone()
    other[:, 2] ^= 1
    assert torch.equal(augment.images(x, other, 32), augment.images(x, draws, 32).flip(-1))


def test_shares_are_drawn_from_beta_and_each_way_of_mixing_comes_as_often():
    x = torch.zeros(2, 3, 32, 32, dtype=torch.uint8)
    x[1] = 200

    def mixed(augment):
        for seed in range(400):
            images, shares = augment.mixed(x, torch.eye(2), np.random.default_rng(seed))
            yield shares[0, 0].item(), set(images.unique().tolist()) <= {0, 200}

    spread = np.mean([share * (1 - share) for share, _ in mixed(Augmentation(mixup=0.2))])
    assert spread == pytest.approx(0.2**2 / (0.4 * 1.4), abs=0.015)  # that of Beta(0.2, 0.2)
    patched = [patch for _, patch in mixed(Augmentation(mixup=1.0, cutmix=1.0))]
    assert 160 < sum(patched) < 240


def test_the_order_of_an_epoch_is_drawn_with_the_seed():
    first, same, other = (
        TrainBatches(batch, numbered(), 20, seed, Augmentation("none"))[0][0] for seed in (0, 0, 1)
    )
    assert torch.equal(first, same) and not torch.equal(first, other)


def test_every_step_mixes_by_a_share_of_its_own():
    batches = TrainBatches(batch, synthetic.load(None, True), 12, 3, STRONG)
    shares = {float(t[t > 0].min()) for t in (batches[step][1] for step in range(6))}
    assert len(shares) > 3
