"""Energy in a table, noise by bytes and energy in a figure, a neighbour's figures."""

import matplotlib.pyplot as plt
import pytest
from made_results import ROWS, load, mixed_row, row, write_tree

from lab.cli import BadInput
from lab.files import read_json, write_json
from lab.report import energy, neighbours, tradeoffs
from lab.report.rows import read_row, row_path

SHOWN = [r for r in ROWS if r["split"] == "test" and r["adapt_images"] is None]


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    root = tmp_path_factory.mktemp("tree")
    write_tree(root)
    return root


def test_the_table_tells_energy_by_both_models():
    table = energy.energy_table(SHOWN).splitlines()
    assert len(table) == 2 + 6  # rows without energy are no part of it
    assert "| mobilevit_xxs | FP32 | 90.00 | 4.00 | 4.00 to 8.00 | 10 % | 1.000 |" in table
    assert "| mobilevit_xxs | w5a8 | 89.00 | 0.57 | 1.25 to 2.50 | 10 % | 0.312 |" in table


def test_mixed_is_compared_with_one_width_at_no_more_bytes():
    # 605,000 bytes are within a percent of w5a8's 600,000; those of 6 bits are not.
    assert tradeoffs.gains(SHOWN) == [pytest.approx(1.25)]
    assert tradeoffs.finding(SHOWN).endswith("a width for each has 1.25 times less noise")
    larger = mixed_row("5.1bits", logit_noise=0.001, size_bytes=607_000)  # by 1.2 %
    assert tradeoffs.gains([*SHOWN, larger]) == [pytest.approx(1.25)]
    without = [r for r in SHOWN if not r["recipe"]["name"].startswith("mixed-5")]
    assert tradeoffs.gains(without) == [pytest.approx(2 / 3)]
    six = row("w6a8", size_bytes=700_000, logit_noise=0.01)
    assert tradeoffs.finding([*SHOWN, six]).endswith("has 1.25 to 2.00 times less noise")
    assert tradeoffs.finding([]) == (
        "Noise in the logits by size and energy, by how widths are chosen"
    )


def test_rows_find_their_line():
    lines = {
        "a width for each layer": mixed_row("5bits", logit_noise=0.1),
        "a width for each layer (mixed-fisher)": mixed_row("7bytes-fisher", logit_noise=0.1),
        "one width for all": row("w5a8", logit_noise=0.1),
        "NNCF": row("int8-nncf", logit_noise=0.1),
        None: row("w5a8", "openvino", logit_noise=0.1),
    }
    assert {tradeoffs.series_of(r): r for r in lines.values()} == lines
    assert tradeoffs.series_of(row("w4", logit_noise=0.1)) is None
    assert tradeoffs.series_of(row("w5a8")) is None  # a row of an earlier version


def test_the_figure_shows_every_point_against_size_and_energy(tree):
    fig = tradeoffs.tradeoffs(load(tree))
    (size, spent) = fig.axes
    drawn = {tuple(line.get_xdata()): tuple(line.get_ydata()) for line in size.lines}
    bytes_ = (520_000, 605_000, 700_000)
    assert drawn[tuple(b / 2**20 for b in bytes_)] == (0.015, 0.008, 0.005)
    assert (1.05, 1.25, 1.5) in [tuple(line.get_xdata()) for line in spent.lines]
    plt.close("all")


def test_without_mixed_rows_there_is_no_figure():
    class Found:
        rows = [r for r in SHOWN if not r["recipe"]["name"].startswith("mixed")]

    assert tradeoffs.tradeoffs(Found) is None


def test_ours_beside_the_neighbours_come_from_rows_alone():
    table = neighbours.neighbours_table(SHOWN)
    assert len(table.splitlines()) == 2 + 4 + 4 + 4 and table.count("no results yet") == 12
    assert "| DeiT-Tiny | ranking-aware | 4 | 74.90 (-10.44) | vit_cifar | w4a8-ranking |" in table
    ours = {"model": "resnet18", "checkpoint_sha256": "r"}
    rows = [row("fp32", accuracy=93.9, **ours), row("uniform6", accuracy=93.7, **ours)]
    table = neighbours.neighbours_table(rows)
    assert (
        "| ResNet-18 | uniform | 6 | 95.13 (-0.05) | resnet18 | uniform6 | 93.70 (-0.20) |" in table
    )
    assert "| ResNet-18 | uniform | 32 | 95.18 | resnet18 | fp32 | 93.90 |" in table


def test_energy_that_is_no_number_is_named(tmp_path):
    path = row_path(tmp_path, ROWS[0])
    write_json(path, ROWS[0])
    broken = read_json(path)
    broken["energy"]["seed"]["total"] = "much"
    write_json(path, broken)
    with pytest.raises(BadInput, match="energy: seed: total is 'much'"):
        read_row(path)
