"""Figures from rows and training logs; each function gives a matplotlib figure."""

from collections import Counter

import matplotlib

from lab.report import tables

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.transforms import Bbox

from lab.files import MB
from lab.tasks.cifar10 import CLASSES

# Okabe and Ito's palette, told apart with any colour vision.
COLOURS = {"mobilevit_xxs": "#0072B2", "mobilevit_xs": "#E69F00", "mobilevit_s": "#009E73"}
MARKERS = {"fp32": "o", "fp16": "s", "int8-fx": "^", "int4-percentile": "v"}
FAMILIES = {"FP32": "#666666", "ours": "#0072B2", "other methods": "#D55E00"}
ENGINE_MARKERS = {"torch": "o", "onnxruntime": "s", "openvino": "D"}
SHOWN_POINTS = 2  # below the best accuracy, in the figure of engines
MARK_PX = 6  # half the side of a point there
# Of a name beside its point, in points to the right and up, best first.
PLACES = (
    *((7, 0), (0, -6), (0, 6), (-7, 0)),
    *((4, -4), (4, 4), (-4, -4), (-4, 4)),
    *((22, -9), (22, 9), (-22, -9), (-22, 9), (22, 0), (44, -9), (44, 9)),
    *((0, -14), (0, 14), (0, -22), (0, 22)),
)
FAR = 10  # in these points; from names further away a line leads to their point
WIDTH_IN = 8.5  # inches; 850 pixels at the 100 dpi of a README column

plt.rcParams |= {
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.25,
    "axes.axisbelow": True,
    "svg.hashsalt": "mobilevit",
}


def training_curves(runs):
    fig, (left, right) = plt.subplots(1, 2, figsize=(WIDTH_IN, 3.8), layout="constrained")
    for run in runs:
        log = [row for part in tables.in_turn([run]) for row in part["log"]]
        epochs, colour = range(1, len(log) + 1), COLOURS[run["model"]]
        for axis, name in ((left, "accuracy_pct"), (right, "loss")):
            axis.plot(
                epochs,
                [r[f"train_{name}"] for r in log],
                "--",
                color=colour,
                alpha=0.7,
                marker=".",  # a run of one epoch has no line
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
            for epoch, before, row in zip(epochs, log, log[1:]):
                sides = [{r["window"], r["img_size"]} for r in (before, row)]
                if sides[0] != sides[1]:
                    for axis in (left, right):
                        axis.axvline(epoch + 0.5, color="#999999", linewidth=0.8)
                    left.annotate(
                        " of ".join(f"{side:.0f}" for side in sorted(sides[1])) + " px",
                        (epoch + 0.55, 0.02),
                        xycoords=("data", "axes fraction"),
                        fontsize=8,
                        rotation=90,
                    )
    left.set(xlabel="epoch", ylabel="accuracy, %")
    right.set(xlabel="epoch", ylabel="loss (training: with label smoothing)")
    for axis in (left, right):
        axis.xaxis.get_major_locator().set_params(integer=True)
    handles, _ = right.get_legend_handles_labels()
    fig.legend(handles=handles, loc="outside lower center", ncols=len(runs), fontsize=8)
    return fig


def methods(rows):
    """Accuracy, size and latency of the published methods, grouped by variant."""
    models = [m for m in tables.MODELS if any(row["model"] == m for row in rows)]
    recipes = [name for name in tables.TITLES if any(r["recipe"]["name"] == name for r in rows)]
    by_method = {(row["model"], row["recipe"]["name"]): row for row in rows}
    panels = (
        ("test accuracy, %", lambda r: r["score"]["accuracy_pct"], "{:.1f}"),
        ("file size, MB", lambda r: r["size_bytes"] / MB, "{:.2f}"),
        # Against FP32 called in turn: milliseconds of rows measured apart don't compare.
        ("latency, % of FP32's", lambda r: 100 / tables.speed_up(r), "{:.0f}"),
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
                hatch = "//" if (row["kind"] == "simulated") else None
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
        ours = [row for row in rows if row["model"] == model]
        ours.sort(key=lambda row: -row["size_bytes"])
        if not ours:
            continue
        points = [
            (r["recipe"]["name"], r["size_bytes"] / MB, r["score"]["accuracy_pct"]) for r in ours
        ]
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
    """Which classes are taken for which, in percent of the true class: a panel a row."""
    rows = tables.in_order(rows)
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


def family(row) -> str:
    if row["recipe"]["name"] == "fp32":
        return "FP32"
    return "other methods" if row["recipe"]["peer"] or tables.in_protocol(row) else "ours"


def engines(rows):
    """Accuracy against speed, on the kind of CPU that most rows are from, and against size, of rows
    that are not simulated; two panels a model. What loses more than SHOWN_POINTS is drawn at the
    lower edge, with its accuracy."""
    models = [m for m in tables.MODELS if any(row["model"] == m for row in rows)]
    size = (WIDTH_IN, 0.6 + 3.4 * len(models))
    fig, axes = plt.subplots(
        len(models), 2, figsize=size, sharey="row", squeeze=False, layout="constrained"
    )
    named = []
    for model, (left, right) in zip(models, axes):
        of_model = [row for row in rows if row["model"] == model]
        left.set_title(model, loc="left")
        floor = max(row["score"]["accuracy_pct"] for row in of_model) - SHOWN_POINTS
        cpu = Counter(map(tables.cpu, of_model)).most_common(1)[0][0]
        on_it = [row for row in of_model if tables.cpu(row) == cpu or tables.is_baseline(row)]
        left.set_xlabel(f"times as fast as torch's FP32, {cpu}")
        left.set_ylabel("test accuracy, %")
        right.set_xlabel("size of the file, MB")
        for axis, shown, x in (
            (left, on_it, tables.speed_up),
            (right, of_model, lambda row: row["size_bytes"] / MB),
        ):
            points = [(x(row), max(row["score"]["accuracy_pct"], floor), row) for row in shown]
            for at, accuracy, row in points:
                marker = ENGINE_MARKERS[tables.RUNS_ON.get(row["engine"], row["engine"])]
                colour = FAMILIES[family(row)]
                axis.plot(at, accuracy, marker, color=colour, ms=8, alpha=0.85)
            axis.margins(y=0.12)
            axis.set_xlim(0, 1.2 * max(at for at, _, _ in points))  # room for names
            named.append((axis, [(at, y, point_name(row, floor)) for at, y, row in points]))
    for label, colour in FAMILIES.items():
        axes[0][1].plot([], [], "o", color=colour, label=label)
    for label, marker in ENGINE_MARKERS.items():
        axes[0][1].plot([], [], marker, color="black", mfc="none", label=f"on {label}")
    fig.legend(loc="outside lower center", ncols=6, fontsize=8)
    fig.draw_without_rendering()
    for axis, points in named:
        name_points(axis, points)
    return fig


def point_name(row, floor) -> str:
    accuracy, bf16 = row["score"]["accuracy_pct"], " BF16" * (row["engine"] == "openvino-bf16")
    return row["recipe"]["name"] + bf16 + (f" ({accuracy:.1f} %)" if accuracy < floor else "")


def name_points(axis, points) -> None:
    """Write the name of each point (x, y, name) beside it, once the figure is laid out: at the
    first of PLACES that is within the axis and free of other points and names, or at the last. One
    name is enough for points of that name on top of each other."""
    points = sorted(points, reverse=True)
    pixels = axis.transData.transform([point[:2] for point in points])
    marks = [Bbox(((x - MARK_PX, y - MARK_PX), (x + MARK_PX, y + MARK_PX))) for x, y in pixels]
    left, bottom, right, top = axis.bbox.extents
    taken, named = list(marks), {}  # named: {name: marks of points that have got it}
    for (x, y, name), mark in zip(points, marks):
        if mark.count_overlaps(named.setdefault(name, [])):
            continue
        named[name].append(mark)
        for place in PLACES:
            dx, dy = place
            text = axis.annotate(
                name,
                (x, y),
                textcoords="offset points",
                xytext=place,
                ha="left" if dx > 0 else "right" if dx < 0 else "center",
                va="bottom" if dy > 0 else "top" if dy < 0 else "center",
                fontsize=7,
            )
            box = text.get_window_extent()
            within = left < box.x0 and box.x1 < right and bottom < box.y0 and box.y1 < top
            free = within and not box.count_overlaps(taken)
            if free or place is PLACES[-1]:
                break
            text.remove()
        far = max(abs(dx), abs(dy)) > FAR
        taken.append(box.padded(MARK_PX) if far else box)  # no two lines end at one place
        if far:
            line = {"arrowstyle": "-", "lw": 0.5, "shrinkA": 0, "shrinkB": 0}
            offset = {"textcoords": "offset points", "xytext": place}
            axis.annotate("", (x, y), **offset, arrowprops=line)


def input_sizes(rows):
    """Accuracy against speed at several sides of the input image, for each recipe on OpenVINO."""
    fig, axis = plt.subplots(figsize=(WIDTH_IN, 4))
    recipes = sorted({row["recipe"]["name"] for row in rows})
    for model in tables.MODELS:
        for recipe in recipes:
            points = [r for r in rows if (r["model"], r["recipe"]["name"]) == (model, recipe)]
            points.sort(key=lambda row: row["img_size"])
            if not points:
                continue
            xs, ys = (
                [tables.speed_up(r) for r in points],
                [r["score"]["accuracy_pct"] for r in points],
            )
            style, side_at = "-", {"xytext": (4, 5)}
            if recipe == "fp32":
                style, side_at = "--", {"xytext": (-4, -5), "ha": "right", "va": "top"}
            label = f"{model}, {recipe}"
            axis.plot(xs, ys, style, marker="o", ms=5, color=COLOURS[model], label=label)
            for x, y, row in zip(xs, ys, points):
                axis.annotate(
                    f"{row['img_size']}",
                    (x, y),
                    textcoords="offset points",
                    fontsize=8,
                    **side_at,
                )
    axis.margins(0.07)
    axis.set_xlabel("times as fast as FP32 in torch at the side it was trained for, one thread")
    axis.set_ylabel("test accuracy, %")
    axis.legend(fontsize=8, handlelength=4)  # so that a dashed line shows as one
    return fig
