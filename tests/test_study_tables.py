"""Tables of classes, runs and speeds, each number in its own column."""

from made_results import WEIGHTS, bench, report, row, write_run

from lab.files import write_json
from lab.report import studies
from lab.report.results import Results
from lab.report.runs import load_report, load_run


def test_recall_is_of_a_class_and_precision_of_an_answer():
    confusion = [[8, 2, 0], [1, 3, 0], [3, 0, 0]]  # lines are classes, columns answers
    made = row("fp32", classes=list("abc"), confusion=confusion)
    lines = studies.classes_table([made]).splitlines()
    assert "recall" in lines[0].split("|")[2] and "precision" in lines[0].split("|")[3]
    assert lines[2:] == ["| a | 80.0 | 66.7 |", "| b | 75.0 | 60.0 |", "| c | 0.0 | - |"]


def test_a_run_is_shown_with_its_last_speed_and_its_minutes():
    run = {
        "config": {"precision": "bf16", "resolutions": "128:1,256:1"},
        "model": "mobilevit_s",
        "before": [],
        "hardware": "a GPU",
        "parameters": 5,
        "log": [{"images_per_s": 900.0}, {"images_per_s": 300.0}],
        "train_s": 5400.0,
        "epoch": 2,
        "val_accuracy_pct": 91.0,
        "test_accuracy_pct": 90.0,
    }
    (line,) = studies.training_table([run]).splitlines()[2:]
    assert line.endswith("| a GPU | 5 | 300 | 90 min | 2 | 91.00 | 90.00 | 95.44 |")


def test_speeds_are_medians_over_those_of_torch_and_of_the_library():
    times = {"fp32@torch-eager": 20.0, "fp32@openvino": 8.0, "w8a8@openvino": 4.0}
    made = bench("mobilevit_xxs", times)
    for of_method in made["latency_ms"].values():
        of_method |= {"p10": of_method["median"] / 2, "p90": 3 * of_method["median"]}
    first, second, _ = studies.speed_table([made]).splitlines()[2:]
    assert first.startswith("| w8a8 | openvino ") and first.endswith(" | 4.0 | 0.20 | 0.50 |")
    assert second.startswith("| FP32 | openvino ") and second.endswith(" | 8.0 | 0.40 | 1.00 |")


def test_nodes_of_one_kind_and_arithmetic_add_up():
    nodes = {"FullyConnected INT8": 1.0, "FullyConnectedQuantizedLegacy INT8": 2.0}
    nodes |= {"FullyConnected FP32": 4.0, "Pad FP32": 8.0, "Convolution I8": 16.0}
    assert studies.node_times(nodes) == {
        ("linear layers", "INT8"): 3.0,
        ("linear layers", "FP32"): 4.0,
        studies.OTHERS: 24.0,
    }


def test_seeds_and_sides_other_than_the_usual_ones_stay_out_of_tables_of_others():
    at_128 = {"img_size": 128, "adapt_images": 256}
    swept = [row("fp32", "openvino"), row("fp32", "openvino", **at_128)]
    held_out = row("w4", split="held-out", n_images=2000)
    others = [
        row("w8a8", "openvino", seed=1),
        row("w8a8", "openvino", seed=1, **at_128),
        row("w4", split="held-out", n_images=2000, **at_128),
        row("w8a8"),
    ]
    none = {"rows": [], "task_rows": [], "runs": [], "task_runs": [], "reports": {}}
    found = Results(every_row=[*swept, held_out, *others], benchmarks={}, **none)
    assert sorted(r["img_size"] for r in found.input_sizes) == [128, 256]
    assert found.ablation == [held_out]


def test_runs_before_a_run_come_in_the_order_of_their_numbers(tmp_path):
    write_run(tmp_path, "python train.py")
    for n in (10, 2, 1):
        write_run(tmp_path / "history" / f"run{n}", f"python train.py --seed {n}")
    seeds = [run["command"].rpartition(" ")[2] for run in load_run(tmp_path)["before"]]
    assert seeds == ["1", "2", "10"]


def test_a_report_of_other_weights_or_of_fewer_images_is_left_out(tmp_path):
    shipped = tmp_path / "checkpoints" / "mobilevit_xxs"
    shipped.mkdir(parents=True)
    (shipped / "best.pth").write_bytes(WEIGHTS)
    where = (tmp_path / "results", tmp_path / "checkpoints", "mobilevit_xxs", "int8-fx")
    path, good = where[0] / "mobilevit_xxs" / "per-layer" / "int8-fx.json", report("int8-fx")
    assert load_report(*where) is None
    for change in ({"checkpoint_sha256": "0" * 64}, {"calibration": {"n": 8}}):
        write_json(path, good | change)
        assert load_report(*where) is None
    write_json(path, good)
    assert load_report(*where) == good
