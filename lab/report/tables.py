"""Rows and training runs as Markdown tables: the ones that quantize.py prints and pages hold."""

import re
from pathlib import Path

from lab.files import MB
from lab.report.reading import (
    BASELINE,
    MODELS,
    SIZE_SWEEP,
    accuracy,
    agreement_pct,
    baseline_of,
    by_side,
    changed_predictions,
    cpu_kind,
    in_order,
    in_protocol,
    is_baseline,
    method,
    model_order,
    models_of,
    on_usual_cpu,
    simulated_row,
    speed_up,
    title_of,
)
from lab.report.rows import METRICS, has_predictions, metric, row_path

# What github.com/chanjoongx/mobilevit-quantization, whose protocol we follow, published in its
# README (commit 1317ecf; 100 epochs, checkpoint chosen on test images, another CPU): accuracy in %,
# size in MB, latency in ms.
PUBLISHED = {
    ("mobilevit_xxs", "fp32"): (93.99, 3.76, 11.7),
    ("mobilevit_xxs", "fp16"): (94.00, 1.93, 11.5),
    ("mobilevit_xxs", "int8-fx"): (91.08, 1.26, 21.6),
    ("mobilevit_xxs", "int4-percentile"): (23.43, 0.55, None),
    ("mobilevit_xs", "fp32"): (94.83, 7.52, 27.0),
    ("mobilevit_xs", "fp16"): (94.82, 3.81, 27.2),
    ("mobilevit_xs", "int8-fx"): (91.24, 2.29, 21.6),
    ("mobilevit_xs", "int4-percentile"): (51.75, 1.08, None),
    ("mobilevit_s", "fp32"): (95.44, 19.01, 67.7),
    ("mobilevit_s", "fp16"): (95.42, 9.55, 66.9),
    ("mobilevit_s", "int8-fx"): (91.02, 5.29, 64.2),
    ("mobilevit_s", "int4-percentile"): (11.22, 2.60, None),
}
PRODUCTS = {"Conv": "convolutions", "MatMul": "matrix products"}
EXACT = "torch-float64"  # the engine that simulates in float64
HEADLINE = (BASELINE, ("fp32", "openvino"), ("w8a8", "openvino"), ("w4", "openvino"))
HEADLINE_COLUMNS = ("Model", "Method", "Engine", "Accuracy %", "Δ points (changed)", "MB", "Faster")
SIMULATED_COLUMNS = (*HEADLINE_COLUMNS[:2], *HEADLINE_COLUMNS[3:6], "Smaller", "File")
NOT_OF_TASKS = ("ms (FP32 beside it)", "Smaller")
WORDS = {  # columns that hold no numbers
    *("Model", "Method", "Engine", "Computed in", "CPU", "File", "Schedule (side:epochs)"),
    *("Training", "Hardware", "Class", "Quantized", "Step", "Recipe", "Operations", "Benchmark"),
    *("Tried", "Variant", "Published network", "Our network", "Layer", "Tensor"),
}


# Text


def cell(value) -> str:
    """Return text from a file for a Markdown table: on one line, and nothing in it is markup."""
    text = " ".join(str(value).split())
    text = text.replace("&", "&amp;").replace("<", "&lt;")
    return re.sub(r"([\\`|*\[\]])", r"\\\1", text)


def code(value) -> str:
    """Return text from a file for a line of code, within backticks or a code fence."""
    return " ".join(str(value).split()).replace("`", "'").replace("<!--", "< !--")


def markdown(lines: list[dict]) -> str:
    """Return a Markdown table of lines {column: text that `cell` or this module made}.

    Lines with other columns get a table of their own, one after the other.
    """
    if not lines:
        return "No results yet."
    tables = {}
    for line in lines:
        rule = ["---" if name in WORDS else "---:" for name in line]
        tables.setdefault(tuple(line), [line, rule]).append(line.values())
    texts = ("\n".join(f"| {' | '.join(cells)} |" for cells in t) for t in tables.values())
    return "\n\n".join(texts)


# Rows


def arithmetic(row: dict) -> str:
    """Say in which numbers the row's network computed."""
    if row["kind"] == "integer":
        return "integers alone"
    if row["kind"] == "simulated":
        return "FP64, simulated" if row["engine"] == EXACT else "FP32, simulated"
    products = row["products"]
    if products and any(products["int8"].values()):
        counts = (f"{kind} {n}/{of}" for kind, (n, of) in in_int8(products).items())
        return f"INT8 ({', '.join(counts)})"
    if products is None and row["recipe"]["peer"]:
        return "INT8"
    return "BF16" if row["engine"].endswith("-bf16") else "FP32"


def in_int8(products: dict) -> dict[str, tuple[int, int]]:
    """Return {kind of PRODUCTS: (how many an engine computed in INT8, of how many)}."""
    int8, floats = ([products[key].get(k, 0) for k in PRODUCTS] for key in ("int8", "float"))
    return {kind: (n, n + m) for kind, n, m in zip(PRODUCTS, int8, floats)}


def products_text(products: dict) -> str:
    """Say what an engine computed in integers, and why it did not compute the rest so."""
    counts = in_int8(products)
    text = ", ".join(f"{n} of {of} {PRODUCTS[kind]}" for kind, (n, of) in counts.items())
    if "asked" not in products:
        return f"  {text} in INT8"
    # Of both kinds: an engine may compute a pointwise convolution as a matrix product.
    (n, of), asked = map(sum, zip(*counts.values())), sum(products["asked"].values())
    why = {"by the recipe": of - asked, "for want of a kernel": asked - n}
    floats = ", ".join(f"{m} {reason}" for reason, m in why.items() if m > 0)
    return f"  {text} in INT8" + (f"; in float {floats}" if floats else "")


def published_text(model: str, recipe: str) -> str:
    if (model, recipe) not in PUBLISHED:
        return "-"
    accuracy_pct, size_mb, ms = PUBLISHED[model, recipe]
    return f"{accuracy_pct:.2f} / {size_mb:.2f} / {'-' if ms is None else ms}"


def result_line(row: dict, all_rows: list[dict]) -> dict[str, str]:
    """Return one row as {column: text}, compared with the FP32 row among `all_rows`."""
    baseline = baseline_of(row, all_rows)
    delta = smaller = faster = "baseline"
    if baseline is None:
        delta = smaller = "-"
    elif row is not baseline:
        delta = f"{accuracy(row) - accuracy(baseline):+.2f}"
        delta += f" ({changed_predictions(row, baseline)})" if has_predictions(row) else ""
        smaller = f"{baseline['size_bytes'] / row['size_bytes']:.2f}x"
    if not is_baseline(row):
        faster = f"{speed_up(row):.2f}x" if row["kind"] == "measured" else "-"
    ms, fp32_ms = row["latency_ms"]["median"], row["fp32_latency_ms"]["median"]
    return {
        "Model": cell(row["model"]),
        "Method": cell(title_of(row["recipe"]["name"])),
        "Engine": cell(row["engine"]),
        "Computed in": arithmetic(row),
        f"{METRICS[metric(row)]} %": f"{accuracy(row):.2f}",
        "Δ points (changed)" if has_predictions(row) else "Δ points": delta,
        "MB": f"{row['size_bytes'] / MB:.2f}" + " (est.)" * row["size_is_estimate"],
        "Smaller": smaller,
        "ms (FP32 beside it)": f"{ms:.1f} ({fp32_ms:.1f})",
        "Faster": faster,
        "CPU": cell(cpu_kind(row)),
        # Within backticks, as GitHub takes w8a8@openvino.json for an address to write to.
        "File": f"`{code(row_path(Path(), row)).replace('|', '')}`",
    }


def results_table(rows: list[dict], all_rows: list[dict]) -> str:
    """Return a table of metric, size and latency, each against the FP32 row among `all_rows`.

    A line is a row. Those of the published protocol also have the published figures; they don't
    mix with others in one table.
    """
    lines = []
    for row in in_order(rows):
        line = result_line(row, all_rows)
        file = line.pop("File")
        if in_protocol(row):
            line["Published % / MB / ms"] = published_text(row["model"], row["recipe"]["name"])
        elif has_predictions(row):
            simulated = simulated_row(row, all_rows)
            line["As simulated"] = f"{agreement_pct(row, simulated):.2f} %" if simulated else "-"
        lines.append(line | {"File": file})
    return markdown(lines)


def headline_table(rows: list[dict]) -> str:
    """Return a table of the few rows and columns that most readers want.

    These are the rows of HEADLINE, in that order, of each MobileViT that has others than BASELINE.
    Speed-ups are on one kind of CPU.
    """
    shown = [row for row in rows if method(row) in HEADLINE and row["model"] in MODELS]
    shown.sort(key=lambda row: (model_order(row["model"]), HEADLINE.index(method(row))))
    quantized = [row for row in shown if not is_baseline(row)]
    models, timed = models_of(quantized), on_usual_cpu(quantized)
    lines = []
    for row in shown:
        if row["model"] not in models:
            continue
        line = result_line(row, rows)
        if row in quantized and row not in timed:
            line["Faster"] = "-"
        lines.append({name: line[name] for name in HEADLINE_COLUMNS})
    return markdown(lines)


def simulated_table(rows: list[dict], all_rows: list[dict]) -> str:
    """Return a table of simulated rows, without what only an engine's can say."""
    lines = [result_line(row, all_rows) for row in in_order(rows)]
    return markdown([{name: line[name] for name in SIMULATED_COLUMNS} for line in lines])


def task_table(rows: list[dict]) -> str:
    """Return a table of metric, size and speed of detectors or segmenters: a line a row."""
    lines = [result_line(row, rows) for row in in_order(rows)]
    return markdown([{k: v for k, v in line.items() if k not in NOT_OF_TASKS} for line in lines])


def sizes_table(rows: list[dict]) -> str:
    """Return a table of accuracy and speed over input sides: a line a model and side."""
    lines = []
    for (model, side), by_recipe in by_side(rows).items():
        line = {"Model": cell(model), "Side": str(side)}
        for recipe in SIZE_SWEEP:
            row, title = by_recipe.get(recipe), title_of(recipe)
            line[f"{title}, %"] = f"{accuracy(row):.2f}" if row else "-"
            line[f"{title}, faster"] = f"{speed_up(row):.2f}x" if row else "-"
        lines.append(line)
    return markdown(lines)


def printed(row: dict) -> str:
    """Return the line that quantize.py prints for a row."""
    if has_predictions(row):
        judged = f"{accuracy(row):.2f} % ({row['n_correct']} of {row['n_images']})"
    else:
        judged = f"{accuracy(row):.2f} % {METRICS[metric(row)]} ({row['n_images']} images)"
    top_5 = f", top-5 {row['score']['top5_pct']:.2f} %" if "top5_pct" in row["score"] else ""
    return (
        f"{row['model']} {row['recipe']['name']}@{row['engine']}: {judged}{top_5}, "
        f"{row['size_bytes'] / MB:.2f} MB, "
        f"{row['latency_ms']['median']:.1f} ms, in {row['wall_s']:.0f} s"
    )
