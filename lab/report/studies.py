"""Tables of what is no single row: reports per layer, the ablation, benchmarks."""

import statistics

from lab.report.tables import MODELS, RUNS_ON, TITLES, changed_predictions, markdown

LARGEST = 10

ABLATION = {  # what each recipe does, beside the one before or beside w8a8
    "fp32": "float",
    "w4-minmax": "W4: to nearest, ranges up to the extremes",
    "w4-nearest": "ranges of least squared error",
    "w4-replace": "with statistics of norms replaced",
    "w4-shift": "with statistics of norms shifted",
    "w4-biases": "and biases without a norm after them corrected",
    "w4-gptq": "GPTQ, norms shifted",
    "w4-adaround": "AdaRound by layer",
    "w4": "AdaRound by block",
    "w4-adaround-shift": "the same, then norms shifted",
    "w4-mixed-nearest": "W4, stem, depthwise and classifier 8: to nearest",
    "w4-mixed": "GPTQ, norms shifted",
    "w4a8-nearest": "W4A8: to nearest, ranges of least squared error",
    "w4a8": "GPTQ, norms shifted",
    "w6a6-nearest": "W6A6: to nearest, ranges of least squared error",
    "w6a6": "GPTQ, norms shifted",
    "w8a8": "W8A8: to nearest, norms shifted",
    "w8a8-equalized": "with layer norms equalized",
    "w8a8-nearest": "without norms shifted",
    "w8a8-replace": "with statistics of norms replaced",
    "w8a8-minmax": "with activations from extreme to extreme",
    "w8a8-percentile": "with activations up to the 99.99th percentile",
    "w8a8-kl": "with activations of least KL divergence",
    "w8a8-tensor": "with one scale per weight tensor",
    "w8a8-norms": "with 8-bit inputs of layer norms, too",
    "w8a8-silu": "with 8-bit inputs of SiLU, too",
    "w8a7": "with 7 bits for activations",
    "w8a8-early": "with the five early inputs in 8 bits, too",
}
CONTENDERS = {  # of lab.bench train
    "timm": "timm {timm}",
    "published": "our network in the published loop",
    "published batches": "images augmented and resized one by one",
    "contiguous": "tensors not channels-last",
    "unfused": "AdamW not fused",
    "fp32": "FP32",
    "fused attention": "fused attention",
}
NODES = {  # OpenVINO's types of nodes
    "convolutions": ("Convolution",),
    "depthwise convolutions": ("GroupConvolution",),
    "linear layers": ("FullyConnected", "FullyConnectedQuantizedLegacy"),
    "attention and elementwise": ("Subgraph",),
    "statistics of layer norms": ("MVN",),
}


def per_layer_table(report: dict | None) -> str:
    """The tensors that change the logits most when they alone are quantized, what all others do
    together, and what all do."""
    if report is None:
        return markdown([])
    noises = [
        (noise, f"{kind.removesuffix('s')} of {name.removesuffix('.input')}")
        for kind, of_layers in report["noise"].items()
        for name, noise in of_layers.items()
    ]
    noises.sort(reverse=True)
    shown = noises[:LARGEST]
    if len(noises) > LARGEST:
        shown.append((report["noise_of_rest"], f"the other {len(noises) - LARGEST} together"))
    shown.append((report["noise_of_all"], "all together"))
    return markdown([{"Quantized": what, "Noise in the logits": f"{x:.4f}"} for x, what in shown])


def ablation_table(rows: list[dict]) -> str:
    """Accuracy on held-out images, mean and deviation over seeds of calibration: a line a step."""
    lines = []
    for model in MODELS:
        by_recipe = {}
        for row in rows:
            if row["model"] == model and row["engine"] == "torch-eager":
                by_recipe.setdefault(row["recipe"]["name"], []).append(row)
        for recipe, step in ABLATION.items():
            if recipe in by_recipe and "fp32" in by_recipe:
                (baseline, *_), seeds = by_recipe["fp32"], by_recipe[recipe]
                accuracy = statistics.mean(row["score"]["accuracy_pct"] for row in seeds)
                lines.append(
                    {
                        "Model": model,
                        "Step": step,
                        "Recipe": recipe,
                        "Held-out %": mean_text([row["score"]["accuracy_pct"] for row in seeds], 2),
                        "Δ points": f"{accuracy - baseline['score']['accuracy_pct']:+.2f}",
                        "Changed": mean_text([changed_predictions(r, baseline) for r in seeds], 0),
                        "Seeds": str(len(seeds)),
                    }
                )
    return markdown(lines, left=3)


def mean_text(values: list[float], digits: int) -> str:
    """Mean and, of several, standard deviation."""
    spread = f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.{digits}f}{spread}"


def speed_table(benches: list[dict]) -> str:
    """Latencies from lab.bench engines, in milliseconds and as shares of FP32's, for each model: a
    line a method and engine, the fastest of the first model first."""
    by_model, versions = {}, {}
    for bench in benches:
        ms = {name: times["median"] for name, times in bench["latency_ms"].items()}
        by_model[bench["model"].upper()] = ms
        versions = bench["engine_versions"] | versions
    lines = []
    for name in dict.fromkeys(n for ms in by_model.values() for n in sorted(ms, key=ms.get)):
        recipe, engine = name.split("@")
        line = {"Method": TITLES.get(recipe, recipe), "Engine": f"{engine} {versions[engine]}"}
        for model, ms in by_model.items():
            t = ms.get(name)
            line |= {
                f"{model} ms": f"{t:.1f}" if t else "-",
                f"{model} of torch's FP32": share(t, ms.get("fp32@torch-eager")),
                f"{model} of the library's FP32": share(t, ms.get(f"fp32@{library(engine)}")),
            }
        lines.append(line)
    return markdown(lines, left=2)


def library(engine: str) -> str:
    """The engine that runs networks in FP32 by the same library."""
    runner = RUNS_ON.get(engine, engine)
    return "torch-eager" if runner == "torch" else runner


def share(part: float | None, whole: float | None) -> str:
    return f"{part / whole:.2f}" if part and whole else "-"


def profile_table(bench: dict | None) -> str:
    """Milliseconds that OpenVINO spends in its types of nodes: a line a type and its arithmetic, a
    column a method."""
    if bench is None:
        return markdown([])
    lines, shown = [], set()
    for kind, types in NODES.items():
        for arithmetic in ("INT8", "BF16", "FP32"):
            keys = [f"{node} {arithmetic}" for node in types]
            shown.update(keys)
            line = {name: sum(ms.get(key, 0) for key in keys) for name, ms in bench["ms"].items()}
            if any(line.values()):
                lines.append({"Operations": f"{kind}, {arithmetic}"} | line)
    rest = {
        name: sum(ms for key, ms in nodes.items() if key not in shown)
        for name, nodes in bench["ms"].items()
    }
    total = {name: sum(nodes.values()) for name, nodes in bench["ms"].items()}
    lines += [{"Operations": "all others"} | rest, {"Operations": "together"} | total]
    return markdown(
        [{k: v if k == "Operations" else f"{v:.2f}" for k, v in line.items()} for line in lines]
    )


def benchmarks_table(results: dict[str, dict]) -> str:
    """A line a comparison, from results/benchmarks/."""
    lines = []

    def add(benchmark, ours, against, ratio):
        lines.append({"Benchmark": benchmark, "Ours": ours, "Against": against, "Ratio": ratio})

    if train := results.get("train"):
        speeds, side = train["images_per_s"], train["img_size"]
        benchmark = (
            f"Training mobilevit_{train['variant']} with four heads at {side}x{side}, "
            f"{train['precision'].upper()}, {train['hardware']}"
        )
        for name, ratio in train["ratio"].items():
            against = CONTENDERS[name].format(**train)
            ours = f"{speeds['ours']:.1f} images/s"
            add(benchmark, ours, f"{against}: {speeds[name]:.1f} images/s", f"{ratio:.2f}")
            benchmark = "The same"
    if sweep := results.get("sweep"):
        add(
            f"Quantization sweep of {sweep['test_images']} test and "
            f"{sweep['calibration_images']} calibration images, {sweep['threads']} cores",
            f"{sweep['ours_s']:.0f} s",
            f"the published way, one thread: {sweep['published_way_s']:.0f} s",
            f"{sweep['ratio']:.2f}",
        )
    if loader := results.get("loader"):
        taken, side = loader["training_images_per_s"], loader["img_size"]
        for augment, made in loader["loader_images_per_s"].items():
            add(
                f"Loader, one core, augmentation {augment}",
                f"{made:.0f} images/s",
                f"training at {side}x{side} on {loader['device']}: {taken:.1f} images/s",
                f"{made / taken:.0f}",
            )
    return markdown(lines, left=1)
