"""Figures and the tables of README and model card, from results/ and the training logs alone.

    python plots.py             # figures -> results/figures/*.png and *.svg, 10 s
    python plots.py --readme    # also rewrite the tables between their markers
    python plots.py --check     # write nothing; fail if a table differs from results/

Prints the path of every file written. Rows and runs on the synthetic data set are left out.
"""

import argparse
import csv
import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

import tables
from data import CLASSES
from mobilevit import MobileViT
from rows import MB, BadInput, atomic, command, read_json, sha256, write_text

# Okabe and Ito's palette, told apart with any colour vision.
COLOURS = {"mobilevit_xxs": "#0072B2", "mobilevit_xs": "#E69F00", "mobilevit_s": "#009E73"}
MARKERS = {"fp32": "o", "fp16": "s", "int8-fx": "^", "int4-percentile": "v"}
WIDTH_IN = 8.5  # inches; 850 pixels at the 100 dpi of a README column


def parse_args():
    p = argparse.ArgumentParser(
        description=__doc__.split("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    p.add_argument("--results", default="results", help="folder of the result files")
    p.add_argument("--checkpoints", default="checkpoints", help="folder of the training logs")
    p.add_argument("--readme-file", default="README.md", help="file that holds the tables")
    what = p.add_mutually_exclusive_group()
    what.add_argument("--readme", action="store_true", help="also rewrite the tables")
    what.add_argument("--check", action="store_true", help="fail if the tables differ")
    args = p.parse_args()
    if not Path(args.results).is_dir():
        raise BadInput(f"no folder {args.results}: run quantize.py first or name it with --results")
    return args


def load_rows(folder, checkpoints) -> list[dict]:
    """The rows to publish: of shipped CIFAR-10 weights, with every setting as the recipe has it."""
    shipped = {sha256(path) for path in Path(checkpoints).glob("*/best.pth")}
    rows = [read_json(path) for path in sorted(Path(folder).glob("*/*@*.json"))]
    return [row for row in rows if row["checkpoint_sha256"] in shipped and is_protocol(row)]


def is_protocol(row: dict) -> bool:
    protocol = {
        "dataset": "cifar10",
        "split": "test",
        "img_size": 256,
        "n_images": 10_000,
        "calibration_images": row["recipe"]["calibration_images"],
        "seed": 0,
        "latency_runs": 100,
    }
    return all(row[name] == value for name, value in protocol.items())


def load_runs(folder) -> list[dict]:
    """The metrics.json of all finished CIFAR-10 runs under `folder`, each with its log."""
    runs = []
    for path in sorted(Path(folder).glob("*/metrics.json")):
        run = read_json(path)
        if run["config"]["dataset"] == "cifar10":
            with open(path.with_name("log.csv")) as file:
                log = [{k: float(v) for k, v in row.items()} for row in csv.DictReader(file)]
            began = read_json(path.with_name("config.json"))  # its command is that of the start
            variant = run["config"]["variant"]
            described = {
                "log": log,
                "model": f"mobilevit_{variant}",
                "command": began["command"],
                "parameters": sum(p.numel() for p in MobileViT(variant).parameters()),
            }
            runs.append(run | described)
    return sorted(runs, key=lambda run: tables.MODELS.index(run["model"]))


def training_curves(runs):
    fig, (left, right) = plt.subplots(1, 2, figsize=(WIDTH_IN, 3.4))
    for run in runs:
        log, colour = run["log"], COLOURS[run["model"]]
        epochs = [row["epoch"] for row in log]
        for axis, name in ((left, "accuracy_pct"), (right, "loss")):
            axis.plot(
                epochs,
                [r[f"train_{name}"] for r in log],
                "--",
                color=colour,
                alpha=0.7,
                label=f"{run['model']}, training",
            )
            axis.plot(
                epochs,
                [r[f"val_{name}"] for r in log],
                "-",
                color=colour,
                marker="o",
                markersize=3,
                label=f"{run['model']}, held-out",
            )
        if len(runs) == 1:  # the sides of several runs would cover each other
            for before, row in zip(log, log[1:]):
                sides = [{r["window"], r["img_size"]} for r in (before, row)]
                if sides[0] != sides[1]:
                    for axis in (left, right):
                        axis.axvline(row["epoch"] - 0.5, color="#999999", linewidth=0.8)
                    left.annotate(
                        " of ".join(f"{side:.0f}" for side in sorted(sides[1])) + " px",
                        (row["epoch"] - 0.45, 0.02),
                        xycoords=("data", "axes fraction"),
                        fontsize=8,
                        rotation=90,
                    )
    left.set(xlabel="epoch", ylabel="accuracy, %")
    right.set(xlabel="epoch", ylabel="loss (training: with label smoothing)")
    left.legend(fontsize=8)
    return fig


def methods(rows):
    """Accuracy, size and latency by method, grouped by variant."""
    rows = [row for row in rows if row["model"] in tables.MODELS and tables.in_protocol(row)]
    models = [m for m in tables.MODELS if any(row["model"] == m for row in rows)]
    recipes = [name for name in tables.TITLES if any(r["recipe"]["name"] == name for r in rows)]
    by_method = {(row["model"], row["recipe"]["name"]): row for row in rows}
    panels = (
        ("test accuracy, %", lambda r: r["accuracy_pct"], "{:.1f}"),
        ("file size, MB", lambda r: r["size_bytes"] / MB, "{:.2f}"),
        ("latency, ms, one thread", lambda r: r["latency_ms"]["median"], "{:.0f}"),
    )
    fig, axes = plt.subplots(1, 3, figsize=(WIDTH_IN, 0.9 + 0.42 * len(models) * len(recipes)))
    for axis, (label, value, form) in zip(axes, panels):
        ticks, names = [], []
        for i, model in enumerate(models):
            for j, recipe in enumerate(recipes):
                row = by_method.get((model, recipe))
                if row is None:
                    continue
                y = i * (len(recipes) + 0.6) + j
                hatch = "//" if row["simulated"] else None
                axis.barh(y, value(row), color=COLOURS[model], hatch=hatch, edgecolor="white")
                text = " " + form.format(value(row))
                axis.annotate(text, (value(row), y), va="center", fontsize=8)
                size = model.removeprefix("mobilevit_").upper()
                ticks.append(y)
                names.append(f"{size} {tables.TITLES[recipe].split(',')[0]}")
        axis.set_yticks(ticks, names if axis is axes[0] else [""] * len(names))
        axis.invert_yaxis()
        axis.grid(visible=False, axis="y")
        axis.set_xlabel(label)
        axis.set_xlim(right=axis.get_xlim()[1] * 1.18)
    fig.suptitle("hatched: low-bit weights simulated in FP32", fontsize=9)
    return fig


def pareto(rows):
    """Accuracy against size; hollow: the published re-implementation."""
    fig, axis = plt.subplots(figsize=(WIDTH_IN, 4))
    for model in tables.MODELS:
        ours = [r for r in rows if r["model"] == model and tables.in_protocol(r)]
        ours.sort(key=lambda row: -row["size_bytes"])
        if not ours:
            continue
        points = [(r["recipe"]["name"], r["size_bytes"] / MB, r["accuracy_pct"]) for r in ours]
        theirs = [(k, v[1], v[0]) for (m, k), v in tables.PUBLISHED.items() if m == model]
        for these, face, style in ((points, COLOURS[model], "-"), (theirs, "none", ":")):
            axis.plot(
                [x for _, x, _ in these],
                [y for *_, y in these],
                style,
                lw=0.8,
                color=COLOURS[model],
            )
            for recipe, x, y in these:
                axis.plot(x, y, MARKERS.get(recipe, "D"), color=COLOURS[model], mfc=face, ms=8)
    for model in (m for m in tables.MODELS if any(row["model"] == m for row in rows)):
        axis.plot([], [], "-", color=COLOURS[model], label=model)
    axis.plot([], [], ":", color="black", label="published, hollow")
    for recipe, marker in MARKERS.items():
        axis.plot([], [], marker, color="black", mfc="none", label=tables.TITLES[recipe])
    axis.set_xscale("log", base=2)
    axis.xaxis.set_major_formatter("{x:g}")
    axis.set(xlabel="size of the weights, MB", ylabel="test accuracy, %")
    axis.legend(fontsize=8)
    return fig


def confusions(rows):
    """Which classes are taken for which, in percent of the true class, for each FP32 row."""
    rows = [row for row in tables.in_order(rows) if tables.is_baseline(row)]
    fig, axes = plt.subplots(1, len(rows), figsize=(WIDTH_IN, 1 + WIDTH_IN / max(2, len(rows))))
    for axis, row in zip(fig.axes, rows):
        percent = [[100 * n / sum(line) for n in line] for line in row["confusion"]]
        axis.imshow(percent, cmap="Blues", vmin=0, vmax=20)  # the errors, not the diagonal
        for true, line in enumerate(percent):
            for given, value in enumerate(line):
                if round(value) >= 1:
                    colour = "white" if value > 10 else "black"
                    axis.annotate(
                        f"{value:.0f}",
                        (given, true),
                        ha="center",
                        va="center",
                        color=colour,
                        fontsize=7,
                    )
        ticks = range(len(CLASSES))
        axis.set_xticks(ticks, CLASSES, rotation=90, fontsize=8)
        axis.set_yticks(ticks, CLASSES if axis is fig.axes[0] else [""] * len(CLASSES), fontsize=8)
        axis.grid(visible=False)
        axis.set(title=row["model"], xlabel="predicted")
    fig.axes[0].set_ylabel("true")
    return fig


def save(fig, path: Path) -> None:
    fig.tight_layout()
    for suffix in (".png", ".svg"):
        # A date in the SVG would change the file at every run.
        metadata = {"Date": None} if suffix == ".svg" else None
        with atomic(path.with_suffix(suffix)) as tmp:
            fig.savefig(tmp, format=suffix[1:], dpi=200, metadata=metadata)
        print(path.with_suffix(suffix))
    plt.close(fig)


def filled_page(text: str, blocks: dict[str, str], path) -> str:
    """`text` with what stands between <!-- begin:NAME --> and <!-- end:NAME --> replaced."""
    for name, block in blocks.items():
        begin, end = f"<!-- begin:{name} -->\n", f"<!-- end:{name} -->"
        if begin not in text or end not in text.partition(begin)[2]:
            raise BadInput(f"{path} has no {begin.strip()} ... {end}")
        before, _, rest = text.partition(begin)
        text = before + begin + block + "\n" + end + rest.partition(end)[2]
    return text


def fill_pages(args, rows, runs) -> None:
    """Rewrite the tables of the README and of the model card, or check that they are up to date."""
    benchmarks = {p.stem: read_json(p) for p in Path(args.results, "benchmarks").glob("*.json")}
    training = tables.training_table(runs)
    pages = {
        Path(args.readme_file): {
            "results": tables.results_table([r for r in rows if tables.in_protocol(r)], rows),
            "engines": tables.results_table([r for r in rows if not tables.in_protocol(r)], rows),
            "training": training,
            "commands": tables.commands_block(rows, runs),
            "benchmarks": tables.benchmarks_table(benchmarks),
        },
        Path(args.checkpoints, "README.md"): {
            "training": training,
            "classes": tables.classes_table(rows),
        },
    }
    for path, blocks in pages.items():
        try:
            text = path.read_text()
        except OSError as error:
            raise BadInput(f"cannot read {path}: {error.strerror}") from error
        filled = filled_page(text, blocks, path)
        if not args.check:
            write_text(path, filled)
            print(path)
        elif filled != text:
            sys.exit(f"{path} differs from {args.results}/: run plots.py --readme")
        else:
            print(f"{path} agrees with {args.results}/")


@command
def main():
    args = parse_args()
    rows, runs = load_rows(args.results, args.checkpoints), load_runs(args.checkpoints)
    if args.check or args.readme:
        fill_pages(args, rows, runs)
        if args.check:
            return
    plt.rcParams |= {
        "font.size": 10,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.grid": True,
        "grid.alpha": 0.25,
        "axes.axisbelow": True,
        "svg.hashsalt": "mobilevit",
    }
    figures = Path(args.results, "figures")
    if runs:
        save(training_curves(runs), figures / "training_curves")
    if rows:
        save(methods(rows), figures / "methods")
        save(pareto(rows), figures / "pareto")
    if any(tables.is_baseline(row) for row in rows):
        save(confusions(rows), figures / "confusion")
    if not rows and not runs:
        raise BadInput(f"{args.results} and {args.checkpoints} hold no CIFAR-10 row and no run yet")


if __name__ == "__main__":
    main()
