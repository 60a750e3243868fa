"""Figures and the tables of README and model card, from results/ and the training logs alone.

    python plots.py             # figures -> results/figures/*.png and *.svg, 10 s
    python plots.py --readme    # also rewrite the tables between their markers
    python plots.py --check     # write nothing; fail if a table differs from results/

Prints the path of every file written. Rows and runs on the synthetic data set are left out.
"""

from pathlib import Path

import matplotlib.pyplot as plt

from lab.cli import BadInput, command, parser
from lab.files import atomic
from lab.report import figures, tables
from lab.report.pages import fill_pages
from lab.report.rows import is_published, load_rows, load_runs, of_engines, of_input_sizes


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
