"""Tables of what is no single row: training runs, reports per layer, the ablation, benchmarks."""

import statistics
from pathlib import Path

from lab.report.reading import (
    accuracy,
    changed_predictions,
    cpu_kind,
    in_order,
    is_baseline,
    model_order,
    models_of,
    order,
    short_name,
    title_of,
)
from lab.report.tables import PUBLISHED, cell, code, markdown

# The order of the recipes on held-out images; others follow by name. The last three lines are
# ranking: without, alone, both, and as published.
ABLATION = """
fp32 w4-minmax w4-nearest w4-replace w4-shift w4-biases w4-gptq w4-adaround w4 w4-adaround-shift
w4-mixed-nearest w4-mixed w4a8-nearest w4a8 w6a6-nearest w6a6
w8a8 w8a8-equalized w8a8-nearest w8a8-replace w8a8-minmax w8a8-percentile w8a8-kl w8a8-tensor
w8a8-norms w8a8-silu w8a7 w8a8-early as-fx as-fx-8bit as-fx-silu as-fx-early as-fx-shift
w8a8-similarity w8a8-ranking-alone w8a8-ranking w8a8-ranking-published
w6a6-similarity w6a6-ranking-alone w6a6-ranking w6a6-ranking-published
w4a8-similarity w4a8-ranking-alone w4a8-ranking w4a8-ranking-published
""".split()
CONTENDERS = {  # of lab.bench train
    "timm": "timm {timm}",
    "published": "our network in the published loop",
    "published batches": "images augmented and resized one by one",
    "contiguous": "tensors not channels-last",
    "unfused": "AdamW not fused",
    "fp32": "FP32",
    "fused attention": "fused attention",
}
OPTIMIZERS = {"adamw": "AdamW", "muon": "Muon", "sgd": "SGD"}
RUNS_ON = {  # the package behind an engine, where it is not called like it
    "openvino-bf16": "openvino",
    "published": "torch",
    "torch-eager": "torch",
    "torch-fx": "torch",
    "torch-pt2e": "torch",
    "nncf": "openvino",
    "nncf-control": "openvino",
    "ort-static": "onnxruntime",
}
NODES = {  # OpenVINO's types of nodes
    "convolutions": ("Convolution",),
    "depthwise convolutions": ("GroupConvolution",),
    "linear layers": ("FullyConnected", "FullyConnectedQuantizedLegacy"),
    "attention and elementwise": ("Subgraph",),
    "statistics of layer norms": ("MVN",),
}
ARITHMETIC = ("INT8", "BF16", "FP32")  # of such nodes
OTHERS = ("all others", "")


# Classes


def classes_table(rows: list[dict]) -> str:
    """Return a table of FP32's recall (accuracy on its images) and precision: a line a class."""
    rows = in_order([row for row in rows if is_baseline(row)])
    classes = rows[0]["classes"] if rows else []
    rows = [row for row in rows if row["classes"] == classes]
    lines = []
    for k, name in enumerate(classes):
        line = {"Class": cell(name)}
        for row in rows:
            right, model = row["confusion"][k][k], cell(row["model"])
            of_class = sum(row["confusion"][k])
            given = sum(counts[k] for counts in row["confusion"])
            line[f"{model}, recall %"] = percent_text(right, of_class)
            line[f"{model}, precision %"] = percent_text(right, given)
        lines.append(line)
    return markdown(lines)


def percent_text(part: int, whole: int) -> str:
    return f"{100 * part / whole:.1f}" if whole else "-"


# Training


def run_chain(run: dict) -> list[dict]:
    """Return the runs that the weights of a run came from, oldest first, then the run."""
    return [*run["before"], run]


def training_table(runs: list[dict]) -> str:
    """Return a table of training runs and those before them: a line a run."""
    lines = []
    for i, run in (part for last in runs for part in enumerate(run_chain(last))):
        config, model = run["config"], run["model"]
        start = "widened, " if config.get("widen") else "then " if i else ""
        optimizer = config.get("optimizer", "adamw")
        how = f"{OPTIMIZERS.get(optimizer, optimizer)}, {config['precision'].upper()}"
        if config.get("teacher"):
            how += f", taught by {Path(config['teacher']).parent.name}"
        published = PUBLISHED.get((model, "fp32"))
        lines.append(
            {
                "Model": cell(model),
                "Schedule (side:epochs)": start + cell(config["resolutions"].replace(",", ", ")),
                "Training": cell(how),
                "Hardware": cell(run["hardware"]),
                "Parameters": f"{run['parameters']:,}",
                "Images/s, last side": f"{run['log'][-1]['images_per_s']:.0f}",
                "Training time": f"{run['train_s'] / 60:.0f} min",
                "Epoch chosen": str(run["epoch"]),
                "Validation %": f"{run['val_accuracy_pct']:.2f}",
                "Test %": f"{run['test_accuracy_pct']:.2f}",
                "Published test %": f"{published[0]:.2f}" if published else "-",
            }
        )
    return markdown(lines)


def commands_block(runs: list[dict]) -> str:
    """Return the command of every training run, with the line that it prints and its time."""
    blocks = (
        f"```bash\n{code(run['command'])}\n"
        f"# {code(run['printed'])}, after {run['train_s'] / 60:.0f} min\n```"
        for last in runs
        for run in run_chain(last)
    )
    return "\n\n".join(blocks)


# Layers


def noises_of(report: dict) -> list[tuple[float, str, str]]:
    """Return (noise in the logits, kind, name) of each tensor that a report quantizes alone.

    The largest noise comes first. A kind is "weight", "input" or "activation".
    """
    return sorted(
        (
            (noise, kind.removesuffix("s"), name.removesuffix(".input"))
            for kind, of_layers in report["noise"].items()
            for name, noise in of_layers.items()
        ),
        reverse=True,
    )


def per_layer_table(report: dict | None) -> str:
    """Return a table of the tensors that change the logits most when they alone are quantized.

    Then comes what all others do together, and what all do.
    """
    if report is None:
        return markdown([])
    noises, largest = noises_of(report), report["largest"]
    shown = [(noise, f"{kind} of {name}") for noise, kind, name in noises[:largest]]
    if len(noises) > largest:
        shown.append((report["noise_of_rest"], f"the other {len(noises) - largest} together"))
    shown.append((report["noise_of_all"], "all together"))
    return markdown(
        [{"Quantized": cell(what), "Noise in the logits": f"{x:.6f}"} for x, what in shown]
    )


# Steps


def by_recipe(rows: list[dict]) -> dict[str, list[dict]]:
    """Return {recipe: its rows}, in the order of ABLATION."""
    found = {}
    for row in rows:
        found.setdefault(row["recipe"]["name"], []).append(row)
    return {name: found[name] for name in sorted(found, key=lambda name: order(name, ABLATION))}


def ablation_table(rows: list[dict]) -> str:
    """Return a table of accuracy on held-out images: a line a step.

    Of several seeds of calibration, it has the mean and standard deviation.
    """
    lines = []
    for model in models_of(rows):
        recipes = by_recipe([row for row in rows if row["model"] == model])
        baseline = recipes.get("fp32", [None])[0]
        for recipe, seeds in recipes.items() if baseline else ():
            points = statistics.mean(map(accuracy, seeds)) - accuracy(baseline)
            lines.append(
                {
                    "Model": cell(model),
                    "Step": cell(seeds[0]["recipe"]["title"]),
                    "Recipe": cell(recipe),
                    "Held-out %": mean_text([accuracy(row) for row in seeds], 2),
                    "Δ points": f"{points:+.2f}",
                    "Changed": mean_text([changed_predictions(r, baseline) for r in seeds], 0),
                    "Seeds": str(len(seeds)),
                }
            )
    return markdown(lines)


def mean_text(values: list[float], digits: int) -> str:
    """Return the mean and, of several values, their standard deviation."""
    spread = f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.{digits}f}{spread}"


# Speed


def speed_table(benches: list[dict]) -> str:
    """Return a table of latencies from lab.bench engines, in ms and as shares of FP32's.

    A line is a method and engine, the fastest of the first model first. There are columns for each
    model, and a table for each kind of CPU.
    """
    kinds = {cpu_kind(bench) for bench in benches}
    if len(kinds) > 1:
        tables = {k: speed_table([b for b in benches if cpu_kind(b) == k]) for k in sorted(kinds)}
        return "\n\n".join(f"{cell(kind)}:\n\n{table}" for kind, table in tables.items())
    by_model, versions = {}, {}
    for bench in sorted(benches, key=lambda b: model_order(b["model"])):
        ms = {name: times["median"] for name, times in bench["latency_ms"].items()}
        by_model[cell(short_name(bench["model"]))] = ms
        versions = bench["engine_versions"] | versions
    lines = []
    for name in dict.fromkeys(n for ms in by_model.values() for n in sorted(ms, key=ms.get)):
        recipe, _, engine = name.partition("@")
        line = {"Method": cell(title_of(recipe)), "Engine": cell(f"{engine} {versions[engine]}")}
        for model, ms in by_model.items():
            t = ms.get(name)
            line |= {
                f"{model} ms": f"{t:.1f}" if t else "-",
                f"{model} of torch's FP32": share(t, ms.get("fp32@torch-eager")),
                f"{model} of the library's FP32": share(t, ms.get(f"fp32@{library(engine)}")),
            }
        lines.append(line)
    return markdown(lines)


def library(engine: str) -> str:
    """Return the engine that runs networks in FP32 by the same library."""
    runner = RUNS_ON.get(engine, engine)
    return "torch-eager" if runner == "torch" else runner


def share(part: float | None, whole: float | None) -> str:
    return f"{part / whole:.2f}" if part and whole else "-"


def node_times(nodes: dict[str, float]) -> dict[tuple[str, str], float]:
    """Return milliseconds of one call by (kind of NODES, arithmetic), and those of OTHERS."""
    kinds = {node: kind for kind, types in NODES.items() for node in types}
    times = {}
    for key, ms in nodes.items():
        node, _, arithmetic = key.rpartition(" ")
        known = node in kinds and arithmetic in ARITHMETIC
        at = (kinds[node], arithmetic) if known else OTHERS
        times[at] = times.get(at, 0) + ms
    return times


def profile_table(bench: dict | None) -> str:
    """Return a table of the milliseconds that OpenVINO spends in its types of nodes.

    A line is a type and its arithmetic, a column a method.
    """
    if bench is None:
        return markdown([])
    columns = {cell(name): node_times(nodes) for name, nodes in bench["ms"].items()}
    parts = [(kind, arithmetic) for kind in NODES for arithmetic in ARITHMETIC] + [OTHERS]
    lines = []
    for part in parts:
        times = {name: of_parts.get(part, 0) for name, of_parts in columns.items()}
        if any(times.values()) or part == OTHERS:
            lines.append({"Operations": ", ".join(filter(None, part))} | times)
    lines.append({"Operations": "together"} | {n: sum(t.values()) for n, t in columns.items()})
    return markdown(
        [{k: v if k == "Operations" else f"{v:.2f}" for k, v in line.items()} for line in lines]
    )


def benchmarks_table(benchmarks: dict[str, list[dict]]) -> str:
    """Return a table with a line a comparison of lab.bench train and loader."""
    lines = []

    def add(benchmark, ours, against, ratio):
        lines.append({"Benchmark": benchmark, "Ours": ours, "Against": against, "Ratio": ratio})

    for train in benchmarks["train"]:
        speeds, side = train["images_per_s"], train["img_size"]
        benchmark = (
            f"Training {train['model']} with four heads at {side}x{side}, "
            f"{train['precision'].upper()}, {train['hardware']}"
        )
        for name, ratio in train["ratio"].items():
            against = CONTENDERS.get(name, name).replace("{timm}", train["timm"])
            against = cell(f"{against}: {speeds[name]:.1f} images/s")
            add(cell(benchmark), f"{speeds['ours']:.1f} images/s", against, f"{ratio:.2f}")
            benchmark = "The same"
    for loader in benchmarks["loader"]:
        taken, side = loader["training_images_per_s"], loader["img_size"]
        against = f"training at {side}x{side} on {loader['device']}: {taken:.1f} images/s"
        for augment, made in loader["loader_images_per_s"].items():
            benchmark = cell(f"Loader, one core, augmentation {augment}")
            add(benchmark, f"{made:.0f} images/s", cell(against), f"{made / taken:.0f}")
    return markdown(lines)


def abuse_table(benchmarks: list[dict]) -> str:
    """Return a table of lab.bench abuse: a line a kind of malformed input or kill, and a sum."""
    counts = {name: kind for bench in benchmarks for name, kind in bench["kinds"].items()}
    if counts:
        counts["together"] = {w: sum(k[w] for k in counts.values()) for w in ("inputs", "faults")}
    return markdown(
        [
            {"Tried": cell(name), "Inputs": str(kind["inputs"]), "Faults": str(kind["faults"])}
            for name, kind in counts.items()
        ]
    )
