"""Figures of rows. Each function takes Results and gives a figure, or None without its rows."""

import math

import numpy as np
from matplotlib.lines import Line2D

from lab.files import MB
from lab.report import reading, style
from lab.report.reading import accuracy, models_of, short_name
from lab.report.results import Results
from lab.report.tables import PUBLISHED

HEADLINE = {  # (recipe, engine): label, colour, marker
    ("fp32", "openvino"): ("FP32, OpenVINO", style.DARK, "o"),
    ("w8a8", "openvino"): ("w8a8 (ours)", style.BLUE, "D"),
    ("w4", "openvino"): ("w4 (ours)", style.GREEN, "^"),
    ("int8-nncf", "nncf"): ("INT8, NNCF", style.ORANGE, "s"),
    ("int8-pt2e", "torch-pt2e"): ("INT8, PT2E", style.PURPLE, "v"),
    ("int8-ort", "ort-static"): ("INT8, ONNX Runtime", style.VERMILION, "P"),
}
LOSS_SHOWN = 4  # points, down to where the axis breaks
BELOW = 4.75  # the place of what loses more
METHODS = {"fp32": "FP32", "fp16": "FP16", "int8-fx": "INT8, FX", "int4-percentile": "INT4"}
# Of `methods`: label and digits. Milliseconds measured apart don't compare, shares of FP32's do.
PANELS = (("test accuracy, %", ".1f"), ("size, MB", ".2f"), ("time, % of FP32's", ".0f"))
# In `pareto`: how the text is aligned, and where it stands, in points from its mark.
LABELLED = {"fp32": ("center", (0, 8)), "w8a8": ("left", (7, -3)), "w4": ("center", (0, 8))}


def lost(row, rows) -> float:
    """Return how many points of accuracy a row has less than FP32 in torch, one of `rows`."""
    return accuracy(reading.baseline_of(row, rows)) - accuracy(row)


def headline(found: Results):
    """Draw accuracy lost against speed-up: ours and what others would use, a panel a MobileViT."""
    rows = [row for row in found.rows if reading.method(row) in HEADLINE]
    rows = reading.on_usual_cpu([row for row in rows if row["model"] in reading.MODELS])
    rows = [row for row in rows if reading.baseline_of(row, found.rows)]
    if not rows:
        return None
    models = models_of(rows)
    fig, axes = style.canvas(1, len(models), 3.7, headline_finding(rows, found.rows), sharey=True)
    for model, axis in zip(models, axes[0]):
        for row in rows:
            if row["model"] == model:
                draw_loss(axis, row, lost(row, found.rows))
        axis.set_title(short_name(model), loc="left", fontweight="bold")
        axis.set_xlabel("times as fast as FP32 in torch")
        axis.set_xlim(0.8, 0.25 + max(map(reading.speed_up, rows)))
        axis.grid(visible=False, axis="x")
    set_losses(axes[0], [lost(row, found.rows) for row in rows])
    axes[0][0].set_ylabel("accuracy lost, points")
    shown = [key for key in HEADLINE if any(reading.method(row) == key for row in rows)]
    handles = [Line2D([], [], **mark(key)) for key in shown]
    how = {"ncols": len(handles), "columnspacing": 1, "handletextpad": 0.2}
    title = f"one image, one thread, {reading.cpu_kind(rows[0])}"
    fig.legend(handles=handles, loc="outside lower center", title=title, **how)
    return fig


def set_losses(axes, losses: list[float]) -> None:
    """Make the axis of losses as long as the largest one, or break it behind LOSS_SHOWN points.

    What is gained, a loss below zero, lies above its zero.
    """
    most, gain = max(losses), max(0, -min(losses))
    if most <= LOSS_SHOWN:
        axes[0].set_ylim(max(0.5, 1.15 * most), -0.09 - gain)
        return
    for axis in axes:
        axis.axhline(LOSS_SHOWN + 0.3, **style.DASHED)
    axes[0].set_ylim(BELOW + 0.4, -0.4 - gain)
    ticks = range(LOSS_SHOWN + 1)
    axes[0].set_yticks([*ticks, BELOW], [*map(str, ticks), "more"])


def draw_loss(axis, row, loss: float) -> None:
    x, y = reading.speed_up(row), loss if loss <= LOSS_SHOWN else BELOW
    axis.plot(x, y, clip_on=False, zorder=3, **mark(reading.method(row)))
    if loss > LOSS_SHOWN:
        style.note(axis, f"{loss:.1f}", (x, y), (8, 0), va="center")


def mark(key) -> dict:
    """Return the look of a method of HEADLINE.

    FP32's mark is hollow, so that one beneath it shows.
    """
    label, colour, marker = HEADLINE[key]
    size = {"ms": 11, "mfc": "none", "mew": 1.8} if key[0] == "fp32" else {"ms": 8}
    return {"label": label, "color": colour, "marker": marker, "linestyle": "none"} | size


def headline_finding(shown, rows) -> str:
    """Say what the panels have in common, if the same method is fastest in all of them."""
    fastest = [
        max((r for r in shown if r["model"] == m), key=reading.speed_up) for m in models_of(shown)
    ]
    if len({reading.method(row) for row in fastest}) > 1:
        return "Accuracy lost against speed-up, a mark a method"
    label = HEADLINE[reading.method(fastest[0])][0]
    speeds = [reading.speed_up(row) for row in fastest]
    return (
        f"{label} is the fastest of these, {min(speeds):.1f} to {max(speeds):.1f} times FP32, "
        f"and loses {at_most(max(lost(row, rows) for row in fastest))}"
    )


def at_most(points: float) -> str:
    """Say in words how many points are lost at most."""
    return f"at most {points:.2f} points" if points > 0 else "no accuracy"


def methods(found: Results):
    """Draw accuracy, size and latency of the published methods, with what was published of them."""
    rows = {(row["model"], row["recipe"]["name"]): row for row in found.protocol}
    models = models_of(found.protocol)
    if not models:
        return None
    bars = {  # (model, recipe): its place from above
        (model, recipe): i * (len(METHODS) + 0.9) + j
        for i, model in enumerate(models)
        for j, recipe in enumerate(METHODS)
    }
    height, finding = 1.6 + 0.31 * len(bars), methods_finding(rows, models)
    fig, axes = style.canvas(1, 3, height, finding, sharey=True)
    colour = style.colours(METHODS)
    for k, (axis, (label, digits)) in enumerate(zip(axes[0], PANELS)):
        for (model, recipe), y in bars.items():
            row = rows.get((model, recipe))
            ours = values(row)[k] if row else None
            theirs = published_values(model, recipe)[k]
            if ours is not None:
                axis.barh(y, ours, 0.62, color=colour[recipe])
            if theirs is not None:
                axis.barh(y, theirs, 0.86, fill=False, edgecolor=style.DARK, linewidth=0.9)
            if row:
                text = "simulated" if ours is None else f"{ours:{digits}}"
                text += "" if theirs is None else f" ({theirs:{digits}})"
                style.note(axis, f" {text}", (max(ours or 0, theirs or 0), y), va="center")
        axis.grid(visible=False, axis="y")
        axis.set_xlabel(label)
        axis.set_xlim(right=axis.get_xlim()[1] * 1.4)
    names = [f"{short_name(model)}  {METHODS[recipe]}" for model, recipe in bars]
    axes[0][0].set_yticks([*bars.values()], names)
    axes[0][0].set_ylim(max(bars.values()) + 0.7, -0.7)
    handles = [
        axes[0][0].barh(0, 0, color=style.GREY, label="on our weights"),
        axes[0][0].barh(0, 0, fill=False, edgecolor=style.DARK, label="(as published)"),
    ]
    fig.legend(handles=handles, loc="outside lower center", ncols=2)
    return fig


def values(row) -> tuple:
    """Return what PANELS show of a row; None for the time where floats stood in for few bits."""
    time_pct = 100 / reading.speed_up(row) if row["kind"] == "measured" else None
    return accuracy(row), row["size_bytes"] / MB, time_pct


def published_values(model: str, recipe: str) -> tuple:
    """Return what PANELS show of a published method; None for what was not published."""
    pct, mb, ms = PUBLISHED.get((model, recipe), (None, None, None))
    return pct, mb, ms and 100 * ms / PUBLISHED[model, "fp32"][2]


def methods_finding(rows, models) -> str:
    """Say how much the published INT8, INT4 and FP16 lose on our weights."""
    losses = {
        recipe: [
            accuracy(rows[model, "fp32"]) - accuracy(rows[model, recipe])
            for model in models
            if {(model, "fp32"), (model, recipe)} <= rows.keys()
        ]
        for recipe in METHODS
    }
    if not all(losses.values()):
        return "The published methods on our weights"
    _, fp16, int8, int4 = losses.values()
    of_fp16 = f"at most {max(fp16):.2f}" if max(fp16) > 0 else "none"
    return (
        f"On our weights the published INT8 loses {min(int8):.1f} to {max(int8):.1f} points, "
        f"INT4 {min(int4):.1f} to {max(int4):.1f}, FP16 {of_fp16}"
    )


def pareto(found: Results):
    """Draw accuracy against size of each MobileViT, FP32 and our recipes on engines.

    The published methods are grey.
    """
    rows = [row for row in found.rows if row["model"] in reading.MODELS]
    measured = [row for row in rows if row["kind"] == "measured" and row["recipe"]["layers"]]
    models = models_of(measured)
    if not models:
        return None
    ours = measured + [r for r in rows if r["model"] in models and reading.is_baseline(r)]
    theirs = [r for r in found.protocol if r["model"] in models and not reading.is_baseline(r)]
    floor = min(map(accuracy, ours)) - 1.2
    cut = floor + 0.6  # what is less accurate lies on the floor, with its accuracy beside
    fig, axes = style.canvas(1, 1, 4.4, pareto_finding(ours, found.rows))
    axis, colour = axes[0][0], style.colours(models)
    for row in theirs:
        x, y = row["size_bytes"] / MB, accuracy(row) if accuracy(row) > cut else floor
        axis.plot(x, y, "s", color=style.GREY, ms=6)
        text = f"{short_name(row['model'])} {METHODS[row['recipe']['name']]}"
        text += f", {accuracy(row):.0f} %" * (y == floor)
        up = 7 if row["recipe"]["name"] != "fp16" else -15  # above FP16 stands what we label
        style.note(axis, text, (x, y), (0, up), ha="center", color=style.GREY)
    for model in models:
        best = {}  # of each recipe that is labelled, the most accurate
        for row in ours:
            if row["model"] == model:
                name, at = row["recipe"]["name"], (row["size_bytes"] / MB, accuracy(row))
                size = 7 if name in LABELLED else 4
                axis.plot(*at, "o", color=colour[model], ms=size, alpha=0.85)
                best[name] = max(best.get(name, at), at, key=lambda point: point[1])
        for name, (align, offset) in LABELLED.items():
            if name in best:
                text = f"{short_name(model)} {reading.title_of(name)}"
                style.note(axis, text, best[name], offset, ha=align, color=colour[model])
    axis.plot([], [], "o", color=style.DARK, ms=4, label="small: our other recipes")
    axis.plot([], [], "s", color=style.GREY, label="published methods on the same weights")
    axis.axhline(cut, **style.DASHED)
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
    """Say what 4-bit weights save in size and cost in accuracy."""
    w4 = [r for r in ours if r["recipe"]["name"] == "w4" and reading.baseline_of(r, rows)]
    if not w4:
        return "Accuracy against the size of the file"
    smaller = [reading.baseline_of(row, rows)["size_bytes"] / row["size_bytes"] for row in w4]
    times = " to ".join(dict.fromkeys(f"{x:.1f}" for x in (min(smaller), max(smaller))))
    names = ", ".join(short_name(model) for model in models_of(w4))
    return (
        f"4-bit weights (w4) make files of {names} {times} times smaller and "
        f"cost {at_most(max(lost(row, rows) for row in w4))}"
    )


def confusion(found: Results):
    """Draw which classes the first model's FP32 takes for which, in percent of the true class."""
    row = next((row for row in reading.in_order(found.rows) if reading.is_baseline(row)), None)
    if row is None:
        return None
    classes, counts = row["classes"], np.array(row["confusion"])
    fig, axes = style.canvas(1, 1, 6.4, confusion_finding(row, counts))
    axis = axes[0][0]
    percent = 100 * counts / counts.sum(1, keepdims=True).clip(1)
    axis.imshow(percent, cmap="Blues", vmin=0, vmax=20)  # the errors, not the diagonal
    for (true, given), value in np.ndenumerate(percent):
        if round(value) >= 1:
            how = {"ha": "center", "va": "center", "fontsize": 10}
            ink = "white" if value > 10 else "black"
            style.note(axis, f"{value:.0f}", (given, true), color=ink, **how)
    ticks = range(len(classes))
    axis.set_xticks(ticks, classes, rotation=45, ha="right", rotation_mode="anchor")
    axis.set_yticks(ticks, classes)
    axis.grid(visible=False)
    axis.set(xlabel="predicted, % of the images of a class", ylabel="true class")
    return fig


def confusion_finding(row, counts) -> str:
    """Name the two classes that are taken for each other most often."""
    pairs = np.tril(counts + counts.T, -1)
    b, a = np.unravel_index(pairs.argmax(), pairs.shape)
    name, classes = short_name(row["model"]), row["classes"]
    if not pairs[b, a]:
        return f"{name} takes no class for another"
    return (
        f"{name} takes {classes[a]} and {classes[b]} for each other most often: "
        f"{pairs[b, a]} of {row['n_images'] - row['n_correct']:,} errors"
    )


def input_sizes(found: Results):
    """Draw accuracy against speed at several sides of the input image, a line a recipe."""
    rows = found.input_sizes
    if not rows:
        return None
    fig, axes = style.canvas(1, 1, 4.2, sizes_finding(rows))
    axis = axes[0][0]
    for model in models_of(rows):
        for recipe, colour, at in (("fp32", style.DARK, (-8, -11)), ("w8a8", style.BLUE, (8, 5))):
            line = [r for r in rows if (r["model"], r["recipe"]["name"]) == (model, recipe)]
            xs, ys = [reading.speed_up(row) for row in line], [accuracy(row) for row in line]
            label = f"{short_name(model)}, {reading.title_of(recipe)}"
            axis.plot(xs, ys, "o-", color=colour, label=label)
            for row, *point in zip(line, xs, ys):
                style.note(axis, str(row["img_size"]), point, at, ha="center", color=colour)
    axis.margins(0.08)
    axis.set_xlabel("times as fast as FP32 in torch at the side the network was trained for")
    axis.set_ylabel("test accuracy, %")
    axis.legend(loc="lower left", title="numbers: side of the image, pixels", alignment="left")
    return fig


def sizes_finding(rows) -> str:
    """Say what w8a8 gains at every side, if it loses less than 0.2 points at each."""
    pairs = [(of["fp32"], of["w8a8"]) for of in reading.by_side(rows).values() if len(of) == 2]
    gains = [reading.speed_up(b) / reading.speed_up(a) for a, b in pairs]
    if gains and min(gains) > 1 and all(accuracy(b) > accuracy(a) - 0.2 for a, b in pairs):
        lost = max(accuracy(a) - accuracy(b) for a, b in pairs)
        faster = f"{min(gains):.1f} to {max(gains):.1f} times as fast"
        return f"At every side w8a8 loses {at_most(lost)} and is {faster}"
    return "Accuracy against speed by the side of the image"
