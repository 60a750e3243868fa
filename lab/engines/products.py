"""Convolutions and matrix products: how many a quantized network wants computed in integers."""

from collections import Counter

from torch import nn

from ptq.layers import QuantizedAttentionCore, QuantizedLayer, Quantizer


def quantized_products(network: nn.Module) -> dict[str, int]:
    """Count the products of a network from ptq.quantize that have both factors quantized.

    {"Conv": convolutions, "MatMul": matrix products}, a kind without any left out.
    """
    counts = Counter()
    for module in network.modules():
        if isinstance(module, QuantizedLayer):
            if module.format and isinstance(module.input, Quantizer):
                counts["Conv" if isinstance(module.layer, nn.Conv2d) else "MatMul"] += 1
        elif isinstance(module, QuantizedAttentionCore):
            counts["MatMul"] += 2
    return dict(counts)
