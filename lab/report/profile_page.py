"""A profile as one page of HTML that needs nothing else: no other file, no network.

All is in the page before its script runs; the script sorts the table and searches.
"""

import math
from html import escape
from pathlib import Path
from string import Template

from lab.report.profile import COLUMNS, INFINITE, WORDS, cell_text, share, short

TEMPLATE = Path(__file__).with_suffix(".html")
HEIGHT = 40  # of a picture, in its own units
WORSE_IF_LESS = (*INFINITE, "cosine", "codes_used")  # sorting by these begins with the least


def page(profile: dict) -> str:
    """The page of a profile, the content of its JSON file."""
    tensors = profile["tensors"]
    return Template(TEMPLATE.read_text(encoding="utf-8")).substitute(
        title=escape(f"What {profile['recipe']['name']} does to {profile['model']}"),
        summary=summary(profile),
        n_tensors=len(tensors),
        headings="".join(map(heading, COLUMNS)),
        lines="\n".join(line(i, tensor) for i, tensor in enumerate(tensors)),
        suggestion=suggestion_section(profile["suggestion"]),
        blocks="\n".join(block_line(block, profile["blocks"]) for block in profile["blocks"]),
        accuracy=accuracy_section(profile),
        meanings="\n".join(
            f"<dt>{escape(c.title)}</dt><dd>{escape(c.meaning)}</dd>" for c in COLUMNS.values()
        ),
        sections="\n".join(section(i, tensor) for i, tensor in enumerate(tensors)),
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
    """What a section says in words besides the table."""
    local, cumulative = tensor["local"], tensor["cumulative"]
    facts = [
        ("Format", tensor["format"]),
        ("Block", tensor["block"]),
        ("Shape", " × ".join(map(str, tensor["shape"]))),
        ("Values", f"{short(tensor['min'])} to {short(tensor['max'])}"),
        ("Format covers", " to ".join(map(short, tensor["range"]))),
        ("Mean, σ", f"{short(tensor['mean'])}, {short(tensor['sigma'])}"),
        ("Scale", ends(tensor["scale"], short, tensor["n_scales"])),
        ("Zero-point", ends(tensor["zero_point"], str, tensor["n_scales"])),
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
    """The least and the largest of some values, once if they are the same."""
    if pair is None:
        return "–"
    both = text(pair[0]) if pair[0] == pair[1] else " to ".join(map(text, pair))
    return both if n == 1 else f"{both} ({n})"


def heights(counts: list[int]) -> list[float]:
    """Counts as heights, by their logarithm so that rare values show."""
    top = math.log1p(max(counts)) or 1.0
    return [round(HEIGHT * 0.95 * math.log1p(count) / top, 1) for count in counts]


def steps(counts: list[int]) -> str:
    """The path along the tops of bars of width 1."""
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
    bars = zip(range(len(counts)), counts, heights(counts))
    path = "".join(f"M{i}.5 {HEIGHT}v-{height:g}" for i, count, height in bars if count)
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


def block_line(block: dict, blocks: list[dict]) -> str:
    values = {"own": block["local_db"], "all": block["cumulative_db"]}
    known = [b[key] for b in blocks for key in ("local_db", "cumulative_db") if b[key] is not None]
    longest = max([1.0, *known])
    bars = ""
    for place, (kind, value) in enumerate(values.items()):
        width = 100 if value is None else max(100 * value / longest, 0)
        bars += f'<rect class="{kind}" y="{5 * place}" width="{width:.1f}" height="4.5"/>'
    box = 'class="bar" viewBox="0 0 100 10" preserveAspectRatio="none" aria-hidden="true"'
    cells = "".join(f"<td>{db(value)}</td>" for value in values.values())
    name = escape(block["name"])
    return f'<tr><th scope="row">{name}</th>{cells}<td><svg {box}>{bars}</svg></td></tr>'


SCORES = {
    "top1_pct": "Top-1",
    "top5_pct": "Top-5",
    "precision_pct": "Macro precision",
    "recall_pct": "Macro recall",
    "f1_pct": "Macro F1",
}


def accuracy_section(profile: dict) -> str:
    scores = profile["scores"]
    n_images, n_absent = scores["float"]["n_images"], scores["float"]["n_absent"]
    changed = " and ".join(
        f"the {which} one for {n}" for which, n in profile["n_changed"].items() if which != "float"
    )
    absent = f" {n_absent} classes have no image and are left out of the means." * bool(n_absent)
    head = "".join(f'<th scope="col">{title}, %</th>' for title in SCORES.values())
    lines = "".join(
        f'<tr><th scope="row">{escape(which)}</th>'
        + "".join(f"<td>{percent(of_one[key])}</td>" for key in SCORES)
        + "</tr>"
        for which, of_one in scores.items()
    )
    keys = ("precision_pct", "recall_pct", "f1_pct")
    titles = [f"{SCORES[key].split()[1]}, {which}" for key in keys for which in scores]
    of_classes = ""
    for k, name in enumerate(profile["classes"]):
        cells = (percent(of_one["classes"][k][key]) for key in keys for of_one in scores.values())
        of_classes += f'<tr><th scope="row">{escape(name)}</th>'
        of_classes += f"<td>{scores['float']['classes'][k]['n_images']}</td>"
        of_classes += "".join(f"<td>{cell}</td>" for cell in cells) + "</tr>"
    heads = "".join(f'<th scope="col">{escape(title)}</th>' for title in titles)
    return (
        f"<p>On {n_images} {escape(profile['split'])} images. Another class than the "
        f"float network's is predicted by {changed}. Macro: the mean over classes, each "
        f"counting the same. Precision: of images given a class, how many have it; recall: of "
        f"images of a class, how many were given it; F1: their harmonic mean.{absent}</p>"
        f'<table><thead><tr><th class="word" scope="col">Network</th>{head}</tr></thead>'
        f"<tbody>{lines}</tbody></table>"
        f"<details><summary>Class by class, %</summary><table><thead><tr>"
        f'<th class="word" scope="col">Class</th><th scope="col">Images</th>{heads}</tr></thead>'
        f"<tbody>{of_classes}</tbody></table></details>"
    )


def percent(value: float | None) -> str:
    return "–" if value is None else f"{value:.2f}"


def suggestion_section(found: dict | None) -> str:
    if found is None:
        return ""
    tensors = "".join(f"<li>{escape(', '.join(pair))}</li>" for pair in found["tensors"])
    tries = "".join(
        f'<tr><th scope="row">{one["n_tensors"]}</th><td>{short(one["noise"])}</td>'
        f"<td>{one['n_changed']}</td><td>{percent(one['top1_pct'])}</td></tr>"
        for one in found["tries"]
    )
    return (
        f'<h2 id="suggestion">Suggested exceptions</h2><p>These tensors in '
        f"{escape(found['exceptions'])}, all others as they are: the shortest list tried that "
        f"halves the noise in the outputs on {found['n_images']} held-out images. The recipe is in "
        f"<code>{escape(found['file'])}</code>.</p><ol>{tensors}</ol>"
        f'<table><thead><tr><th class="word" scope="col">Worst tensors excepted</th>'
        f'<th scope="col">Noise in the outputs</th><th scope="col">Predictions changed</th>'
        f'<th scope="col">Top-1, %</th></tr></thead><tbody>{tries}</tbody></table>'
    )
