"""A profile as one page of HTML that needs nothing else: no other file, no network.

All is in the page before its script runs; the script sorts the table and searches.
"""

import math
from collections.abc import Iterable
from html import escape
from pathlib import Path
from string import Template

from lab.report.profile import COLUMNS, INFINITE, WORDS, cell_text, share, short

TEMPLATE = Path(__file__).with_suffix(".html")
HEIGHT = 40  # of a picture, in its own units
WORSE_IF_LESS = (*INFINITE, "cosine", "codes_used")  # sorting by these begins with the least


def page(profile: dict) -> str:
    """Return the page, as HTML, of a profile: the content of its JSON file."""
    tensors = profile["tensors"]
    return Template(TEMPLATE.read_text(encoding="utf-8")).substitute(
        title=escape(f"What {profile['recipe']['name']} does to {profile['model']}"),
        summary=summary(profile),
        n_tensors=len(tensors),
        headings="".join(map(heading, COLUMNS)),
        lines="\n".join(line(i, tensor) for i, tensor in enumerate(tensors)),
        suggestion=suggestion_section(profile["suggestion"]),
        blocks=blocks_table(profile["blocks"]),
        accuracy=accuracy_section(profile),
        sections="\n".join(section(i, tensor) for i, tensor in enumerate(tensors)),
        **{name: escape(column.title) for name, column in COLUMNS.items()},
    )


def summary(profile: dict) -> str:
    kinds = "weights and inputs" if any(t["cumulative"] for t in profile["tensors"]) else "weights"
    outputs = db(profile["outputs_db"])
    return (
        f"<p>Recipe <b>{escape(profile['recipe']['name'])}</b>: "
        f"{escape(profile['recipe']['title'])}. {len(profile['tensors'])} quantized tensors "
        f"({kinds}), seen on {profile['n_images']} training images of {profile['img_size']} pixels "
        f"a side. The outputs of the quantized network have a QSNR of {outputs} dB.</p>"
    )


# The table


def heading(name: str) -> str:
    sort = "descending" if name == "noise" else "none"  # as the lines come
    first = "ascending" if name in WORSE_IF_LESS + WORDS else "descending"
    kind = ' class="word"' if name in WORDS else ""
    title = escape(COLUMNS[name].title)
    return (
        f'<th scope="col"{kind} aria-sort="{sort}" data-first="{first}">'
        f'<button type="button">{title}</button></th>'
    )


def line(i: int, tensor: dict) -> str:
    cells = []
    for name, column in COLUMNS.items():
        value, text = column.value(tensor), escape(cell_text(name, tensor))
        if value is None:
            value = "Infinity" if text == "∞" else ""
        attributes = f'data-value="{escape(str(value))}"'
        if name == "layer":
            cells.append(f'<th scope="row" {attributes}><a href="#t{i}">{text}</a></th>')
        else:
            kind = ' class="word"' if name in WORDS else ""
            cells.append(f"<td{kind} {attributes}>{text}</td>")
    words = " ".join(str(tensor[name]) for name in ("layer", "role", "format", "block")).lower()
    return f'<tr data-section="t{i}" data-text="{escape(words)}">{"".join(cells)}</tr>'


# A tensor's section


def section(i: int, tensor: dict) -> str:
    name = escape(f"{tensor['layer']}, {tensor['role']}")
    facts = "".join(f"<dt>{escape(k)}</dt><dd>{escape(v)}</dd>" for k, v in facts_of(tensor))
    return (
        f'<section class="tensor" id="t{i}" aria-labelledby="t{i}-name">'
        f'<h3 id="t{i}-name">{i + 1}. {name}</h3><div>'
        f"{histogram(tensor, name)}{codes(tensor, name)}<dl>{facts}</dl></div>"
        f'<a href="#worst">Back to the table</a></section>'
    )


def facts_of(tensor: dict) -> list[tuple[str, str]]:
    """Return what a tensor's section says in words besides the table, as (title, text) pairs."""
    local, cumulative = tensor["local"], tensor["cumulative"]
    facts = [
        ("Format", tensor["format"]),
        ("Block", tensor["block"]),
        ("Shape", " × ".join(map(str, tensor["shape"]))),
        ("Values", f"{short(tensor['min'])} to {short(tensor['max'])}"),
        ("Format covers", " to ".join(map(short, tensor["range"]))),
        ("Mean, σ", f"{short(tensor['mean'])}, {short(tensor['sigma'])}"),
        ("Scale", ends(tensor["scale"], short, tensor["n_scales"])),
        ("Zero-point", ends(tensor["zero_point"], str, 1)),
        ("Codes used", f"{tensor['codes_used']} of {tensor['n_codes']}"),
        (
            "Clipped",
            f"{share(tensor['clipped_low'])} % below, {share(tensor['clipped_high'])} % above",
        ),
        ("QSNR alone", f"{db(local['qsnr_db'])} dB"),
    ]
    if cumulative:
        worst = db(cumulative["worst_channel_db"])
        facts.append(("QSNR in network", f"{db(cumulative['qsnr_db'])} dB, worst channel {worst}"))
    if tensor["row_sums"]:
        sums = tensor["row_sums"]
        facts.append(
            ("Row sums", f"{sums['mean']:.4f}, from {sums['min']:.4f} to {sums['max']:.4f}")
        )
    return facts


def db(value: float | None) -> str:
    return "∞" if value is None else f"{value:.1f}"


def ends(pair: list | None, text, n: int) -> str:
    """Return the least and the largest of `n` values as text, one number if they are the same."""
    if pair is None:
        return "–"
    both = text(pair[0]) if pair[0] == pair[1] else " to ".join(map(text, pair))
    return both if n == 1 else f"{both} ({n})"


def heights(counts: list[int]) -> list[float]:
    """Return counts as heights, by their logarithm so that rare values show."""
    top = math.log1p(max(counts)) or 1.0
    return [round(HEIGHT * 0.95 * math.log1p(count) / top, 1) for count in counts]


def steps(counts: list[int]) -> str:
    """Return the path along the tops of bars of width 1, as SVG."""
    return "".join(f"V{HEIGHT - height:g}h1" for height in heights(counts))


def histogram(tensor: dict, name: str) -> str:
    picture = tensor["histogram"]
    low, high, n = picture["low"], picture["high"], len(picture["float"])
    places = [n * (end - low) / (high - low) for end in tensor["range"]]
    dashed = "".join(
        f'<line class="end" x1="{x:.1f}" x2="{x:.1f}" y1="0" y2="{HEIGHT}"/>'
        for x in places
        if 0 < x < n
    )
    drawing = (
        f'<path class="float" d="M0 {HEIGHT}{steps(picture["float"])}V{HEIGHT}z"/>'
        f'<path class="quantized" d="M0 {HEIGHT}{steps(picture["quantized"])}V{HEIGHT}"/>{dashed}'
    )
    label = f"Histogram of {name}, from {short(low)} to {short(high)}"
    return figure(drawing, n, label, "Values", short(low), short(high))


def codes(tensor: dict, name: str) -> str:
    counts = tensor["codes"]
    bars = [(i, height) for i, height in enumerate(heights(counts)) if counts[i]]
    path = "".join(f"M{i}.5 {HEIGHT}v-{height:g}" for i, height in bars)
    label = f"Codes of {name}: {tensor['codes_used']} of {tensor['n_codes']} are used"
    last = tensor["first_code"] + tensor["n_codes"] - 1
    drawing = f'<path class="codes" stroke-width="0.8" d="{path}"/>'
    return figure(drawing, len(counts), label, "Codes", str(tensor["first_code"]), str(last))


def figure(drawing: str, width: int, label: str, title: str, low: str, high: str) -> str:
    return (
        f'<figure><svg viewBox="0 0 {width} {HEIGHT}" preserveAspectRatio="none" role="img" '
        f'aria-label="{label}">{drawing}</svg><figcaption class="ends"><span>{low}</span>'
        f"<span>{title}</span><span>{high}</span></figcaption></figure>"
    )


# Blocks, accuracy, suggestion


def table(columns: Iterable[str], lines: Iterable[Iterable[str]]) -> str:
    """Return a table of cells in HTML, the first of each line its name."""
    heads = "".join(f'<th scope="col">{column}</th>' for column in columns)
    rows = "".join(
        f'<tr><th scope="row">{name}</th>{"".join(f"<td>{cell}</td>" for cell in cells)}</tr>'
        for name, *cells in lines
    )
    table = f"<table><thead><tr>{heads}</tr></thead><tbody>{rows}</tbody></table>"
    return f'<div class="wide">{table}</div>'


def blocks_table(blocks: list[dict]) -> str:
    columns = ("Block", "Alone, dB", "In network, dB", "Alone above, in network below")
    values = [(block["local_db"], block["cumulative_db"]) for block in blocks]
    longest = max([1.0, *(value for pair in values for value in pair if value is not None)])
    lines = (
        (escape(block["name"]), *map(db, pair), bars(pair, longest))
        for block, pair in zip(blocks, values)
    )
    return table(columns, lines)


def bars(pair: tuple[float | None, float | None], longest: float) -> str:
    """Return two bars, one below the other, as SVG; a whole one where nothing was lost."""
    rects = ""
    for y, kind, value in zip((0, 5), ("own", "all"), pair):
        width = 100 if value is None else max(100 * value / longest, 0)
        rects += f'<rect class="{kind}" y="{y}" width="{width:.1f}" height="4.5"/>'
    box = 'class="bar" viewBox="0 0 100 10" preserveAspectRatio="none" aria-hidden="true"'
    return f"<svg {box}>{rects}</svg>"


SCORES = {
    "top1_pct": "Top-1",
    "top5_pct": "Top-5",
    "precision_pct": "Precision",
    "recall_pct": "Recall",
    "f1_pct": "F1",
}
OF_CLASS = ("precision_pct", "recall_pct", "f1_pct")


def accuracy_section(profile: dict) -> str:
    scores = profile["scores"]
    n_images, n_absent = scores["float"]["n_images"], scores["float"]["n_absent"]
    absent = f" {n_absent} classes have no image and are left out of the means." * bool(n_absent)
    changed = " and ".join(
        f"the {which} one for {n}" for which, n in profile["n_changed"].items() if which != "float"
    )
    columns = ("Network", *(f"{title}, %" for title in SCORES.values()))
    lines = (
        (escape(which), *(percent(of_one[key]) for key in SCORES))
        for which, of_one in scores.items()
    )
    titles = (f"{SCORES[key]}, {escape(which)}" for key in OF_CLASS for which in scores)
    of_classes = (
        (
            escape(name),
            str(scores["float"]["classes"][k]["n_images"]),
            *(percent(s["classes"][k][key]) for key in OF_CLASS for s in scores.values()),
        )
        for k, name in enumerate(profile["classes"])
    )
    return (
        f"<p>On {n_images} {escape(profile['split'])} images. Another class than the float "
        f"network's is predicted by {changed}. Precision: of images given a class, how many have "
        f"it. Recall: of images of a class, how many were given it. F1: their harmonic mean. All "
        f"three are means over classes, each counting the same (macro).{absent}</p>"
        f"{table(columns, lines)}<details><summary>Class by class, %</summary>"
        f"{table(('Class', 'Images', *titles), of_classes)}</details>"
    )


def percent(value: float | None) -> str:
    return "–" if value is None else f"{value:.2f}"


def suggestion_section(found: dict | None) -> str:
    if found is None:
        return ""
    tensors = "".join(f"<li>{escape(', '.join(pair))}</li>" for pair in found["tensors"])
    columns = ("Worst excepted", "Noise in the outputs", "Predictions changed", "Top-1, %")
    lines = (
        (str(t["n_tensors"]), short(t["noise"]), str(t["n_changed"]), percent(t["top1_pct"]))
        for t in found["tries"]
    )
    written = escape(found["exceptions"].replace("-bit", " bits"))
    which = (
        "shortest list tried that halves" if found["halved"] else "longest list tried; none halves"
    )
    return (
        f'<h2 id="suggestion">Suggested exceptions</h2><p>These tensors in {written}, all others '
        f"as they are: the {which} the noise in the outputs on "
        f"{found['n_images']} held-out images. The recipe is in "
        f"<code>{escape(found['file'])}</code>.</p><ol>{tensors}</ol>{table(columns, lines)}"
    )
