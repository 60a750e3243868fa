"""Figures of runs, layers, operations and steps; None where there is nothing to draw."""

import statistics
from itertools import groupby

from matplotlib.ticker import LogLocator, NullLocator

from lab.report import style
from lab.report.reading import MODELS, accuracy, models_of, short_name, title_of
from lab.report.results import Results
from lab.report.studies import (
    NODES,
    OTHERS,
    by_recipe,
    node_times,
    noises_of,
    run_chain,
)

BANDS = ("#FBF3DD", "#F6E3B4", "#E4EFF7", "#C5DEEF", "#A3CAE5", "#8CBBDB")  # backgrounds
STEPS = ("w4-minmax", "w4-nearest", "w4-shift", "w4-gptq", "w4")  # each with the one before, better
SHOWN_MS = 0.45  # a part of a bar that is wide enough for its number


def training_curves(found: Results):
    """Draw held-out error over minutes of training, a panel a run, with the runs before it.

    The chosen epoch has its accuracy.
    """
    if not found.runs:
        return None
    chains = [run_chain(run) for run in found.runs]
    minutes = [sum(row["seconds"] for run in chain for row in run["log"]) / 60 for chain in chains]
    widths = [max(m, max(minutes) / 3) for m in minutes]
    how = {"sharey": True, "width_ratios": widths}
    fig, axes = style.canvas(1, len(chains), 3.9, training_finding(chains, minutes), **how)
    sizes = sorted({size_of(row) for chain in chains for run in chain for row in run["log"]})
    shades = {size: BANDS[i % len(BANDS)] for i, size in enumerate(sizes)}
    for chain, axis in zip(chains, axes[0]):
        draw_chain(axis, chain, shades)
        widened = "\nwidened" * bool(chain[0]["config"].get("widen"))
        name = short_name(chain[-1]["model"]) + widened
        axis.set_title(name, loc="left", fontweight="bold")
        axis.grid(visible=False, axis="x")
    axes[0][0].set_yscale("log")  # that gains of tenths are seen
    axes[0][0].set_ylim(bottom=0.55 * axes[0][0].get_ylim()[0])  # for numbers below the curves
    axes[0][0].yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes[0][0].yaxis.set_minor_locator(NullLocator())
    axes[0][0].yaxis.set_major_formatter("{x:g}")
    axes[0][0].set_ylabel("held-out error, %")
    about = "minutes of training; bands: side in pixels of the image, or of a window in the image"
    fig.supxlabel(about, fontsize=10)
    return fig


def size_of(row) -> tuple[int, int]:
    """Return the sides in pixels of an epoch's images and of the windows that it trained on."""
    return int(row["img_size"]), int(row["window"])


def draw_chain(axis, chain, shades) -> None:
    """Draw epochs as marks at their ends, a line for each run, a band for each size of images."""
    end, bands = 0.0, []
    for run in chain:
        points = []
        for size, epochs in groupby(run["log"], size_of):
            start = end
            for row in epochs:
                end += row["seconds"] / 60
                points.append((end, 100 - row["val_accuracy_pct"]))
            bands.append((start, end, size))
        axis.plot(*zip(*points), "o-", color=style.DARK, ms=5, clip_on=False)
    chosen = points[[int(row["epoch"]) for row in run["log"]].index(run["epoch"])]
    style.note(axis, f"{100 - chosen[1]:.2f} %\nright", chosen, (0, -28), fontsize=10, ha="right")
    for start, stop, size in bands:
        axis.axvspan(start, stop, color=shades[size], linewidth=0)
        side, window = size
        label = f"{side}" if window == side else f"{window} of {side}"
        how = {"xycoords": ("data", "axes fraction"), "ha": "right", "va": "top"}
        style.note(axis, label, (stop, 0.97), rotation=90, **how)  # where curves are low
    axis.set_xlim(0, end)


def training_finding(chains, minutes) -> str:
    """Say how far the best MobileViT, or else the best network, came, in what time, on what."""

    def merit(i: int) -> tuple[bool, float]:
        return chains[i][-1]["model"] in MODELS, chains[i][-1]["val_accuracy_pct"]

    i = max(range(len(chains)), key=merit)
    last, time = chains[i][-1], minutes[i]
    took = f"{time:.0f} minutes" if time < 120 else f"{time / 60:.1f} hours"
    name = short_name(last["model"]) + ", widened," * bool(last["config"].get("widen"))
    return (
        f"{name} gets {last['val_accuracy_pct']:.2f} % of held-out images "
        f"right after {took} on {last['hardware'].split(',')[0]}"
    )


def layers(found: Results):
    """Draw the tensors whose quantization alone changes the logits most, a panel a recipe."""
    reports = {name: report for name, report in found.reports.items() if report}
    if not reports:
        return None
    height = 1.2 + sum(0.75 + 0.24 * report["largest"] for report in reports.values())
    ratios = [report["largest"] for report in reports.values()]
    finding = layers_finding(reports)
    fig, axes = style.canvas(len(reports), 1, height, finding, height_ratios=ratios)
    colours = {"weight": style.ORANGE, "input": style.BLUE, "activation": style.SKY}
    for (name, report), axis in zip(reports.items(), axes[:, 0]):
        shown = noises_of(report)[: report["largest"]]
        for y, (noise, kind, _) in enumerate(shown):
            axis.barh(y, noise, color=colours.get(kind, style.GREY))
            style.note(axis, f" {noise:.6f}", (noise, y), va="center")
        axis.set_yticks(range(len(shown)), [tensor for *_, tensor in shown])
        axis.invert_yaxis()
        axis.grid(visible=False, axis="y")
        axis.margins(x=0.12, y=0.02)
        title = f"{title_of(name)}: all {len(noises_of(report))} together "
        title += f"{report['noise_of_all']:.3f}"
        axis.set_title(title, loc="left", fontweight="bold")
        for kind in dict.fromkeys(kind for _, kind, _ in shown):
            axis.barh(0, 0, color=colours.get(kind, style.GREY), label=f"{kind} of")
        axis.legend(loc="lower right")
    axes[-1, 0].set_xlabel(
        "noise in the logits when this alone is quantized, share of their variance"
    )
    return fig


def layers_finding(reports) -> str:
    """Say how large a part of all single noises the largest ones make."""
    parts = []
    for name, report in reports.items():
        noises = [noise for noise, *_ in noises_of(report)]
        n, total = min(report["largest"], len(noises)), sum(noises)
        if total:
            pct = 100 * sum(noises[:n]) / total
            parts.append(f"{n} of {len(noises)} tensors make {pct:.0f} % ({title_of(name)})")
    return f"Few tensors make most of the noise: {', '.join(parts)}"


def milliseconds(found: Results):
    """Draw where OpenVINO spends one call, operation by operation, a bar a method."""
    bench = found.operators
    if bench is None:
        return None
    bars = {name: node_times(nodes) for name, nodes in bench["ms"].items()}
    kinds = [*NODES, OTHERS[0]]
    colour = style.colours(kinds) | {OTHERS[0]: style.LIGHT}
    fig, axes = style.canvas(1, 1, 1.8 + 0.5 * len(bars), milliseconds_finding(bench, bars))
    axis = axes[0][0]
    for y, times in enumerate(bars.values()):
        left = 0.0
        for kind, arithmetic in sorted(times, key=lambda part: kinds.index(part[0])):
            ms = times[kind, arithmetic]
            hatch = "////" if arithmetic == "INT8" else None
            how = {"hatch": hatch, "edgecolor": "white", "linewidth": 0.8}
            axis.barh(y, ms, 0.7, left=left, color=colour[kind], **how)
            if ms >= SHOWN_MS:
                box = {"facecolor": "white", "edgecolor": "none", "pad": 1.2}
                middle = {"ha": "center", "va": "center", "bbox": box}
                style.note(axis, f"{ms:.1f}", (left + ms / 2, y), **middle)
            left += ms
        axis.annotate(f" {left:.1f}", (left, y), va="center", fontweight="bold")
    names = [" on ".join(map(title_of, name.split("@"))) for name in bars]
    axis.set_yticks(range(len(bars)), names)
    axis.invert_yaxis()
    axis.grid(visible=False, axis="y")
    axis.set_xlabel("milliseconds of one call, one thread; hatched: computed in INT8")
    handles = [axis.barh(0, 0, color=colour[kind], label=kind) for kind in kinds]
    fig.legend(handles=handles, loc="outside lower center", ncols=3)
    return fig


def milliseconds_finding(bench, bars) -> str:
    """Say what integers save in linear layers and in dense convolutions."""

    def spent(name, kind):
        return sum(ms for (of, _), ms in bars[name].items() if of == kind)

    before, after = "fp32@openvino", "w8a8@openvino"
    if not {before, after} <= bars.keys():
        return f"Where one call of {short_name(bench['model'])} spends its time"
    parts = (
        f"{kind} from {spent(before, kind):.1f} to {spent(after, kind):.1f} ms"
        for kind in ("linear layers", "convolutions")
    )
    return f"w8a8 takes {short_name(bench['model'])}'s {', its '.join(parts)}"


def waterfall(found: Results):
    """Draw held-out accuracy from plain rounding to w4, a bar for what each step adds."""
    models = models_of(found.ablation)
    recipes = by_recipe([r for r in found.ablation if r["model"] == models[0]]) if models else {}
    steps = [name for name in STEPS if name in recipes]
    if len(steps) < 2:
        return None
    means = {name: statistics.mean(map(accuracy, rows)) for name, rows in recipes.items()}
    gains = {b: means[b] - means[a] for a, b in zip(steps, steps[1:])}
    titles = {name: recipes[name][0]["recipe"]["title"] for name in steps}
    most = max(gains, key=gains.get)
    finding = (
        f"4-bit weights go from {means[steps[0]]:.2f} to {means[steps[-1]]:.2f} % of held-out "
        f"images right; largest step: {titles[most]} ({gains[most]:+.2f})"
    )
    fig, axes = style.canvas(1, 1, 1.5 + 0.42 * len(steps), finding)
    axis, low = axes[0][0], 0.0
    for y, name in enumerate(steps):
        step = gains.get(name, means[name])
        colour = style.GREY if not y else style.BLUE if step >= 0 else style.VERMILION
        axis.barh(y, step, 0.62, left=low, color=colour, edgecolor=colour)  # 0 shows as a line
        low += step
        gain = f" ({step:+.2f})" if y else ""
        start, stop = sorted((low - step, low))
        to_left = stop > 60  # where FP32's line would cross a text to the right
        at, align = (start, "right") if to_left else (stop, "left")
        colour = None
        if to_left and not y:  # the first bar has no room to its left
            at, colour = stop, "white"
        axis.annotate(f" {low:.2f} %{gain} ", (at, y), va="center", ha=align, color=colour)
    if "fp32" in means:
        axis.axvline(means["fp32"], **style.DASHED | {"color": style.DARK})
        at = (means["fp32"], len(steps) - 0.3)
        axis.annotate(f"FP32 {means['fp32']:.2f} % ", at, ha="right", va="center")
    axis.set_yticks(range(len(steps)), [f"{titles[name]}\n{name}" for name in steps])
    axis.set_ylim(len(steps), -0.6)
    axis.set_xlim(0, 100)
    axis.grid(visible=False, axis="y")
    axis.set_xlabel(f"held-out accuracy of {short_name(models[0])}, %, simulated")
    return fig
