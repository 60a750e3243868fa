"""Figures of rows. Each function takes Results and gives a figure, or None without its rows."""

import math

from matplotlib.lines import Line2D

from lab.files import MB
from lab.report import style, tables
from lab.report.results import Results
from lab.report.rows import is_published
from lab.report.tables import accuracy, models_of, short_name

HEADLINE = {  # (recipe, engine): label, colour, marker
    ("fp32", "openvino"): ("FP32, OpenVINO", style.DARK, "o"),
    ("w8a8", "openvino"): ("w8a8 (ours)", style.BLUE, "D"),
    ("w4", "openvino"): ("w4 (ours)", style.GREEN, "^"),
    ("int8-nncf", "nncf"): ("INT8, NNCF", style.ORANGE, "s"),
    ("int8-pt2e", "torch-pt2e"): ("INT8, PT2E", style.PURPLE, "v"),
    ("int8-ort", "ort-static"): ("INT8, ONNX Runtime", style.VERMILION, "P"),
}
LOSS_SHOWN = 4  # points; what loses more is drawn below the break of the axis
BELOW = 4.75  # where
METHODS = ("FP32", "FP16", "INT8, FX", "INT4")  # short for tables.TITLES
SHORT = dict(zip(tables.TITLES, METHODS))
LABELLED = {"fp32": "center", "w8a8": "center", "w4": "left"}  # in the figure of sizes; where


def headline(found: Results):
    """Accuracy lost against speed-up: ours and what people would otherwise use, a panel a model."""
    rows = [row for row in found.rows if tables.method(row) in HEADLINE]
    if not rows:
        return None
    cpu = tables.usual_cpu(rows)
    rows = [row for row in rows if tables.cpu_kind(row) == cpu]
    losses = {id(row): loss for row in rows if (loss := lost(row, found.rows)) is not None}
    rows = [row for row in rows if id(row) in losses]
    models = models_of(rows)
    if not rows:
        return None
    fig, axes = style.canvas(1, len(models), 3.7, headline_finding(rows, losses), sharey=True)
    for model, axis in zip(models, axes[0]):
        for row in rows:
            if row["model"] == model:
                draw_loss(axis, row, losses[id(row)])
        axis.set_title(short_name(model), loc="left", fontweight="bold")
        axis.set_xlabel("times as fast as FP32 in torch")
        axis.set_xlim(0.8, 0.25 + max(map(tables.speed_up, rows)))
        axis.grid(visible=False, axis="x")
    set_losses(axes[0], max(losses[id(row)] for row in rows))
    axes[0][0].set_ylabel("accuracy lost, points")
    shown = [key for key in HEADLINE if any(tables.method(row) == key for row in rows)]
    handles = [Line2D([], [], **mark(key)) for key in shown]
    how = {"ncols": len(handles), "columnspacing": 1, "handletextpad": 0.2}
    title = f"one image, one thread, {cpu}"
    fig.legend(handles=handles, loc="outside lower center", title=title, **how)
    return fig


def set_losses(axes, most: float) -> None:
    """The axis of losses: as long as the largest one, or broken behind LOSS_SHOWN points."""
    if most <= LOSS_SHOWN:
        axes[0].set_ylim(max(0.5, 1.15 * most), -0.09)
        return
    for axis in axes:
        axis.axhline(LOSS_SHOWN + 0.3, color=style.GREY, linestyle=(0, (4, 3)), linewidth=1)
    axes[0].set_ylim(BELOW + 0.4, -0.4)
    ticks = range(LOSS_SHOWN + 1)
    axes[0].set_yticks([*ticks, BELOW], [*map(str, ticks), "more"])


def lost(row, rows) -> float | None:
    """Points of accuracy that a row has less than FP32 in torch."""
    baseline = tables.baseline_of(row, rows)
    return None if baseline is None else accuracy(baseline) - accuracy(row)


def draw_loss(axis, row, loss: float) -> None:
    x, y = tables.speed_up(row), loss if loss <= LOSS_SHOWN else BELOW
    axis.plot(x, y, clip_on=False, zorder=3, **mark(tables.method(row)))
    if loss > LOSS_SHOWN:
        beside = {"textcoords": "offset points", "xytext": (8, 0), "va": "center"}
        axis.annotate(f"{loss:.1f}", (x, y), fontsize=style.SMALL, **beside)


def mark(key) -> dict:
    """The look of a method of HEADLINE; FP32's mark is hollow, so that one beneath it shows."""
    label, colour, marker = HEADLINE[key]
    size = {"ms": 11, "mfc": "none", "mew": 1.8} if key[0] == "fp32" else {"ms": 8}
    return {"label": label, "color": colour, "marker": marker, "linestyle": "none"} | size


def headline_finding(rows, losses) -> str:
    """What the panels have in common, if the same method is fastest in all of them."""
    fastest = [
        max((r for r in rows if r["model"] == m), key=tables.speed_up) for m in models_of(rows)
    ]
    if len({tables.method(row) for row in fastest}) > 1:
        return "Accuracy lost against speed-up, a mark a method"
    label = HEADLINE[tables.method(fastest[0])][0]
    most = max(losses[id(row)] for row in fastest)
    speeds = [tables.speed_up(row) for row in fastest]
    return (
        f"{label} is the fastest of these, {min(speeds):.1f} to {max(speeds):.1f} times FP32, "
        f"and loses at most {most:.2f} points"
    )


def methods(found: Results):
    """Accuracy, size and latency of the published methods, and what was published of them."""
    rows = {(row["model"], row["recipe"]["name"]): row for row in found.protocol}
    models = models_of(found.protocol)
    if not models:
        return None
    panels = (
        ("test accuracy, %", accuracy, lambda model, p: p[0], "{:.1f}"),
        ("size, MB", lambda row: row["size_bytes"] / MB, lambda model, p: p[1], "{:.2f}"),
        # Against FP32 called in turn: milliseconds of rows measured apart don't compare.
        ("time, % of FP32's", time_pct, published_time_pct, "{:.0f}"),
    )
    height = 1.6 + 0.31 * len(models) * len(METHODS)
    fig, axes = style.canvas(1, 3, height, methods_finding(rows, models), sharey=True)
    colour = style.colours(tables.TITLES)
    for axis, (label, ours, theirs, form) in zip(axes[0], panels):
        for i, model in enumerate(models):
            for j, recipe in enumerate(tables.TITLES):
                y, row = i * (len(METHODS) + 0.9) + j, rows.get((model, recipe))
                published = tables.PUBLISHED.get((model, recipe))
                value = None if row is None else ours(row)
                outline = None if published is None else theirs(model, published)
                ends = [x for x in (value, outline) if x is not None]
                if value is not None:
                    axis.barh(y, value, 0.62, color=colour[recipe])
                if outline is not None:
                    axis.barh(y, outline, 0.86, fill=False, edgecolor=style.DARK, linewidth=0.9)
                text = "simulated" if value is None and row else form.format(value or 0)
                if row is not None:
                    at = max(ends, default=0)
                    axis.annotate(f" {text}", (at, y), va="center", fontsize=style.SMALL)
        axis.grid(visible=False, axis="y")
        axis.set_xlabel(label)
        axis.set_xlim(right=axis.get_xlim()[1] * 1.22)
    ticks = [
        (i * (len(METHODS) + 0.9) + j, f"{short_name(model)}  {name}")
        for i, model in enumerate(models)
        for j, name in enumerate(METHODS)
    ]
    axes[0][0].set_yticks(*zip(*ticks))
    axes[0][0].set_ylim(ticks[-1][0] + 0.7, -0.7)
    handles = [
        axes[0][0].barh(0, 0, color=style.GREY, label="on our weights, with its value"),
        axes[0][0].barh(0, 0, fill=False, edgecolor=style.DARK, label="as published"),
    ]
    fig.legend(handles=handles, loc="outside lower center", ncols=2)
    return fig


def time_pct(row) -> float | None:
    """A call's time as a share of FP32's, None where floats stood in for few bits."""
    return 100 / tables.speed_up(row) if row["kind"] == "measured" else None


def published_time_pct(model: str, published) -> float | None:
    fp32_ms = tables.PUBLISHED[model, "fp32"][2]
    return 100 * published[2] / fp32_ms if published[2] else None


def methods_finding(rows, models) -> str:
    """How much the published 8 and 4 bits lose on our weights."""
    losses = {}
    for model in models:
        for recipe in tables.TITLES:
            pair = rows.get((model, "fp32")), rows.get((model, recipe))
            if all(pair):
                losses.setdefault(recipe, []).append(accuracy(pair[0]) - accuracy(pair[1]))
    if not {"fp16", "int8-fx", "int4-percentile"} <= losses.keys():
        return "The published methods on our weights"
    int8, int4 = losses["int8-fx"], losses["int4-percentile"]
    fp16 = max(losses["fp16"])
    return (
        f"On our weights the published INT8 loses {min(int8):.1f} to {max(int8):.1f} points, INT4 "
        f"{min(int4):.1f} to {max(int4):.1f}, FP16 {f'at most {fp16:.2f}' if fp16 > 0 else 'none'}"
    )


def pareto(found: Results):
    """Accuracy against size: FP32 and our recipes on engines; grey: the published methods."""
    measured = [r for r in found.rows if r["kind"] == "measured" and r["recipe"]["layers"]]
    models = models_of(measured)
    if not models:
        return None
    ours = measured + [r for r in found.rows if r["model"] in models and tables.is_baseline(r)]
    theirs = [r for r in found.protocol if r["model"] in models and not tables.is_baseline(r)]
    floor = min(map(accuracy, ours)) - 1.2
    cut = floor + 0.6  # what is less accurate lies on the floor, with its accuracy beside
    fig, axes = style.canvas(1, 1, 4.4, pareto_finding(ours, found.rows))
    axis, colour = axes[0][0], style.colours(models)
    for row in theirs:
        x, y = row["size_bytes"] / MB, accuracy(row) if accuracy(row) > cut else floor
        axis.plot(x, y, "s", color=style.GREY, ms=6)
        text = f"{short_name(row['model'])} {SHORT[row['recipe']['name']]}"
        text += f", {accuracy(row):.0f} %" * (y == floor)
        up = 7 if row["recipe"]["name"] != "fp16" else -15  # above FP16 stands what we label
        beside = {"textcoords": "offset points", "xytext": (0, up), "ha": "center"}
        axis.annotate(text, (x, y), fontsize=style.SMALL, color=style.GREY, **beside)
    for model in models:
        points = [
            (row["size_bytes"] / MB, accuracy(row), row["recipe"]["name"])
            for row in ours
            if row["model"] == model
        ]
        for x, y, name in points:
            size = 7 if name in LABELLED else 4
            axis.plot(x, y, "o", color=colour[model], ms=size, alpha=0.85)
        for name, align in LABELLED.items():
            best = max((p for p in points if p[2] == name), key=lambda p: p[1], default=None)
            if best:
                label = {"textcoords": "offset points", "xytext": (0, 8), "ha": align}
                text = f"{short_name(model)} {tables.title_of(name)}"
                axis.annotate(text, best[:2], fontsize=style.SMALL, color=colour[model], **label)
    axis.plot([], [], "o", color=style.DARK, ms=4, label="small: our other recipes")
    axis.plot([], [], "s", color=style.GREY, label="published methods on the same weights")
    axis.axhline(cut, color=style.GREY, linestyle=(0, (4, 3)), linewidth=1)
    halves = range(math.ceil(2 * cut), math.ceil(2 * max(map(accuracy, ours))) + 1)
    ticks = [half / 2 for half in halves]  # percent
    axis.set_yticks([floor, *ticks], ["less", *map("{:g}".format, ticks)])
    axis.set_xscale("log", base=2)
    axis.xaxis.set_major_formatter("{x:g}")
    axis.margins(x=0.08, y=0.1)
    axis.set(xlabel="size of the file, MB", ylabel="test accuracy, %")
    fig.legend(loc="outside lower center", ncols=2)
    return fig


def pareto_finding(ours, rows) -> str:
    """What 4-bit weights give and take."""
    w4 = [row for row in ours if row["recipe"]["name"] == "w4" and lost(row, rows) is not None]
    if not w4:
        return "Accuracy against the size of the file"
    smaller = [tables.baseline_of(row, rows)["size_bytes"] / row["size_bytes"] for row in w4]
    times = " to ".join(dict.fromkeys(f"{x:.1f}" for x in (min(smaller), max(smaller))))
    names = ", ".join(short_name(model) for model in models_of(w4))
    return (
        f"4-bit weights (w4) make files of {names} {times} times smaller and "
        f"cost at most {max(lost(row, rows) for row in w4):.2f} points"
    )


def confusion(found: Results):
    """Which classes the first model's FP32 takes for which, in percent of the true class."""
    row = next((row for row in tables.in_order(found.rows) if tables.is_baseline(row)), None)
    if row is None:
        return None
    classes, counts = row["classes"], row["confusion"]
    fig, axes = style.canvas(1, 1, 6.4, confusion_finding(row))
    axis = axes[0][0]
    percent = [[100 * n / max(1, sum(line)) for n in line] for line in counts]
    axis.imshow(percent, cmap="Blues", vmin=0, vmax=20)  # the errors, not the diagonal
    for true, line in enumerate(percent):
        for given, value in enumerate(line):
            if round(value) >= 1:
                ink = "white" if value > 10 else "black"
                middle = {"ha": "center", "va": "center", "fontsize": 10}
                axis.annotate(f"{value:.0f}", (given, true), color=ink, **middle)
    ticks = range(len(classes))
    axis.set_xticks(ticks, classes, rotation=45, ha="right", rotation_mode="anchor")
    axis.set_yticks(ticks, classes)
    axis.grid(visible=False)
    axis.set(xlabel="predicted, % of the images of a class", ylabel="true class")
    return fig


def confusion_finding(row) -> str:
    """The two classes that are taken for each other most often."""
    counts, classes = row["confusion"], row["classes"]
    pairs = [(counts[a][b] + counts[b][a], a, b) for a in range(len(classes)) for b in range(a)]
    errors = row["n_images"] - row["n_correct"]
    n, a, b = max(pairs, default=(0, 0, 0))
    if not n:
        return f"{short_name(row['model'])} takes no class for another"
    return (
        f"{short_name(row['model'])} takes {classes[b]} and {classes[a]} for each other most "
        f"often: {n} of {errors:,} errors"
    )


def input_sizes(found: Results):
    """Accuracy against speed at several sides of the input image, a line a recipe."""
    rows = found.input_sizes
    rows = [row for row in rows if tables.cpu_kind(row) == tables.usual_cpu(rows)]
    if not rows:
        return None
    fig, axes = style.canvas(1, 1, 4.2, sizes_finding(rows))
    axis = axes[0][0]
    for model in models_of(rows):
        for recipe, colour, at in (("fp32", style.DARK, (-8, -11)), ("w8a8", style.BLUE, (8, 5))):
            points = [
                (tables.speed_up(row), accuracy(row), row["img_size"])
                for row in rows
                if (row["model"], row["recipe"]["name"]) == (model, recipe)
            ]
            label = f"{short_name(model)}, {tables.title_of(recipe)}"
            axis.plot(
                [p[0] for p in points], [p[1] for p in points], "o-", color=colour, label=label
            )
            for x, y, side in points:
                beside = {"textcoords": "offset points", "xytext": at, "color": colour}
                axis.annotate(f"{side}", (x, y), ha="center", fontsize=style.SMALL, **beside)
    axis.margins(0.08)
    axis.set_xlabel("times as fast as FP32 in torch at the side the network was trained for")
    axis.set_ylabel("test accuracy, %")
    axis.legend(loc="lower left", title="numbers: side of the image, pixels", alignment="left")
    return fig


def sizes_finding(rows) -> str:
    """The largest smaller side at which FP32 is both slower and less accurate than w8a8.

    If there is none, what w8a8 gains at the same side.
    """
    quantized = [row for row in rows if row["recipe"]["name"] == "w8a8" and is_published(row)]
    for row in quantized:
        beaten = [
            other["img_size"]
            for other in rows
            if other["recipe"]["name"] == "fp32"
            and other["model"] == row["model"]
            and other["img_size"] < row["img_size"]
            and tables.speed_up(other) < tables.speed_up(row)
            and accuracy(other) < accuracy(row)
        ]
        if beaten:
            return (
                f"Quantize first, then shrink: w8a8 at {row['img_size']} is faster and more "
                f"accurate than FP32 at {max(beaten)}"
            )
    at = {(row["model"], row["img_size"], row["recipe"]["name"]): row for row in rows}
    both = [
        (at[model, side, "fp32"], row)
        for (model, side, recipe), row in at.items()
        if recipe == "w8a8" and (model, side, "fp32") in at
    ]
    gains = [tables.speed_up(b) / tables.speed_up(a) for a, b in both]
    if gains and min(gains) > 1 and all(accuracy(b) > accuracy(a) - 0.2 for a, b in both):
        return (
            f"At every side w8a8 is as accurate as FP32 and {min(gains):.1f} to "
            f"{max(gains):.1f} times as fast"
        )
    return "Accuracy against speed by the side of the image"
