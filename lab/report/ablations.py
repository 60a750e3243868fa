"""What the parts of MobileViT are worth, in a table: lab.bench ablations, as its file holds it."""

import statistics

from lab.report.tables import cell, markdown

BASE = "base"  # the variant that the others are compared with


def ablations_table(benchmarks: list[dict]) -> str:
    """Return a table for each of `benchmarks`, a line a variant, and how all were trained.

    A line says how large a variant is, and its accuracy over the seeds against the base's.
    """
    return "\n\n".join(map(table_of, benchmarks)) or markdown([])


def table_of(bench: dict) -> str:
    base = bench["variants"][BASE]["val_accuracy_pct"]
    lines = []
    for name, variant in bench["variants"].items():
        found = variant["val_accuracy_pct"]
        lines.append(
            {
                "Variant": cell(variant["title"]),
                "Parameters": f"{variant['parameters']:,}",
                "Million MACs": f"{variant['macs'] / 1e6:.1f}",
                "Held-out %": f"{statistics.mean(found):.2f}",
                "Lowest to highest": f"{min(found):.2f} to {max(found):.2f}",
                "Δ points": "-" if name == BASE else difference(found, base),
            }
        )
    side, hardware = bench["img_size"], " and ".join(bench["trained_on"])
    conditions = (
        f"{len(base)} seeds; {bench['steps']:,} steps of {bench['batch_size']} images of "
        f"{side}x{side} pixels, {bench['precision'].upper()}, {hardware}; judged on "
        f"{bench['n_val']:,} held-out images."
    )
    return f"{markdown(lines)}\n\n{cell(conditions)}"


def difference(found: list[float], base: list[float]) -> str:
    """Return how many points the means are apart, "none" where the two ranges overlap."""
    if max(found) >= min(base) and min(found) <= max(base):
        return "none"
    return f"{statistics.mean(found) - statistics.mean(base):+.2f}"
