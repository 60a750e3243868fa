"""Others' weights on folders of photos: accuracy beside the paper's, and the order of colours."""

from unittest import mock

import numpy as np
import pytest
import timm
import torch
from conftest import fails_with_one_line, run
from PIL import Image
from test_foreign import randomized, transformers_network

from lab.cli import BadInput
from lab.models.foreign import as_checkpoint, read_weights
from lab.tasks import imagefolder
from lab.training import evaluation
from lab.training.evaluation import weights_score
from mobilevit import MobileViT

NAME, N = "mobilevit_xxs", 7


@pytest.fixture
def photos(tmp_path):
    """Folders of as many classes as the weights have, whose photos the network, given blue, green,
    red as transformers trained it, is always right about."""
    theirs = transformers_network("xxs")
    torch.save(theirs.state_dict(), tmp_path / "w.pth")
    network, _ = read_weights(tmp_path / "w.pth", NAME)
    rng = np.random.default_rng(0)
    colours, noise = rng.integers(0, 216, (30, 1, 1, 3)), rng.integers(0, 40, (30, 288, 288, 3))
    images = (colours + noise).astype(np.uint8)
    x = torch.from_numpy(images).permute(0, 3, 1, 2)[..., 16:272, 16:272] / 255
    with torch.inference_mode():
        logits = network(x)
    theirs.classifier.bias.data -= logits.mean(0)  # so that it does not call all the same
    torch.save(theirs.state_dict(), tmp_path / "w.pth")
    folder = tmp_path / "photos"
    for k in range(N):
        (folder / f"class {k}").mkdir(parents=True)
        Image.new("RGB", (288, 288)).save(folder / f"class {k}" / "any.png")  # it needs a photo
    for i, k in enumerate((logits - logits.mean(0)).argmax(1).tolist()):
        Image.fromarray(images[i]).save(folder / f"class {k}" / f"{i}.png")
    return folder


def test_both_orders_of_colours_are_tried_and_the_better_one_judged(photos):
    path = photos.parent / "w.pth"
    printed = weights_score(path, NAME, None, photos, "cpu")
    assert "transformers, colours as that project trains: " in printed
    top_1 = float(printed.split("top-1 ")[1].split(" %")[0])
    assert top_1 >= 100 * 30 / 37 and "(37 images at 256)" in printed and "paper" not in printed
    state = torch.load(path)
    stem = "mobilevit.conv_stem.convolution.weight"
    torch.save(state | {stem: state[stem].flip(1)}, path)  # as trained on red, green, blue
    flipped = weights_score(path, NAME, None, photos, "cpu")
    assert "colours the reverse of that project's" in flipped
    assert flipped.split("top-1")[1] == printed.split("top-1")[1]


@pytest.mark.parametrize("name", [NAME, "deit_tiny_patch16_224"])
def test_both_commands_give_weights_the_pixels_that_they_were_trained_on(name, tmp_path):
    """timm's are cut out otherwise than the paper's; train.py --eval and quantize.py know it."""
    theirs = timm.create_model(name, num_classes=2)
    torch.save(randomized(theirs).state_dict(), tmp_path / "w.pth")
    for k in range(2):
        (tmp_path / "photos" / f"class {k}").mkdir(parents=True)
        noise = np.random.default_rng(k).integers(0, 256, (300, 400, 3), np.uint8)
        Image.fromarray(noise).save(tmp_path / "photos" / f"class {k}" / "0.png")
    network, layout = read_weights(tmp_path / "w.pth", name)
    checkpoint = as_checkpoint(network, name, layout)
    seen = []
    with mock.patch.object(evaluation, "judged", lambda m, data, *_: seen.append(data) or 1 / 0):
        with pytest.raises(ZeroDivisionError):
            weights_score(tmp_path / "w.pth", name, None, tmp_path / "photos", "cpu")
    assert (seen[0].normalize, seen[0].resize) == (checkpoint["normalize"], checkpoint["resize"])
    assert seen[0].resize != imagefolder.RESIZE


def test_the_command_prints_top_1_and_top_5(photos):
    command = ("train.py", "--eval", "--task", "imagefolder", "--data-dir", photos)
    out, _ = run(*command, "--weights", photos.parent / "w.pth", "--model", "xxs")
    assert out.count("\n") == 1 and "top-1" in out and "top-5" in out


def test_a_thousand_classes_are_put_beside_the_paper(tmp_path, monkeypatch):
    folder = tmp_path / "val"
    for k in range(1000):
        (folder / f"n{k:04}").mkdir(parents=True)
        Image.new("RGB", (8, 8)).save(folder / f"n{k:04}" / "0.png")
    torch.save(randomized(MobileViT("xxs", 1000)).state_dict(), tmp_path / "w.pth")
    monkeypatch.setattr(evaluation, "default_img_size", lambda name: 32)
    printed = weights_score(tmp_path / "w.pth", NAME, None, folder, "cpu")
    assert "top-1 0.10 %" in printed and "the paper: 69.0 and 88.9 %" in printed  # all look alike


def test_the_papers_numbers():
    """MobileViT's accuracies on ImageNet, from the smallest to the largest."""
    top_1, top_5 = zip(*(evaluation.PAPER[f"mobilevit_{size}"] for size in ("xxs", "xs", "s")))
    assert top_1 == (69.0, 74.8, 78.4) and top_5 == (88.9, 92.3, 94.1)


def test_all_photos_are_judged_and_none_kept_to_calibrate_on(photos):
    assert len(imagefolder.load_all(photos)) == 37
    assert len(imagefolder.load(photos, False)) == 30
    (photos.parent / "both").mkdir()
    photos.rename(photos.parent / "both" / "train")
    with pytest.raises(BadInput, match="no such test or val"):
        imagefolder.load_all(photos.parent / "both")


def test_other_folders_and_options_are_one_line(photos):
    (photos / "class 9").mkdir()
    Image.new("RGB", (8, 8)).save(photos / "class 9" / "0.png")
    with pytest.raises(BadInput, match="w.pth tells 7 classes apart, .*photos has 8"):
        weights_score(photos.parent / "w.pth", NAME, None, photos, "cpu")
    fails_with_one_line("train.py", "--task", "imagefolder", says="--weights go together")
