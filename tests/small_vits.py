"""Vision transformers of two layers, each of another project, with weights that matter."""

import timm
import torch
import torchvision
import transformers

from lab.models.vit import ViT

SIDE, PATCH, DIM, HEADS, CLASSES = 32, 8, 24, 3, 7


def of_transformers():
    config = transformers.ViTConfig(
        image_size=SIDE,
        patch_size=PATCH,
        hidden_size=DIM,
        num_hidden_layers=2,
        num_attention_heads=HEADS,
        intermediate_size=4 * DIM,
        num_labels=CLASSES,
    )
    return transformers.ViTForImageClassification(config)


def of_timm():
    sizes = {"img_size": SIDE, "patch_size": PATCH, "embed_dim": DIM, "num_heads": HEADS}
    return timm.models.VisionTransformer(**sizes, depth=2, num_classes=CLASSES)


def of_torchvision():
    return torchvision.models.VisionTransformer(
        SIDE, PATCH, 2, HEADS, DIM, 4 * DIM, num_classes=CLASSES
    )


def ours():
    network = ViT("vit_cifar", CLASSES)
    network.blocks = network.blocks[:2]
    return network


VITS = {
    "transformers": of_transformers,
    "timm": of_timm,
    "torchvision": of_torchvision,
    "ours": ours,
}


def small_vit(name):
    """The network of a project, with every weight, token and position drawn anew: otherwise all
    logits of a fresh one are alike."""
    network = VITS[name]().eval()
    generator = torch.Generator().manual_seed(0)
    for parameter in network.parameters():
        if parameter.dim() > 1:
            parameter.data.normal_(0, 0.2, generator=generator)
    return network
