"""Every Python snippet of README and docs runs as it stands; every command is understood."""

import re
import shlex
from functools import partial

import pytest
import torch
from conftest import ROOT
from test_house import PAGES
from torchvision.transforms.v2.functional import to_pil_image

import plots
import quantize
import train
from lab.bench import __main__ as bench
from lab.models import MODELS
from lab.tasks import TASKS
from lab.tasks.cifar10 import CLASSES
from ptq.methods import STEPS
from ptq.observers import OBSERVERS


def snippets(page):
    return re.findall(r"```python\n(.*?)```", (ROOT / page).read_text(), re.DOTALL)


def run_all(page, **names):
    """Run the snippets of a page one after the other; what they have defined at the end."""
    for text in snippets(page):
        exec(text, names)
    return names


def test_readme(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    photo, mine, *others = snippets("README.md")
    image = TASKS["synthetic"].load(None, train=False).images[0]
    to_pil_image(image).save(tmp_path / "photo.jpg")
    exec(photo.replace("photo.jpg", str(tmp_path / "photo.jpg")), {})
    assert capsys.readouterr().out.strip() in CLASSES
    names = {}
    exec(mine.replace("mine-w8a8.onnx", str(tmp_path / "mine-w8a8.onnx")), names)
    assert (tmp_path / "mine-w8a8.onnx").stat().st_size > 10_000 and not others
    moved = (names["quantized"](names["images"]) - names["model"](names["images"])).abs().max()
    assert 0 < moved < 0.05


def test_the_primers_example_is_what_it_prints(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    names = run_all("docs/quantization.md")
    out = capsys.readouterr().out
    assert "[0, 6, 9, 15]" in out and "'top1_agreement_pct'" in out
    x = names["batches"][0][0]
    expected = names["quantized"](x).logits
    torch.testing.assert_close(names["exported"].module()(x).logits, expected)
    torch.testing.assert_close(names["traced"](x)["logits"], expected)


@pytest.fixture
def registries():
    """The registries are afterwards what they were before."""
    before = dict(MODELS), dict(STEPS), dict(OBSERVERS)
    yield
    for registry, entries in zip((MODELS, STEPS, OBSERVERS), before):
        registry.clear()
        registry.update(entries)


def test_detection_and_its_quantized_copy():
    names = run_all("docs/tasks.md")
    assert names["found"].shape == (1, 200, 6)
    moved = (names["quantized"](names["images"]) - names["detector"](names["images"])).abs()
    assert 0 < moved[..., :-4].max() < 1 and not moved[..., -4:].any()


def test_extending(registries):
    names = run_all("docs/extending.md")
    images = names["batches"][0][0]
    moved = (names["quantized"](images) - names["model"](images)).abs().max()
    assert 0 < moved < 0.1


PARSERS = {
    "train.py": partial(train.parse_args, ""),
    "quantize.py": partial(quantize.parse_args, ""),
    "plots.py": plots.parse_args,
    "lab.bench": bench.parse_args,
}


def commands(page):
    """The commands of ours in a page, as words from the script's name on."""
    text = page.read_text().replace("\\\n", " ").replace("$side", "128")
    for block in re.findall(r"```(?:ba)?sh\n(.*?)```", text, re.DOTALL):
        for line in block.splitlines():
            words = shlex.split(line, comments=True)
            at = [i for i, word in enumerate(words) if word in PARSERS]
            if at:
                yield words[at[0] :]


PUBLISHED = [pytest.param(c, id=" ".join(c)) for page in PAGES for c in commands(page)]


@pytest.mark.parametrize("command", PUBLISHED)
def test_a_published_command_is_understood(command, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    for folder in ("results", "runs/results"):  # plots.py requires the one that it is to read
        (tmp_path / folder).mkdir(parents=True)
    monkeypatch.setattr("sys.argv", command)
    PARSERS[command[0]]()
