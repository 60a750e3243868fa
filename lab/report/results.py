"""All that tables and figures are made of: rows, runs, reports per layer and benchmarks."""

from dataclasses import dataclass

from lab.report.benchmarks import load_benchmarks
from lab.report.reading import (
    SIZE_SWEEP,
    has_vnni,
    in_order,
    in_protocol,
    model_order,
    on_usual_cpu,
)
from lab.report.rows import MAIN_TABLES, has_predictions, in_main_tables, load_rows
from lab.report.runs import load_report, load_runs

REPORTED = {"model": "mobilevit_xxs", "recipes": ("w8a8-early", "int8-fx")}  # layer by layer


@dataclass(frozen=True)
class Results:
    """What result files and training logs hold.

    `every_row`: the rows of shipped weights, at any image size, seed and split. `rows`: those of
    them that belong in the main tables. `reports`: {recipe: report per layer}. `benchmarks`: {kind:
    its files}. All of these are of CIFAR-10; `task_rows` and `task_runs` are of detection and
    segmentation.
    """

    every_row: list[dict]
    rows: list[dict]
    task_rows: list[dict]
    runs: list[dict]
    task_runs: list[dict]
    reports: dict[str, dict | None]
    benchmarks: dict[str, list[dict]]

    @property
    def protocol(self) -> list[dict]:
        """Return the rows of the published protocol."""
        return [row for row in self.rows if in_protocol(row)]

    @property
    def measured(self) -> list[dict]:
        """Return the other rows that an engine computed in the numbers of the recipe."""
        return [r for r in self.rows if not in_protocol(r) and r["kind"] != "simulated"]

    @property
    def simulated(self) -> list[dict]:
        """Return the other rows in which floats stood in for numbers of few bits."""
        return [r for r in self.rows if not in_protocol(r) and r["kind"] == "simulated"]

    @property
    def ablation(self) -> list[dict]:
        """Return the simulated rows on held-out images, and FP32's."""
        usual = {"split": "held-out", "adapt_images": None, "engine": "torch-eager"}
        return [row for row in self.every_row if usual.items() <= row.items()]

    @property
    def input_sizes(self) -> list[dict]:
        """Return the rows of a sweep over input sides, on one kind of CPU.

        They are of the models that have rows at several sides.
        """
        usual = {"split": "test", "engine": "openvino", "seed": MAIN_TABLES["seed"]}
        swept = [row for row in self.every_row if usual.items() <= row.items()]
        swept = [row for row in swept if row["recipe"]["name"] in SIZE_SWEEP]
        several = {row["model"] for row in swept if not in_main_tables(row)}
        return on_usual_cpu(in_order([row for row in swept if row["model"] in several]))

    def rows_of(self, task: str) -> list[dict]:
        """Return the rows of `task`, "detection" or "segmentation"."""
        return [row for row in self.task_rows if row["task"] == task]

    def runs_of(self, task: str) -> list[dict]:
        """Return the runs of `task`, "detection" or "segmentation"."""
        return [run for run in self.task_runs if run["task"] == task]

    def speeds(self, vnni: bool) -> list[dict]:
        """Return the benchmarks of engines on CPUs with VNNI, or on those without."""
        return [bench for bench in self.benchmarks["engines"] if has_vnni(bench) == vnni]

    @property
    def operators(self) -> dict | None:
        """Return the benchmark of OpenVINO's operations on a CPU with VNNI, None without one."""
        return next((b for b in self.benchmarks["profile"] if has_vnni(b) and b["ms"]), None)


def load_results(results, checkpoints) -> Results:
    """Return what the folders of result files and of training runs hold.

    BadInput for a file that does not hold what it should.
    """
    rows, runs = load_rows(results, checkpoints), load_runs(checkpoints)
    every_row = [row for row in rows if has_predictions(row)]
    model = REPORTED["model"]
    return Results(
        every_row=every_row,
        rows=[row for row in every_row if in_main_tables(row)],
        task_rows=[row for row in rows if not has_predictions(row)],
        runs=sorted(
            (run for run in runs if run["task"] == "cifar10"),
            key=lambda run: model_order(run["model"]),
        ),
        task_runs=[run for run in runs if run["task"] != "cifar10"],
        reports={r: load_report(results, checkpoints, model, r) for r in REPORTED["recipes"]},
        benchmarks=load_benchmarks(results, every_row),
    )
