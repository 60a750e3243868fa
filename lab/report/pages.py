"""Pages whose tables stand between markers: filled from result files, or checked."""

import re
import sys
from pathlib import Path

from lab.cli import BadInput
from lab.files import write_text
from lab.report import energy, neighbours, studies, tables
from lab.report.results import Results

PAGES = {  # page: the blocks that it holds
    "README.md": ("headline",),
    "docs/results.md": ("results", "engines", "simulated", "energy", "neighbours"),
    "docs/training.md": ("training", "commands"),
    "docs/quantization.md": ("per-layer", "per-layer-fx", "ablation"),
    "docs/speed.md": ("speeds-vnni", "speeds", "profile", "sizes", "benchmarks"),
    "docs/robustness.md": ("abuse",),
    "checkpoints/README.md": ("classes",),
}
MARKER = re.compile(r"<!-- (begin|end):(.*?) -->")


def blocks_of(found: Results) -> dict[str, str]:
    """{name of a block: its Markdown}."""
    speeds = found.benchmarks["engines"]
    profiles = [bench for bench in found.benchmarks["profile"] if studies.has_vnni(bench)]
    return {
        "headline": tables.headline_table(found.rows),
        "results": tables.results_table(found.protocol, found.rows),
        "engines": tables.results_table(found.measured, found.rows),
        "simulated": tables.simulated_table(found.simulated, found.rows),
        "energy": energy.energy_table(found.rows),
        "neighbours": neighbours.neighbours_table(found.rows),
        "training": studies.training_table(found.runs),
        "commands": studies.commands_block(found.runs),
        "per-layer": studies.per_layer_table(found.reports["w8a8-early"]),
        "per-layer-fx": studies.per_layer_table(found.reports["int8-fx"]),
        "ablation": studies.ablation_table(found.ablation),
        "speeds-vnni": studies.speed_table([b for b in speeds if studies.has_vnni(b)]),
        "speeds": studies.speed_table([b for b in speeds if not studies.has_vnni(b)]),
        "profile": studies.profile_table(profiles[0] if profiles else None),
        "sizes": tables.sizes_table(found.input_sizes),
        "benchmarks": studies.benchmarks_table(found.benchmarks),
        "abuse": studies.abuse_table(found.benchmarks["abuse"]),
        "classes": studies.classes_table(found.rows),
    }


def filled_page(text: str, blocks: dict[str, str], path) -> str:
    """`text` with what stands between <!-- begin:NAME --> and <!-- end:NAME --> replaced.

    BadInput if a page has other markers than those of `blocks`.
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
    """{page: its text, its text with every block filled} for the pages under `folder`."""
    blocks, pages = blocks_of(found), {}
    for name, of_page in PAGES.items():
        path = Path(folder, name)
        try:
            text = path.read_text(encoding="utf-8")
        except (OSError, ValueError) as error:
            raise BadInput(f"cannot read {path}: {error}") from error
        pages[path] = text, filled_page(text, {block: blocks[block] for block in of_page}, path)
    return pages


def fill_pages(found: Results, folder) -> None:
    """Rewrite the tables of all pages; prints the path of each."""
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
