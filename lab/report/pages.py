"""Pages whose tables stand between markers: filled from result files, or checked."""

import sys
from pathlib import Path

from lab.cli import BadInput
from lab.files import read_json, write_text
from lab.report import studies, tables
from lab.report.runs import load_report


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
            "engines": tables.results_table(
                [r for r in ours if not (r["kind"] == "simulated")], rows
            ),
            "simulated": tables.simulated_table(
                [r for r in ours if (r["kind"] == "simulated")], rows
            ),
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
