"""Figures and the tables of all pages, from result files and training logs alone.

    python plots.py             # figures -> results/figures/*.png and *.svg, 15 s
    python plots.py --readme    # also rewrite the tables of README, docs and model card
    python plots.py --check     # write nothing; exit 1 if a table differs from the results
    python plots.py --results runs/results --checkpoints runs --figures runs/figures  # of your own

Prints the path of every file written. Rows of CIFAR-10 are left out if they are of weights that are
not in --checkpoints, of fewer than all images or of other settings; so are runs on other data.
"""

from pathlib import Path

from lab.cli import BadInput, command, parser
from lab.report.pages import check_pages, fill_pages
from lab.report.results import load_results
from lab.report.rows import row_files


def parse_args():
    p = parser(__doc__)
    p.add_argument("--results", default="results", help="folder of the result files")
    p.add_argument("--checkpoints", default="checkpoints", help="folder of the training logs")
    p.add_argument("--figures", help="folder of the figures (default: that in --results)")
    p.add_argument("--pages", help="folder of README.md, docs and checkpoints (default: this one)")
    what = p.add_mutually_exclusive_group()
    what.add_argument("--readme", action="store_true", help="also rewrite the tables")
    what.add_argument("--check", action="store_true", help="fail if a table differs")
    args = p.parse_args()
    if args.check and args.figures:
        p.error("--check draws no figures: leave out --figures")
    if args.pages and not (args.check or args.readme):
        p.error("--pages is for --readme and --check")
    args.pages = args.pages or "."
    if not Path(args.results).is_dir():
        raise BadInput(f"no folder {args.results}: run quantize.py first or name it with --results")
    return args


@command
def main():
    args = parse_args()
    found = load_results(args.results, args.checkpoints)
    if args.check:
        check_pages(found, args.pages)
        return
    if not found.rows and not found.runs:
        raise BadInput(
            f"{args.results} holds no row of weights in {args.checkpoints} on all CIFAR-10 images "
            f"with the usual settings, and {args.checkpoints} no run"
        )
    if left_out := len(row_files(args.results)) - len(found.every_row) - len(found.task_rows):
        print(f"rows left out, of other weights, fewer images or other settings: {left_out}")
    if args.readme:
        fill_pages(found, args.pages)
    from lab.report.figures import FIGURES  # matplotlib takes a second that --check need not
    from lab.report.style import save

    folder = Path(args.figures or Path(args.results, "figures"))
    for name, draw in FIGURES.items():
        if figure := draw(found):
            paths = [folder / f"{name}{suffix}" for suffix in (".png", ".svg")]
            save(figure, *paths)
            print(*paths, sep="\n")


if __name__ == "__main__":
    main()
