"""Pages whose tables stand between markers: filled from result files, or checked."""

import re
import sys
from pathlib import Path

from lab.cli import BadInput
from lab.files import write_text
from lab.report import ablations, energy, integers, neighbours, studies, tables
from lab.report.results import Results

PAGES = {  # page: {block that it holds: its Markdown, a function of Results}
    "README.md": {"headline": lambda found: tables.headline_table(found.rows)},
    "docs/results.md": {
        "results": lambda found: tables.results_table(found.protocol, found.rows),
        "engines": lambda found: tables.results_table(found.measured, found.rows),
        "simulated": lambda found: tables.simulated_table(found.simulated, found.rows),
        "energy": lambda found: energy.energy_table(found.rows),
        "neighbours": lambda found: neighbours.neighbours_table(found.rows),
    },
    "docs/training.md": {
        "training": lambda found: studies.training_table(found.runs),
        "commands": lambda found: studies.commands_block(found.runs),
    },
    "docs/quantization.md": {
        "per-layer": lambda found: studies.per_layer_table(found.reports["w8a8-early"]),
        "per-layer-fx": lambda found: studies.per_layer_table(found.reports["int8-fx"]),
        "ablation": lambda found: studies.ablation_table(found.ablation),
    },
    "docs/speed.md": {
        "speeds-vnni": lambda found: studies.speed_table(found.speeds(vnni=True)),
        "speeds": lambda found: studies.speed_table(found.speeds(vnni=False)),
        "profile": lambda found: studies.profile_table(found.operators),
        "sizes": lambda found: tables.sizes_table(found.input_sizes),
        "benchmarks": lambda found: studies.benchmarks_table(found.benchmarks),
    },
    "docs/methods.md": {"integers": lambda found: integers.integers_table(found.rows)},
    "docs/tasks.md": {
        "detection": lambda found: tables.task_table(found.rows_of("detection")),
        "detection-runs": lambda found: studies.commands_block(found.runs_of("detection")),
        "segmentation": lambda found: tables.task_table(found.rows_of("segmentation")),
        "segmentation-runs": lambda found: studies.commands_block(found.runs_of("segmentation")),
    },
    "docs/robustness.md": {
        "abuse": lambda found: studies.abuse_table(found.benchmarks["abuse"]),
    },
    "docs/ablations.md": {
        "ablations": lambda found: ablations.ablations_table(found.benchmarks["ablations"]),
    },
    "checkpoints/README.md": {"classes": lambda found: studies.classes_table(found.rows)},
}
MARKER = re.compile(r"<!-- (begin|end):(.*?) -->")


def filled_page(text: str, blocks: dict[str, str], path) -> str:
    """Return `text` with what stands between <!-- begin:NAME --> and <!-- end:NAME --> replaced.

    `blocks`: {NAME: what is to stand there}. BadInput if a page has other markers than those.
    """
    expected = [(edge, name) for name in blocks for edge in ("begin", "end")]
    if sorted(MARKER.findall(text)) != sorted(expected):
        names = ", ".join(blocks)
        raise BadInput(f"{path} should have one begin and one end marker for each of {names}")
    for name, block in blocks.items():
        begin, end = f"<!-- begin:{name} -->\n", f"<!-- end:{name} -->"
        before, begins, rest = text.partition(begin)
        _, ends, after = rest.partition(end)
        if not begins or not ends:
            raise BadInput(f"{path} has no {begin.strip()} on a line, followed by {end}")
        text = before + begin + block + "\n" + end + after
    return text


def filled_pages(found: Results, folder) -> dict[Path, tuple[str, str]]:
    """Return {page: (its text, its text with every block filled)} for the pages under `folder`.

    BadInput if one can't be read.
    """
    pages = {}
    for name, blocks in PAGES.items():
        path = Path(folder, name)
        try:
            text = path.read_text(encoding="utf-8")
        except (OSError, ValueError) as error:
            raise BadInput(f"cannot read {path}: {error}") from error
        made = {block: markdown(found) for block, markdown in blocks.items()}
        pages[path] = text, filled_page(text, made, path)
    return pages


def fill_pages(found: Results, folder) -> None:
    """Rewrite the tables of all pages and print the path of each."""
    for path, (_, filled) in filled_pages(found, folder).items():
        write_text(path, filled)
        print(path)


def check_pages(found: Results, folder) -> None:
    """Exit with 1 and a line for each page whose tables differ from the results."""
    pages = filled_pages(found, folder)
    differing = [str(path) for path, (text, filled) in pages.items() if filled != text]
    if differing:
        sys.exit(f"differ from the results: {', '.join(differing)}; plots.py --readme fills them")
    print(f"{len(pages)} pages agree with the results")
