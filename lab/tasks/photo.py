"""Image files as tensors: one way to decode them for every task and every example.

A picture comes out as a viewer shows it: turned as its EXIF orientation says, with transparent
parts on white. Of animations and stacks the first frame counts. Colour profiles are not applied.
"""

import warnings
from pathlib import Path

import numpy as np
import torch
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from lab.cli import BadInput


def read_photo(path) -> Tensor:
    """Return the picture in an image file as RGB, uint8 [3, H, W].

    BadInput names a file that has none.
    """
    return _to_tensor(_decode(path))


def header(path) -> tuple[tuple[int, int], str]:
    """Return width and height and the mode of the picture in an image file; it reads no pixels.

    BadInput for a file that has none, and for a picture that viewers turn: what is annotated lies
    on it as stored.
    """
    try:
        with Image.open(path) as file:
            turned = file.getexif().get(ExifTags.Base.Orientation, 1) > 1
            size, mode = file.size, file.mode
    except FileNotFoundError as error:
        raise BadInput(f"no image at {path}") from error
    except Exception as error:  # PIL's decoders raise many kinds, without a common base
        raise BadInput(f"{path} can't be read as an image: {error}") from error
    if turned:
        raise BadInput(f"{path}: its EXIF says to turn it, unlike its annotations: save it upright")
    return size, mode


def at_indices(paths: tuple[Path, ...], indices) -> tuple[Path, ...]:
    """Return the paths at `indices`, a tensor of numbers or flags, or a slice."""
    return tuple(paths[i] for i in torch.arange(len(paths))[indices].tolist())


def squares(pictures: list[Tensor], img_size: int, device="cpu") -> Tensor:
    """Return pictures uint8 [3, H, W] as a network's input float32 [N, 3, S, S].

    They are stretched to squares.
    """
    from torchvision.transforms.v2.functional import resize  # two seconds, see cifar10

    side = [img_size, img_size]
    images = torch.stack([resize(picture, side, antialias=True) for picture in pictures])
    return to_input(images.to(device), img_size)


def to_input(images: Tensor, img_size: int) -> Tensor:
    """Return images uint8 [b, 3, S, S] as a network's float input, channels-last.

    Pixels are in [0, 1], as the paper's code has them, but red first. `img_size` is not used: the
    images are of their size already.
    """
    return (images / 255).contiguous(memory_format=torch.channels_last)


def thumbnail(path) -> Tensor:
    """Return the picture in an image file made as small as training images, uint8 [3, 32, 32].

    PIL's bicubic resize averages over all pixels that become one. The whole picture is kept and its
    sides are not: a wide one becomes narrower.
    """
    return _to_tensor(_decode(path).resize((32, 32)))


def _to_tensor(image: Image.Image) -> Tensor:
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous()


def _decode(path) -> Image.Image:
    if not Path(path).is_file():
        raise BadInput(f"no image file at {path}")
    try:
        with warnings.catch_warnings():
            # PIL warns of damaged metadata and of more than 89 million pixels; twice as many it
            # refuses, which is limit enough.
            warnings.simplefilter("ignore")
            with Image.open(path) as file:
                return _to_rgb(ImageOps.exif_transpose(file))
    except UnidentifiedImageError as error:
        raise BadInput(f"{path} is not an image of a kind that can be read") from error
    except Exception as error:  # PIL's decoders raise many kinds, without a common base
        raise BadInput(f"{path} can't be read as an image: {error}") from error


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode == "F":
        raise ValueError("its pixels are floats of an unknown range")
    if image.mode.startswith("I"):
        image = _eight_bits(image)
    if image.has_transparency_data:  # on white, so that colours which nobody sees do not count
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def _eight_bits(image: Image.Image) -> Image.Image:
    """Return a gray picture of 16 bits as one of 8; PIL's own conversion would clip it at 255.

    ValueError for a picture of more than 16 bits.
    """
    gray = np.asarray(image).astype(np.int64)
    if gray.min() < 0 or gray.max() > 65535:
        raise ValueError("its pixels have more than 16 bits")
    small = Image.fromarray((gray / 257).round().astype(np.uint8))  # 65535 = 255 * 257
    if "transparency" in image.info:  # the one value that stands for transparent pixels
        small.putalpha(Image.fromarray(gray != image.info["transparency"]).convert("L"))
    return small
