"""Figures and the tables of README and model card, from results/ and the training logs alone.

    python plots.py             # figures -> results/figures/*.png and *.svg, 10 s
    python plots.py --readme    # also rewrite the tables between their markers
    python plots.py --check     # write nothing; fail if a table differs from results/

Prints the path of every file written. Rows and runs on the synthetic data set are left out.
"""

import csv
import sys
from pathlib import Path

import matplotlib.pyplot as plt

import figures
import studies
import tables
from mobilevit import MobileViT
from rows import BadInput, atomic, command, parser, read_json, sha256, write_text

FULL = {"test": 10_000, "held-out": 2_000}  # images of a split


def parse_args():
    p = parser(__doc__)
    p.add_argument("--results", default="results", help="folder of the result files")
    p.add_argument("--checkpoints", default="checkpoints", help="folder of the training logs")
    p.add_argument("--figures", help="folder of the figures (default: that in --results)")
    p.add_argument("--readme-file", default="README.md", help="file that holds the tables")
    what = p.add_mutually_exclusive_group()
    what.add_argument("--readme", action="store_true", help="also rewrite the tables")
    what.add_argument("--check", action="store_true", help="fail if the tables differ")
    args = p.parse_args()
    if not Path(args.results).is_dir():
        raise BadInput(f"no folder {args.results}: run quantize.py first or name it with --results")
    return args


def load_rows(folder, checkpoints) -> list[dict]:
    """The rows of shipped CIFAR-10 weights that differ from published ones at most in split, side
    of the images and seed."""
    shipped = {sha256(path) for path in Path(checkpoints).glob("*/best.pth")}
    rows = []
    for path in sorted(Path(folder).glob("*/*@*.json")):
        row = read_json(path)
        try:
            if row["checkpoint_sha256"] in shipped and is_full(row):
                rows.append(row)
        except (KeyError, TypeError) as error:
            raise BadInput(f"{path} is no row of quantize.py: it lacks {error}") from error
    return rows


def is_full(row: dict) -> bool:
    full = {
        "dataset": "cifar10",
        "n_images": FULL[row["split"]],
        "calibration_images": row["recipe"]["calibration_images"],
        "latency_runs": 100,
    }
    return all(row[name] == value for name, value in full.items())


def is_published(row: dict) -> bool:
    return (row["split"], row["img_size"], row["seed"]) == ("test", 256, 0)


def load_report(args, recipe: str) -> dict | None:
    """The report per layer that docs/quantization.md shows: of XXS, or of a run before it whose
    weights ship as well."""
    path = Path(args.results, "mobilevit_xxs", "per-layer", f"{recipe}.json")
    shipped = {sha256(p) for p in Path(args.checkpoints, "mobilevit_xxs").rglob("best.pth")}
    report = read_json(path) if path.exists() else None
    usual = report and (
        report["checkpoint_sha256"] in shipped
        and report["calibration"]["n"] == report["recipe"]["calibration_images"]
    )
    return report if usual else None


def of_engines(rows: list[dict]) -> list[dict]:
    """The rows that an engine computed as they are written, once there are other than published
    methods among them."""
    if all(tables.in_protocol(row) for row in rows):
        return []
    return [row for row in rows if not row["simulated"]]


def of_input_sizes(rows: list[dict]) -> list[dict]:
    """The rows of a sweep over input sides, for models that have more than one."""
    usual = {"split": "test", "engine": "openvino", "seed": 0}.items()
    swept = [row for row in rows if usual <= row.items()]
    swept = [row for row in swept if row["recipe"]["name"] in tables.SIZE_SWEEP]
    several = {row["model"] for row in swept if row["img_size"] != 256}
    return [row for row in swept if row["model"] in several]


def load_runs(folder) -> list[dict]:
    """All finished CIFAR-10 runs under `folder`."""
    runs = [load_run(path.parent) for path in sorted(Path(folder).glob("*/metrics.json"))]
    runs = [run for run in runs if run["config"]["dataset"] == "cifar10"]
    return sorted(runs, key=lambda run: tables.MODELS.index(run["model"]))


def load_run(folder: Path) -> dict:
    """The metrics.json of a run with its log and, from `folder`/first, the run that its weights
    came from."""
    run = read_json(folder / "metrics.json")
    try:
        with open(folder / "log.csv") as file:
            log = [{k: float(v) for k, v in row.items()} for row in csv.DictReader(file)]
    except (OSError, ValueError, TypeError) as error:
        raise BadInput(f"cannot read {folder / 'log.csv'}: {error}") from error
    variant, first = run["config"]["variant"], folder / "first"
    return run | {
        "log": log,
        "model": f"mobilevit_{variant}",
        "command": read_json(folder / "config.json")["command"],  # that of the start
        "parameters": sum(p.numel() for p in MobileViT(variant).parameters()),
        "first": load_run(first) if first.exists() else None,
    }


def of_variants(benchmarks: dict[str, dict], name: str) -> list[dict]:
    """The benchmarks called `name`, with {} for the variant, from small to large."""
    names = (name.format(model.removeprefix("mobilevit_")) for model in tables.MODELS)
    return [benchmarks[name] for name in names if name in benchmarks]


def save(fig, path: Path) -> None:
    if fig.get_layout_engine() is None:
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


def fill_pages(args, every_row, rows, runs) -> None:
    """Rewrite the tables of README, model card and docs, or check that they are up to date; `rows`
    are the published ones of `every_row`."""
    benchmarks = {p.stem: read_json(p) for p in Path(args.results, "benchmarks").glob("*.json")}
    training = tables.training_table(runs)
    ours = [row for row in rows if not tables.in_protocol(row)]
    pages = {
        Path(args.readme_file): {
            "headline": tables.headline_table(rows),
            "results": tables.results_table([r for r in rows if tables.in_protocol(r)], rows),
            "engines": tables.results_table([r for r in ours if not r["simulated"]], rows),
            "simulated": tables.simulated_table([r for r in ours if r["simulated"]], rows),
            "training": training,
            "commands": tables.commands_block(rows, runs),
            "sizes": tables.sizes_table(of_input_sizes(every_row)),
            "speeds-vnni": studies.speed_table(of_variants(benchmarks, "engines-{}-vnni")),
            "speeds": studies.speed_table(of_variants(benchmarks, "engines-{}")),
            "benchmarks": studies.benchmarks_table(benchmarks),
        },
        Path(args.checkpoints, "README.md"): {
            "training": training,
            "classes": tables.classes_table(rows),
        },
        Path(args.readme_file).parent / "docs" / "quantization.md": {
            "per-layer": studies.per_layer_table(load_report(args, "w8a8-early")),
            "profile": studies.profile_table(benchmarks.get("profile-xxs-vnni")),
            "per-layer-fx": studies.per_layer_table(load_report(args, "int8-fx")),
            "ablation": studies.ablation_table(
                [r for r in every_row if (r["split"], r["img_size"]) == ("held-out", 256)]
            ),
        },
    }
    texts = {}
    for path in pages:
        try:
            texts[path] = path.read_text()
        except OSError as error:
            raise BadInput(f"cannot read {path}: {error.strerror}") from error
    new = {path: filled_page(texts[path], blocks, path) for path, blocks in pages.items()}
    for path, filled in new.items():
        if not args.check:
            write_text(path, filled)
            print(path)
        elif filled != texts[path]:
            sys.exit(f"{path} differs from {args.results}/: run plots.py --readme")
        else:
            print(f"{path} agrees with {args.results}/")


@command
def main():
    args = parse_args()
    every_row, runs = load_rows(args.results, args.checkpoints), load_runs(args.checkpoints)
    rows = [row for row in every_row if is_published(row)]
    if args.check or args.readme:
        fill_pages(args, every_row, rows, runs)
        if args.check:
            return
    if not rows and not runs:
        raise BadInput(f"{args.results} and {args.checkpoints} hold no CIFAR-10 row and no run yet")
    drawn = {
        "training_curves": (figures.training_curves, runs),
        "methods": (figures.methods, [row for row in rows if tables.in_protocol(row)]),
        "pareto": (figures.pareto, [row for row in rows if tables.in_protocol(row)]),
        "confusion": (figures.confusions, [row for row in rows if tables.is_baseline(row)]),
        "engines": (figures.engines, of_engines(rows)),
        "input_sizes": (figures.input_sizes, of_input_sizes(every_row)),
    }
    for name, (draw, shown) in drawn.items():
        if shown:
            save(draw(shown), Path(args.figures or Path(args.results, "figures"), name))


if __name__ == "__main__":
    main()
