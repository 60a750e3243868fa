"""Result files as Markdown tables: the same ones that quantize.py prints and the README holds."""

import re

from lab.files import MB
from lab.tasks.cifar10 import CLASSES

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
MODELS = ("mobilevit_xxs", "mobilevit_xs", "mobilevit_s")
TITLES = {
    "fp32": "FP32",
    "fp16": "FP16 weights",
    "int8-fx": "INT8, torch FX",
    "int4-percentile": "INT4 weights, 1-99 percentile",
}
RUNS_ON = {  # the package behind an engine
    "openvino-bf16": "openvino",
    "torch-eager": "torch",
    "torch-fx": "torch",
    "torch-pt2e": "torch",
    "nncf": "openvino",
    "ort-static": "onnxruntime",
}
OPTIMIZERS = {"adamw": "AdamW", "muon": "Muon"}
PRODUCTS = {"Conv": "convolutions", "MatMul": "matrix products"}
HEADLINE = {(recipe, "openvino") for recipe in ("fp32", "w8a8", "w4")}
SIMULATED_COLUMNS = ("Model", "Method", "Accuracy %", "Δ points (changed)", "MB", "Smaller")
HEADLINE_COLUMNS = ("Model", "Method", "Engine", "Accuracy %", "Δ points (changed)", "MB", "Faster")
SIZE_SWEEP = ("fp32", "w8a8")  # recipes of the sweep over input sides, on OpenVINO


def markdown(lines: list[dict], left: int = 1) -> str:
    """A Markdown table of lines {column: text}; the first `left` columns are words, not numbers."""
    if not lines:
        return "No results yet."
    columns = list(lines[0])
    rule = ["---"] * left + ["---:"] * (len(columns) - left)
    table = (columns, rule, *(line.values() for line in lines))
    return "\n".join(f"| {' | '.join(cells)} |" for cells in table)


def in_order(rows: list[dict]) -> list[dict]:
    """By model from small to large, then measured before simulated, then as in TITLES."""
    models, recipes = list(MODELS), list(TITLES)

    def key(row):
        model, recipe = row["model"], row["recipe"]["name"]
        return (
            models.index(model) if model in models else len(models),
            model,
            row["img_size"],
            (row["kind"] == "simulated"),
            recipes.index(recipe) if recipe in recipes else len(recipes),
            recipe,
            not is_baseline(row),
        )

    return sorted(rows, key=key)


def baseline_of(row: dict, rows: list[dict]) -> dict | None:
    """The FP32 row of the same checkpoint in torch."""
    same = (r for r in rows if r["checkpoint_sha256"] == row["checkpoint_sha256"])
    return next((r for r in same if is_baseline(r)), None)


def is_baseline(row: dict) -> bool:
    return (row["recipe"]["name"], row["engine"]) == ("fp32", "torch-eager")


def in_protocol(row: dict) -> bool:
    """Whether it is one of the published re-implementation's four rows."""
    return row["recipe"]["name"] in TITLES and row["engine"].startswith(("torch", "published"))


def changed_predictions(row: dict, baseline: dict) -> int:
    """Images whose predicted class differs between two rows of the same test set."""
    return sum(a != b for a, b in zip(row["predictions"], baseline["predictions"], strict=True))


def twin(row: dict, rows: list[dict]) -> dict | None:
    """The row of the same recipe on the same images, simulated in torch on such a CPU: from what
    another computes, GPTQ chooses other codes."""
    same = ("checkpoint_sha256", "split", "img_size", "seed", "n_images", "cpu")
    for other in rows:
        alike = other is not row and all(other[name] == row[name] for name in same)
        if (
            alike
            and other["recipe"]["name"] == row["recipe"]["name"]
            and (other["kind"] == "simulated")
        ):
            return other
    return None


def agreement_pct(row: dict, other: dict) -> float:
    """Share of images on which two rows predict the same."""
    return 100 - 100 * changed_predictions(row, other) / row["n_images"]


def speed_up(row: dict) -> float:
    """Over FP32 in torch at the side that the network was trained for, timed in turn."""
    return row["fp32_latency_ms"]["median"] / row["latency_ms"]["median"]


def cpu(row: dict) -> str:
    """What the row's CPU has to compute with; only between such rows speed-ups compare."""
    return row["cpu"].rpartition(", ")[2]


def arithmetic(row: dict) -> str:
    """In which numbers the row's network computed."""
    if row["kind"] == "simulated":
        return "FP32, simulated"
    elsewhere = "BF16" if row["engine"] == "openvino-bf16" else "FP32"
    products = row["products"]
    if products and any(products["int8"].values()):
        counts = (
            f"{kind} {products['int8'].get(kind, 0)}/{all_products(products, kind)}"
            for kind in PRODUCTS
        )
        return f"INT8 ({', '.join(counts)})"
    return "INT8" if row["recipe"]["peer"] and products is None else elsewhere


def all_products(products: dict, kind: str) -> int:
    return products["int8"].get(kind, 0) + products["float"].get(kind, 0)


def products_text(products: dict) -> str:
    """What an engine computed in integers, and why it did not compute the rest so."""
    n = {kind: products["int8"].get(kind, 0) for kind in PRODUCTS}
    of = {kind: all_products(products, kind) for kind in PRODUCTS}
    text = ", ".join(f"{n[kind]} of {of[kind]} {name}" for kind, name in PRODUCTS.items())
    if "asked" not in products:
        return f"  {text} in INT8"
    # Of both kinds together: an engine may compute a pointwise convolution as a matrix product.
    asked = sum(products["asked"].values())
    why = {
        "by the recipe": sum(of.values()) - asked,
        "for want of a kernel": asked - sum(n.values()),
    }
    floats = ", ".join(f"{m} {reason}" for reason, m in why.items() if m > 0)
    return f"  {text} in INT8" + (f"; in float {floats}" if floats else "")


def published_text(model: str, recipe: str) -> str:
    if (model, recipe) not in PUBLISHED:
        return "-"
    accuracy_pct, size_mb, ms = PUBLISHED[model, recipe]
    return f"{accuracy_pct:.2f} / {size_mb:.2f} / {'-' if ms is None else ms}"


def results_table(rows: list[dict], all_rows: list[dict]) -> str:
    """Accuracy, size and latency, each against the FP32 row among `all_rows`: a line a row. Rows of
    the published protocol also have the published figures; the two kinds don't mix in one table."""
    lines = []
    for row in in_order(rows):
        line = result_line(row, all_rows)
        if in_protocol(row):
            line["Published % / MB / ms"] = published_text(row["model"], row["recipe"]["name"])
        else:
            simulated = twin(row, all_rows)
            line["As simulated"] = f"{agreement_pct(row, simulated):.2f} %" if simulated else "-"
        lines.append(line)
    return markdown(lines, left=4)


def headline_table(rows: list[dict]) -> str:
    """The few rows and columns that most readers want."""
    shown = [r for r in rows if is_baseline(r) or (r["recipe"]["name"], r["engine"]) in HEADLINE]
    return short_table(shown, rows, HEADLINE_COLUMNS, left=3)


def simulated_table(rows: list[dict], all_rows: list[dict]) -> str:
    """Simulated rows, without what only an engine's can say."""
    return short_table(rows, all_rows, SIMULATED_COLUMNS, left=2)


def short_table(rows: list[dict], all_rows: list[dict], columns: tuple[str, ...], left: int) -> str:
    lines = [result_line(row, all_rows) for row in in_order(rows)]
    return markdown([{name: line[name] for name in columns} for line in lines], left)


def sizes_table(rows: list[dict]) -> str:
    """Accuracy and speed of a sweep over input sides: a line a side."""
    by_side = {}
    for row in rows:
        by_recipe = by_side.setdefault((MODELS.index(row["model"]), row["img_size"]), {})
        by_recipe[row["recipe"]["name"]] = row
    lines = []
    for (model, side), by_recipe in sorted(by_side.items()):
        line = {"Model": MODELS[model], "Side": str(side)}
        for recipe in SIZE_SWEEP:
            row, title = by_recipe.get(recipe), TITLES.get(recipe, recipe)
            line[f"{title}, %"] = f"{row['score']['accuracy_pct']:.2f}" if row else "-"
            line[f"{title}, faster"] = f"{speed_up(row):.2f}x" if row else "-"
        lines.append(line)
    return markdown(lines)


def result_line(row: dict, all_rows: list[dict]) -> dict[str, str]:
    recipe, ms = row["recipe"]["name"], row["latency_ms"]["median"]
    baseline = baseline_of(row, all_rows)
    delta = smaller = faster = "baseline"
    if baseline is None:
        delta = smaller = "-"
    elif row is not baseline:
        points = row["score"]["accuracy_pct"] - baseline["score"]["accuracy_pct"]
        delta = f"{points:+.2f} ({changed_predictions(row, baseline)})"
        smaller = f"{baseline['size_bytes'] / row['size_bytes']:.2f}x"
    if not is_baseline(row):
        faster = f"{speed_up(row):.2f}x"
    return {
        "Model": row["model"],
        "Method": TITLES.get(recipe, recipe),
        "Engine": row["engine"],
        "Computed in": arithmetic(row),
        "Accuracy %": f"{row['score']['accuracy_pct']:.2f}",
        "Δ points (changed)": delta,
        "MB": f"{row['size_bytes'] / MB:.2f}" + " (est.)" * row["size_is_estimate"],
        "Smaller": smaller,
        "ms": f"{ms:.1f}",
        "Faster": "-" if (row["kind"] == "simulated") else faster,
        "CPU": cpu(row),
    }


def training_table(runs: list[dict]) -> str:
    """A line a training run, from its metrics.json."""
    lines = []
    for run in in_turn(runs):
        published = PUBLISHED.get((run["model"], "fp32"))
        config = run["config"]
        schedule = config["resolutions"].replace(",", ", ")
        start = "then " if run["first"] else "widened, " if config.get("widen") else ""
        how = f"{OPTIMIZERS[config.get('optimizer', 'adamw')]}, {config['precision'].upper()}"
        lines.append(
            {
                "Model": run["model"],
                "Schedule (side:epochs)": start + schedule,
                "Training": how,
                "Hardware": run["hardware"],
                "Parameters": f"{run['parameters']:,}",
                "Images/s, last side": f"{run['log'][-1]['images_per_s']:.0f}",
                "Training time": f"{run['train_s'] / 60:.0f} min",
                "Epoch chosen": str(run["epoch"]),
                "Validation %": f"{run['val_accuracy_pct']:.2f}",
                "Test %": f"{run['test_accuracy_pct']:.2f}",
                "Published test %": f"{published[0]:.2f}" if published else "-",
            }
        )
    return markdown(lines, left=4)


def in_turn(runs: list[dict]):
    """Each run, after the one that its weights came from."""
    for run in runs:
        yield from in_turn([run["first"]] if run["first"] else [])
        yield run


def classes_table(rows: list[dict]) -> str:
    """Per class and model: recall (accuracy on its images) and precision, of the FP32 rows."""
    rows = in_order([row for row in rows if is_baseline(row)])
    lines = [{"Class": name} for name in CLASSES]
    for row in rows:
        counts = row["confusion"]
        for k, line in enumerate(lines):
            given = sum(counts[true][k] for true in range(len(CLASSES)))
            line[f"{row['model']}, recall %"] = f"{100 * counts[k][k] / sum(counts[k]):.1f}"
            line[f"{row['model']}, precision %"] = (
                f"{100 * counts[k][k] / given:.1f}" if given else "-"
            )
    return markdown(lines)


def commands_block(rows: list[dict], runs: list[dict]) -> str:
    """For every published number: the command, the line it prints, the time it took."""
    parts = []
    for run in in_turn(runs):
        command = re.sub(r" --(data-dir|max-minutes) \S+| --output /\S+", "", run["command"])
        parts.append((command, f"{run['printed']}, after {run['train_s'] / 60:.0f} min"))
    for row in in_order(rows):
        recipe = row["recipe"]["name"]
        own = row["recipe"]["peer"] or in_protocol(row)  # no choice of an engine
        engine = "" if own else f" --engines {row['engine']}"
        command = f"python quantize.py --checkpoint {row['checkpoint']} --recipes {recipe}{engine}"
        parts.append((f"{command} --force", printed(row)))
    return "\n\n".join(f"```bash\n{command}\n# {line}\n```" for command, line in parts)


def printed(row: dict) -> str:
    """The line that quantize.py prints for a row."""
    return (
        f"{row['model']} {row['recipe']['name']}@{row['engine']}: {row['score']['accuracy_pct']:.2f} % "
        f"({row['n_correct']} of {row['n_images']}), {row['size_bytes'] / MB:.2f} MB, "
        f"{row['latency_ms']['median']:.1f} ms, in {row['wall_s']:.0f} s"
    )
