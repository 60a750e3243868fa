"""The torch.hub entry points, loaded as a user loads them."""

import pytest
import torch
from conftest import ROOT
from PIL import Image
from torchvision.transforms.v2.functional import pil_to_tensor, to_pil_image

from lab.models.checkpoint import model_from_checkpoint
from lab.tasks.cifar10 import CLASSES, to_input
from mobilevit import VARIANTS, MobileViT


def load(name, **kwargs):
    return torch.hub.load(str(ROOT), name, source="local", **kwargs)


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_variant_can_be_had_untrained(variant):
    model = load(f"mobilevit_{variant}", num_classes=7)
    assert isinstance(model, MobileViT) and (model.variant, model.num_classes) == (variant, 7)


def test_pretrained_is_the_shipped_checkpoint_from_image_file_to_class_name(tmp_path):
    model = load("mobilevit_xxs", pretrained=True)
    shipped, _ = model_from_checkpoint(ROOT / "checkpoints" / "mobilevit_xxs" / "best.pth")
    to_pil_image(torch.randint(256, (3, 90, 120), dtype=torch.uint8)).save(tmp_path / "photo.jpg")
    photo = Image.open(tmp_path / "photo.jpg").convert("RGB").resize((32, 32))
    with torch.inference_mode():
        x = to_input(pil_to_tensor(photo)[None], 256)
        logits = model(x)
        assert torch.equal(logits, shipped(x)) and not model.training
    assert logits.shape == (1, len(CLASSES))


def test_shipped_weights_have_ten_classes():
    with pytest.raises(ValueError, match="10 classes, not 7"):
        load("mobilevit_xxs", pretrained=True, num_classes=7)
