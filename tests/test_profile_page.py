"""The page of a profile: its content without a browser, and clicked through in one."""

import copy
import csv
import io
import re
import shutil
from html.parser import HTMLParser

import pytest
import torch
from small import draw, small_network

import ptq
from lab.report.histograms import write_histograms
from lab.report.profile import COLUMNS, csv_text
from lab.report.profile_page import page
from lab.tasks.classification import class_scores
from ptq.analysis.profile import profile

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "chromium-headless-shell")


@pytest.fixture(scope="module")
def report():
    network, images = small_network(), [(draw(4, 3, 32, 32), None)]
    recipe = ptq.recipe("w8a8-nearest", network)
    quantized = ptq.quantize(network, recipe, images)
    scores = class_scores(draw(50, 10), torch.arange(50) % 9)
    suggestion = {
        "tensors": [["classifier", "input"]],
        "exceptions": "16-bit",
        "n_images": 50,
        "file": "suggested.json",
        "halved": True,
        "tries": [{"n_tensors": 0, "noise": 1e-3, "n_changed": 2, "top1_pct": 90.0}],
    }
    return profile(network, quantized, recipe, images) | {
        "model": "small <script>",
        "img_size": 32,
        "split": "held-out",
        "recipe": recipe.asdict(),
        "classes": [f"class {k}" for k in range(10)],
        "scores": {"float": scores, "quantized": scores},
        "n_changed": {"float": 0, "quantized": 3},
        "suggestion": suggestion,
    }


class Elements(HTMLParser):
    """All elements as (tag, attributes), and whether each was closed."""

    VOID = ("meta", "input", "line", "rect", "path")

    def __init__(self, text):
        super().__init__()
        self.found, self.open = [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.found.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        if tag not in self.VOID:
            assert self.open.pop() == tag


def test_the_page_is_whole_and_needs_nothing_else(report):
    text = page(report)
    elements = Elements(text)
    assert not elements.open and text.count("<script") == 1 and len(text) < 500_000
    assert not re.search(r"https?://|@import|url\(|<link|src=", text)
    ids = [attrs["id"] for _, attrs in elements.found if "id" in attrs]
    targets = [attrs["href"][1:] for tag, attrs in elements.found if tag == "a"]
    assert len(ids) == len(set(ids)) and set(targets) <= set(ids)
    n = len(report["tensors"])
    lines = [attrs["data-section"] for _, attrs in elements.found if "data-section" in attrs]
    assert lines == [f"t{i}" for i in range(n)]
    pictures = [attrs["aria-label"] for tag, attrs in elements.found if attrs.get("role") == "img"]
    assert len(pictures) == 2 * n
    for column in COLUMNS.values():
        assert f"<dt>{column.title}</dt><dd>" in text


def test_a_page_of_odd_values_can_be_written(report):
    odd = copy.deepcopy(report) | {"suggestion": None, "outputs_db": None}
    odd["tensors"] = odd["tensors"][:1]
    odd["tensors"][0]["layer"] = '"><b>&'
    odd["tensors"][0]["local"]["qsnr_db"] = None
    odd["blocks"] = [{"name": "all", "local_db": None, "cumulative_db": -3.0}]
    text = page(odd)
    assert not Elements(text).open and "<b>&" not in text and "∞" in text


def test_the_table_as_csv(report):
    lines = list(csv.DictReader(io.StringIO(csv_text(report))))
    assert [line["layer"] for line in lines] == [t["layer"] for t in report["tensors"]]
    for line, tensor in zip(lines, report["tensors"]):
        assert float(line["mse"]) == tensor["local"]["mse"]
        assert (line["cumulative_db"] == "") == (tensor["role"] == "weight")
        assert float(line["scale_low"]) == tensor["scale"][0]
        assert float(line["clipped_low"]) == tensor["clipped_low"]
        assert float(line["clipped_high"]) == tensor["clipped_high"]


def test_histograms_are_drawn(report, tmp_path):
    paths = write_histograms(report | {"tensors": report["tensors"][:3]}, tmp_path)
    assert [path.name for path in paths] == ["histograms-01.png"]
    assert paths[0].read_bytes()[:4] == b"\x89PNG" and list(tmp_path.iterdir()) == paths


@pytest.fixture(scope="module")
def opened(report, tmp_path_factory):
    """The page in headless Chromium, with what it asked for and complained about."""
    api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    path = tmp_path_factory.mktemp("page") / "report.html"
    path.write_text(page(report), encoding="utf-8")
    found = next(filter(None, map(shutil.which, BROWSERS)), None)
    with api.sync_playwright() as playwright:
        try:
            browser = playwright.chromium.launch(executable_path=found)
        except api.Error:
            pytest.skip("Chromium is not installed")
        tab, noted = browser.new_page(), []
        tab.on("request", lambda request: noted.append(request.url))
        tab.on("console", lambda message: noted.append(message.text))
        tab.on("pageerror", lambda error: noted.append(str(error)))
        tab.goto(path.as_uri())
        yield tab, noted, path.as_uri()
        browser.close()


def shown(tab, column):
    """What the visible lines hold in a column."""
    i = list(COLUMNS).index(column)
    lines = tab.locator("#tensors tbody tr:visible")
    return lines.evaluate_all("(rows, i) => rows.map((row) => row.cells[i].dataset.value)", i)


def test_sorting_searching_and_reading_in_a_browser(opened, report):
    tab, noted, address = opened
    names = list(COLUMNS)
    heading = tab.locator("#tensors th").nth(names.index("qsnr_db"))
    noises = [float(value) for value in shown(tab, "noise")]
    assert noises == sorted(noises, reverse=True)
    heading.get_by_role("button").click()
    values = [float(value) for value in shown(tab, "qsnr_db")]
    assert values == sorted(values) and heading.get_attribute("aria-sort") == "ascending"
    heading.get_by_role("button").press("Enter")  # by keyboard, the other way round
    values = [float(value) for value in shown(tab, "qsnr_db")]
    assert values == sorted(values, reverse=True)
    tab.locator("#tensors th button").nth(names.index("cumulative_db")).click()
    values = shown(tab, "cumulative_db")
    n_weights = sum(t["role"] == "weight" for t in report["tensors"])
    assert values[-n_weights:] == [""] * n_weights and "" not in values[:-n_weights]

    tab.get_by_label("Search").fill("DEPTHWISE input")
    found = set(zip(shown(tab, "layer"), shown(tab, "role")))
    expected = {(t["layer"], t["role"]) for t in report["tensors"]}
    assert found == {(n, r) for n, r in expected if "depthwise" in n and r == "input"} and found
    assert tab.locator("section.tensor:visible").count() == len(found)
    assert tab.get_by_role("status").inner_text() == f"{len(found)} tensors"
    tab.get_by_label("Search").fill("")

    link = tab.locator("#tensors tbody a").first
    target = link.get_attribute("href")
    link.press("Enter")
    assert tab.url.endswith(target) and tab.locator(f"{target} svg").first.is_visible()

    colours = []
    for scheme in ("light", "dark"):
        tab.emulate_media(color_scheme=scheme)
        colours.append(
            tab.evaluate(
                "[getComputedStyle(document.body).color, "
                "getComputedStyle(document.body).backgroundColor]"
            )  # fmt: skip
        )
    assert colours[0] != colours[1] and all(ink != paper for ink, paper in colours)
    tab.set_viewport_size({"width": 400, "height": 800})
    assert tab.evaluate("document.documentElement.scrollWidth") <= 400
    assert {text.partition("#")[0] for text in noted} == {address}
