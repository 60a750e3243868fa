"""ResNet-18 for images of 32x32 pixels: He et al., "Deep Residual Learning for Image Recognition",
CVPR 2016 (arXiv:1512.03385), with a stem that keeps the size of the image.

    >>> resnet18(num_classes=10)(torch.rand(1, 3, 32, 32)).shape
    torch.Size([1, 10])
"""

from torch import nn


def resnet18(num_classes: int = 10) -> nn.Module:
    """Return torchvision's resnet18 with another stem: [B, 3, H, W] -> logits [B, num_classes].

    The stem is a 3x3 convolution of stride 1 without pooling behind it. The paper's 7x7 stem of
    stride 2 and its pooling would leave 8x8 of 32x32 pixels.
    """
    from torchvision.models import resnet18  # two seconds to import, spent only where it is used

    network = resnet18(num_classes=num_classes)
    network.conv1 = nn.Conv2d(3, 64, kernel_size=3, stride=1, padding=1, bias=False)
    nn.init.kaiming_normal_(network.conv1.weight, mode="fan_out", nonlinearity="relu")
    network.maxpool = nn.Identity()
    network.settings = {"num_classes": num_classes}
    return network
