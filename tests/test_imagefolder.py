"""Image files as a viewer shows them, and folders of them as a task."""

import os
from dataclasses import replace

import numpy as np
import pytest
import timm
import torch
import transformers
from PIL import Image
from torchvision.datasets import ImageFolder
from torchvision.datasets.folder import IMG_EXTENSIONS
from torchvision.transforms import v2

from lab.cli import BadInput
from lab.models.foreign import HALVES, IMAGENET, family_of
from lab.tasks import imagefolder
from lab.tasks.batches import EvalBatches
from lab.tasks.photo import read_photo, thumbnail

# what is done to a picture -> the EXIF orientation that tells viewers to undo it (EXIF 2.3, 4.6.4)
TURNS = {
    Image.Transpose.FLIP_LEFT_RIGHT: 2,
    Image.Transpose.ROTATE_180: 3,
    Image.Transpose.FLIP_TOP_BOTTOM: 4,
    Image.Transpose.TRANSPOSE: 5,
    Image.Transpose.ROTATE_90: 6,
    Image.Transpose.TRANSVERSE: 7,
    Image.Transpose.ROTATE_270: 8,
}


def picture(height=40, width=60, seed=0) -> Image.Image:
    """Noise over a gradient, RGB."""
    x = np.random.default_rng(seed).integers(0, 100, (height, width, 3))
    x[..., 0] += np.linspace(0, 150, width).astype(int)
    x[..., 1] += np.linspace(0, 150, height).astype(int)[:, None]
    return Image.fromarray(x.astype(np.uint8))


def pixels(image) -> torch.Tensor:
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


def folder_of(path, counts, suffix=".png"):
    """A folder of classes with so many pictures, no two alike."""
    for k, (name, n) in enumerate(counts.items()):
        (path / name).mkdir(parents=True)
        for i in range(n):
            picture(seed=1000 * k + i).save(path / name / f"{i}{suffix}")
    return path


# Decoding


@pytest.mark.parametrize("turn", TURNS)
@pytest.mark.parametrize("suffix", ["png", "tif", "webp"])
def test_pictures_stored_sideways_are_read_upright(tmp_path, turn, suffix):
    exif = Image.Exif()
    exif[274] = TURNS[turn]
    path = tmp_path / f"sideways.{suffix}"
    picture().transpose(turn).save(
        path, exif=exif, **({"lossless": True} if suffix == "webp" else {})
    )
    assert torch.equal(read_photo(path), pixels(picture()))
    picture().save(tmp_path / "upright.png")
    assert torch.equal(thumbnail(path), thumbnail(tmp_path / "upright.png"))


@pytest.mark.parametrize("suffix", ["png", "tif", "pgm"])
def test_gray_of_16_bits_is_scaled_not_clipped(tmp_path, suffix):
    gray = np.arange(0, 65536, 16, dtype=np.uint16).reshape(64, 64)
    Image.fromarray(gray).save(tmp_path / f"gray.{suffix}")
    read = read_photo(tmp_path / f"gray.{suffix}")
    expected = torch.from_numpy((gray.astype(float) * 255 / 65535).round().astype(np.uint8))
    assert torch.equal(read, expected.expand(3, 64, 64))


@pytest.mark.parametrize("mode", ["1", "L", "P", "CMYK", "YCbCr"])
def test_other_colour_models_become_rgb(tmp_path, mode):
    shown = picture().convert(mode)
    shown.save(tmp_path / "x.tif")
    assert torch.equal(read_photo(tmp_path / "x.tif"), pixels(shown.convert("RGB")))


def test_transparent_parts_are_white_whatever_colour_is_hidden_there(tmp_path):
    opaque = np.zeros((40, 60), np.uint8)
    opaque[:, 20:] = 255
    for name, hidden in (("red", (255, 0, 0)), ("black", (0, 0, 0))):
        rgba = np.dstack([np.array(picture()), opaque])
        rgba[:, :20, :3] = hidden
        Image.fromarray(rgba).save(tmp_path / f"{name}.png")
    red, black = (read_photo(tmp_path / f"{name}.png") for name in ("red", "black"))
    assert torch.equal(red, black) and (red[:, :, :20] == 255).all()
    assert torch.equal(red[:, :, 20:], pixels(picture())[:, :, 20:])
    assert torch.equal(thumbnail(tmp_path / "red.png"), thumbnail(tmp_path / "black.png"))


@pytest.mark.parametrize("mode", ["P", "L", "I;16"])
def test_a_value_that_stands_for_transparent_is_white(tmp_path, mode):
    values = np.arange(16).reshape(4, 4)
    if mode == "I;16":
        image = Image.fromarray((values * 257).astype(np.uint16))
    else:
        image = Image.fromarray(values.astype(np.uint8))
        if mode == "P":
            image.putpalette([v for v in range(256) for _ in range(3)])
    image.save(tmp_path / "x.png", transparency=0)
    expected = torch.from_numpy(values).to(torch.uint8).clone()
    expected[0, 0] = 255
    assert torch.equal(read_photo(tmp_path / "x.png"), expected.expand(3, 4, 4))


def test_half_transparent_is_half_white(tmp_path):
    Image.new("RGBA", (4, 4), (100, 0, 200, 51)).save(tmp_path / "x.png")  # a fifth opaque
    assert read_photo(tmp_path / "x.png")[:, 0, 0].tolist() == [224, 204, 244]


def test_a_thumbnail_averages_over_the_pixels_that_become_one(tmp_path):
    board = np.indices((128, 128)).sum(0) % 2 * 255
    Image.fromarray(board.astype(np.uint8)).save(tmp_path / "board.png")
    small = thumbnail(tmp_path / "board.png")
    assert small.shape == (3, 32, 32) and small.dtype == torch.uint8
    assert (small[:, 2:-2, 2:-2].int() - 127).abs().max() <= 1


@pytest.mark.parametrize(
    "kind", ["text", "truncated", "absent", "folder", "empty", "float", "deep"]
)
def test_what_is_no_image_is_named_in_one_line(tmp_path, kind):
    path = tmp_path / "x.tif"
    if kind == "folder":
        path.mkdir()
    elif kind in ("float", "deep"):
        image = np.full((4, 4), 70000, np.float32 if kind == "float" else np.int32)
        Image.fromarray(image).save(path)
    elif kind != "absent":
        picture().save(tmp_path / "whole.jpg")
        whole = (tmp_path / "whole.jpg").read_bytes()
        path.write_bytes({"text": b"no image", "truncated": whole[:-500], "empty": b""}[kind])
    with pytest.raises(BadInput, match="x.tif") as error:
        read_photo(path)
    assert "\n" not in str(error.value)


def test_pictures_too_large_to_decode_are_refused(tmp_path, monkeypatch):
    picture().save(tmp_path / "x.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 40 * 60)
    read_photo(tmp_path / "x.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 40 * 60 // 2 - 1)
    with pytest.raises(BadInput, match="x.png can't be read as an image: .*exceeds limit"):
        read_photo(tmp_path / "x.png")


# Folders


def test_parts_are_disjoint_whole_balanced_and_the_same_every_time(tmp_path):
    folder = folder_of(tmp_path, {"cat": 12, "ant": 20, "dog": 3})
    train, test = (imagefolder.load(folder, train) for train in (True, False))
    assert train.classes == test.classes == ("ant", "cat", "dog")
    assert len(train) == 7 and train.labels.bincount().tolist() in ([3, 2, 2], [2, 3, 2], [2, 2, 3])
    whole = ImageFolder(folder)
    paths = {str(file): label for file, label in zip(train.files, train.labels.tolist())}
    paths |= {str(file): label for file, label in zip(test.files, test.labels.tolist())}
    assert paths == dict(whole.samples) and len(train) + len(test) == len(whole)
    assert imagefolder.load(folder, True).files == train.files


def test_at_most_a_thousand_images_are_for_calibration(tmp_path):
    for k in range(2):
        (tmp_path / str(k)).mkdir()
        for i in range(3000):
            (tmp_path / str(k) / f"{i}.jpg").touch()
    assert len(imagefolder.load(tmp_path, True)) == 1000
    assert len(imagefolder.load(tmp_path, False)) == 5000


@pytest.mark.parametrize("also", [(), ("val",)])
@pytest.mark.parametrize("evaluation", ["val", "test"])
def test_folders_that_are_split_already(tmp_path, evaluation, also):
    folder_of(tmp_path / "train", {"cat": 2, "dog": 1})
    for name in {evaluation, *also}:
        folder_of(tmp_path / name, {"cat": 1, "dog": 3})
    train, test = (imagefolder.load(tmp_path, train) for train in (True, False))
    assert {file.parts[-3] for file in train.files} == {"train"} and len(train) == 3
    assert {file.parts[-3] for file in test.files} == {evaluation} and len(test) == 4


def test_images_of_imagenets_unlabelled_test_folder_are_passed_over(tmp_path):
    for part in ("train", "val"):
        folder_of(tmp_path / part, {"cat": 1, "dog": 1})
    (tmp_path / "test").mkdir()
    picture().save(tmp_path / "test" / "1.jpg")
    assert {file.parts[-3] for file in imagefolder.load(tmp_path, False).files} == {"val"}


def test_only_images_count_and_nothing_hidden(tmp_path):
    folder = folder_of(tmp_path, {"cat": 5, "dog": 5})
    (folder / "notes.txt").write_text("not an image")
    (folder / "cat" / "Thumbs.db").write_text("not an image")
    (folder / "cat" / "._0.png").write_text("what macOS leaves")
    (folder / ".cache").mkdir()
    picture().save(folder / ".cache" / "0.png")
    (folder / "dog" / "more").mkdir()
    picture().save(folder / "dog" / "more" / "LOUD.PNG")
    parts = [imagefolder.load(folder, train) for train in (True, False)]
    assert sum(map(len, parts)) == 11 and parts[0].classes == ("cat", "dog")


def test_the_same_names_are_images_as_for_torchvision():
    assert set(imagefolder._EXTENSIONS) == set(IMG_EXTENSIONS)


@pytest.mark.parametrize("size", [(40, 60), (60, 40), (33, 33), (200, 300), (1, 1), (2, 500)])
@pytest.mark.parametrize("img_size", [32, 64])
def test_inputs_are_as_the_paper_evaluates(tmp_path, size, img_size):
    for name in ("cat", "dog"):
        (tmp_path / name).mkdir()
        for i in range(5):
            picture(*size, seed=i).save(tmp_path / name / f"{i}.png")
    data = imagefolder.load(tmp_path, False)[:2]
    got = data.inputs(img_size)
    assert got.shape == (2, 3, img_size, img_size) and got.dtype == torch.float32
    mean, std = (0.5, 0.4, 0.3), (0.2, 0.3, 0.4)
    way = [v2.Resize(img_size * 288 // 256, antialias=True), v2.CenterCrop(img_size)]
    to_floats = v2.Compose([v2.ToImage(), *way, v2.ToDtype(torch.float32, scale=True)])
    expected = torch.stack([to_floats(Image.open(file)) for file in data.files])
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-6)
    torch.testing.assert_close(
        replace(data, normalize={"mean": mean, "std": std}).inputs(img_size),
        v2.Normalize(mean, std)(expected),
        rtol=0,
        atol=1e-5,
    )


def prepared(tmp_path, network, project, side):
    """A picture as the network's input, and how the project of its weights says to prepare it."""
    (layout,) = [x for x in family_of(network).layouts if x.name == project]
    picture(300, 200).save(tmp_path / "a.png")
    normalize = {"mean": layout.mean, "std": layout.std}
    resize = imagefolder.RESIZE | layout.resize
    files = (tmp_path / "a.png",)
    return imagefolder.Photos(files, torch.tensor([0]), ("a", "b"), normalize, resize).inputs(side)


def assert_same_pixels(ours, theirs, std):
    """Within the roundings of two libraries, in levels of 8 bits."""
    levels = (ours - theirs).abs() * 255 * torch.tensor(std).view(3, 1, 1)
    assert ours.shape == theirs.shape and levels.max() < 2.5 and levels.mean() < 0.1


@pytest.mark.parametrize(
    "network", ["deit_tiny_patch16_224", "mobilevit_xxs", "efficientnet_lite0"]
)
def test_inputs_are_as_timms_configuration_says(tmp_path, network):
    prefix = "tf_" if network.startswith("efficientnet") else ""
    config = timm.get_pretrained_cfg(prefix + network)
    ours = prepared(tmp_path, network, "timm", config.input_size[-1])
    told = ("input_size", "interpolation", "crop_pct", "mean", "std")
    theirs = timm.data.create_transform(**{name: getattr(config, name) for name in told})
    assert_same_pixels(ours, theirs(Image.open(tmp_path / "a.png"))[None], config.std)


@pytest.mark.parametrize(
    ("network", "processor"), [("vit_base_patch16_224", "ViT"), ("deit_tiny_patch16_224", "DeiT")]
)
def test_inputs_are_as_transformers_prepares_them(tmp_path, network, processor):
    ours = prepared(tmp_path, network, "transformers", 224)
    pixels = IMAGENET if processor == "DeiT" else HALVES
    of_pixels = {f"image_{name}": value for name, value in pixels.items()}
    theirs = getattr(transformers, f"{processor}ImageProcessor")(**of_pixels)
    expected = theirs(Image.open(tmp_path / "a.png"), return_tensors="pt")["pixel_values"]
    assert_same_pixels(ours, expected, pixels["std"])


def test_a_strip_takes_no_more_memory_than_other_pictures(tmp_path):
    Image.new("L", (60_000, 1), 7).save(tmp_path / "strip.png")
    data = imagefolder.Photos((tmp_path / "strip.png",), torch.tensor([0]), ("a", "b"))
    assert torch.equal(data.inputs(64), torch.full((1, 3, 64, 64), 7 / 255))


def test_batches_and_subsets_keep_files_and_labels_together(tmp_path):
    data = imagefolder.load(folder_of(tmp_path, {"cat": 5, "dog": 5}), False)
    some = data[torch.tensor([5, 0])]
    assert some.files == (data.files[5], data.files[0])
    assert some.labels.tolist() == [1, 0]
    batches = list(EvalBatches(data, 32, 3))
    assert torch.equal(torch.cat([x for x, _ in batches]), data.inputs(32))
    assert torch.equal(torch.cat([y for _, y in batches]), data.labels)


def test_a_file_that_cannot_be_decoded_is_named(tmp_path):
    data = imagefolder.load(folder_of(tmp_path, {"cat": 5, "dog": 5}), False)
    data.files[3].write_bytes(b"no image")
    with pytest.raises(BadInput, match=str(data.files[3])):
        data.inputs(32)


@pytest.mark.parametrize(
    "counts, says",
    [
        ({}, "a sub-folder for each class, but has none"),
        ({"cat": 9}, "a sub-folder for each class, but has only cat"),
        ({"cat": 9, "dog": 0}, "dog has no image .* 1 of 2 have none"),
        ({"cat": 1, "dog": 1}, "has 2 images, but needs 5 or more"),
        ({"train/cat": 1, "train/dog": 1, "valid/cat": 1}, "train .* but no such test or val"),
        ({"train/cat": 1, "train/dog": 1, "val/cat": 1, "val/ant": 1}, "train lacks .* ant, .*val"),
        ({"train/cat": 1, "train/dog": 1, "val/cat": 1, "val/dog": 0}, "val/dog has no image"),
    ],
)
def test_folders_of_another_form_are_refused_in_one_line(tmp_path, counts, says):
    folder = folder_of(tmp_path / "photos", counts)
    folder.mkdir(exist_ok=True)
    with pytest.raises(BadInput, match=says.replace("/", "." if os.sep == "\\" else "/")) as error:
        imagefolder.load(folder, True)
    assert "\n" not in str(error.value)


def test_no_folder_and_a_file_are_refused(tmp_path):
    (tmp_path / "file").touch()
    for name in ("absent", "file"):
        with pytest.raises(BadInput, match=f"no folder at .*{name}"):
            imagefolder.load(tmp_path / name, True)


def test_the_first_so_many_photos_are_of_all_classes(tmp_path):
    folder_of(tmp_path / "train", {"cat": 1, "dog": 1})
    folder_of(tmp_path / "test", {"cat": 4, "dog": 2, "owl": 3})
    folder_of(tmp_path / "train", {"owl": 1})
    test = imagefolder.load(tmp_path, False)
    assert test.labels.tolist() == [0, 1, 2, 0, 1, 2, 0, 2, 0]
    assert [file.parts[-2] for file in test.files[:3]] == ["cat", "dog", "owl"]
