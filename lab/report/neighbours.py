"""The published figures of a neighbouring system, beside ours by the same formats."""

from lab.report.energy import SIMULATED
from lab.report.reading import accuracy, baseline_of
from lab.report.tables import cell, markdown

# README of "Vision Transformer Quantization", in %: symmetric uniform weights with a scale a
# channel, activations in float; ResNet-18 on CIFAR-10, DeiT-Tiny on 10,000 images of ImageNet.
# Its ranking loss is on weights. {(network, method): {bits of weights: top-1}}
PUBLISHED = {
    ("ResNet-18", "uniform"): {32: 95.18, 8: 95.23, 6: 95.13, 4: 93.13},
    ("DeiT-Tiny", "uniform"): {32: 85.34, 8: 85.10, 6: 85.01, 4: 83.04},
    ("DeiT-Tiny", "ranking-aware"): {32: 85.34, 8: 85.18, 6: 85.11, 4: 74.90},
}
OURS = {"ResNet-18": "resnet18", "DeiT-Tiny": "vit_cifar"}  # on CIFAR-10
RECIPES = {
    "uniform": {8: "uniform8", 6: "uniform6", 4: "uniform4"},
    "ranking-aware": {8: "w8a8-ranking", 6: "w6a6-ranking", 4: "w4a8-ranking"},
}


def neighbours_table(rows: list[dict]) -> str:
    """Return a table of what was published beside our rows: a line a network, method and width."""
    simulated = {
        (row["model"], row["recipe"]["name"]): row for row in rows if row["engine"] == SIMULATED
    }
    lines = []
    for (network, method), of_bits in PUBLISHED.items():
        ours = OURS[network]
        for bits, published in of_bits.items():
            recipe = RECIPES[method].get(bits, "fp32")
            row = simulated.get((ours, recipe))
            theirs = with_change(published, of_bits[32] if bits < 32 else None)
            lines.append(
                {
                    "Published network": network,
                    "Method": method,
                    "Bits": str(bits),
                    "Published %": theirs,
                    "Our network": cell(ours),
                    "Recipe": cell(recipe),
                    "Ours %": of_row(row, rows) if row else "no results yet",
                }
            )
    return markdown(lines)


def of_row(row: dict, rows: list[dict]) -> str:
    baseline = baseline_of(row, rows)
    return with_change(accuracy(row), accuracy(baseline) if baseline not in (None, row) else None)


def with_change(percent: float, before: float | None) -> str:
    change = "" if before is None else f" ({percent - before:+.2f})"
    return f"{percent:.2f}{change}"
