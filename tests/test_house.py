"""The rules of the house: who imports whom, no circles, short files, links that work."""

import ast
import re
import subprocess
import sys

import pytest
from conftest import ROOT

SCRIPTS = {"train", "quantize", "plots", "hubconf"}
TOP = {"mobilevit", *SCRIPTS}
MAX_LINES = {".py": 350, "README.md": 250}
BELOW_METHODS = tuple(
    f"ptq.{name}" for name in ("formats", "recipe", "observers", "layers", "graph", "folding")
)
# A part of the project -> parts that it may import, besides libraries.
MAY_IMPORT = {
    "mobilevit": (),
    "ptq": ("ptq",),
    "ptq.formats": (),
    "ptq.recipe": ("ptq.formats",),
    "ptq.observers": ("ptq.formats",),
    "ptq.layers": ("ptq.formats", "ptq.observers", "ptq.recipe", "mobilevit"),
    "ptq.graph": ("ptq.layers",),
    "ptq.folding": ("ptq.graph", "ptq.layers"),
    "ptq.integer": (*BELOW_METHODS, "ptq.integer", "mobilevit"),
    "ptq.methods": (*BELOW_METHODS, "ptq.integer", "ptq.methods", "mobilevit"),
    "ptq.kinds": (*BELOW_METHODS, "ptq.methods", "mobilevit"),
    "ptq.attention": ("ptq.layers", "mobilevit"),
    "ptq.export": BELOW_METHODS,
    "ptq.pipeline": (*BELOW_METHODS, "ptq.kinds", "ptq.methods"),
    "ptq.packing": (*BELOW_METHODS, "ptq.pipeline"),
    "ptq.recipes": (*BELOW_METHODS, "ptq.kinds", "ptq.pipeline", "ptq.recipes", "mobilevit"),
    "ptq.analysis": ("ptq", "mobilevit"),
    "lab.cli": ("lab.machine",),
    "lab.machine": (),
    "lab.files": ("lab.cli",),
    "lab.schema": ("lab.cli",),
    "lab.models": ("lab.cli", "lab.files", "lab.schema", "lab.models", "lab.tasks", "mobilevit"),
    "lab.tasks": ("lab.cli", "lab.files", "lab.schema", "lab.tasks"),
    "lab.training": (
        *("lab.cli", "lab.files", "lab.schema", "lab.machine", "lab.models", "lab.tasks"),
        *("lab.engines.measure", "lab.training", "mobilevit"),
    ),
    "lab.engines": ("lab.cli", "lab.machine", "lab.engines", "ptq", "mobilevit"),
    "lab.subject": ("lab.cli", "lab.files", "lab.models", "lab.tasks", "ptq"),
    "lab.recipes": ("lab.cli", "lab.engines", "lab.files", "lab.subject", "lab.tasks", "ptq"),
    "lab.options": ("lab", "ptq", "mobilevit"),
    "lab.outputs": ("lab", "ptq"),
    "lab.pictures": ("lab",),
    "lab.profiles": ("lab", "ptq"),
    "lab.repeats": ("lab", "ptq"),
    "lab.report": ("lab.cli", "lab.files", "lab.schema", "lab.report"),
    "lab.bench": ("lab", "ptq", "mobilevit"),
    **{script: ("lab", "ptq", "mobilevit") for script in SCRIPTS},
}


def modules():
    """{name of a module: its path} of all but the tests."""
    paths = [*ROOT.glob("*.py"), *(ROOT / "lab").rglob("*.py"), *(ROOT / "ptq").rglob("*.py")]
    dotted = {".".join(p.relative_to(ROOT).with_suffix("").parts): p for p in paths}
    return {name.removesuffix(".__init__"): path for name, path in dotted.items()}


MODULES = modules()


def imports(name):
    """Modules of ours that a module imports anywhere in its text, and those at its top level."""
    tree = ast.parse(MODULES[name].read_text())
    found, at_top = set(), set()
    for node in ast.walk(tree):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            inner = [f"{node.module}.{alias.name}" for alias in node.names]
            names = [n if n in MODULES else node.module for n in inner]
        ours = {n for n in names if n in MODULES}
        found |= ours
        at_top |= ours if node in tree.body else set()
    return found, at_top


def within(name, parts):
    return any(name == part or name.startswith(f"{part}.") for part in parts)


@pytest.mark.parametrize("name", MODULES)
def test_a_module_imports_what_its_room_may(name):
    room = max((room for room in MAY_IMPORT if within(name, [room])), key=len, default=None)
    if name == "lab":
        return
    assert room, f"{name} is in no room"
    forbidden = [n for n in imports(name)[0] if not within(n, MAY_IMPORT[room])]
    assert not forbidden, f"{name} imports {forbidden}"
    assert not any(n in SCRIPTS for n in imports(name)[0])


def test_of_mobilevit_the_library_knows_one_name():
    for name, path in MODULES.items():
        if within(name, ["ptq"]):
            for node in ast.walk(ast.parse(path.read_text())):
                if isinstance(node, ast.ImportFrom) and node.module == "mobilevit":
                    assert [alias.name for alias in node.names] == ["AttentionCore"], name
                if isinstance(node, ast.Import):
                    assert "mobilevit" not in [alias.name for alias in node.names], name


def test_no_module_imports_itself_by_a_detour():
    graph = {name: imports(name)[1] for name in MODULES}
    done, open_ = set(), []

    def visit(name):
        assert name not in open_, " -> ".join([*open_[open_.index(name) :], name])
        if name not in done:
            open_.append(name)
            for other in graph[name]:
                visit(other)
            done.add(open_.pop())

    for name in graph:
        visit(name)


def test_the_top_holds_four_scripts_and_the_model():
    assert {path.stem for path in ROOT.glob("*.py")} == TOP


def test_no_room_is_over_full():
    for path in [*MODULES.values(), *(ROOT / "tests").glob("*.py"), ROOT / "README.md"]:
        most = MAX_LINES.get(path.name) or MAX_LINES[path.suffix]
        assert len(path.read_text().splitlines()) <= most, path


PAGES = [ROOT / "README.md", ROOT / "checkpoints" / "README.md", *(ROOT / "docs").glob("*.md")]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page):
    text = page.read_text()
    for target, anchor in re.findall(r"\]\((?!https?:)([^)#\s]*)(?:#([^)\s]*))?\)", text):
        path = (page.parent / target).resolve() if target else page
        assert path.exists(), f"{page.name} links to {target}"
        if anchor:
            headings = re.findall(r"^#+ (.*)$", path.read_text(), re.M)
            anchors = [re.sub(r"[^\w\- ]", "", h).lower().replace(" ", "-") for h in headings]
            assert anchor in anchors, f"{page.name} links to {target}#{anchor}"


def test_every_figure_is_shown_somewhere():
    text = "".join(page.read_text() for page in PAGES)
    for path in (ROOT / "results" / "figures").glob("*.png"):
        assert path.name in text, f"no page shows {path.name}"


@pytest.mark.parametrize("script", ["train.py", "quantize.py", "plots.py"])
def test_every_script_explains_itself(script):
    done = subprocess.run([sys.executable, script, "--help"], cwd=ROOT, capture_output=True)
    assert done.returncode == 0 and b"usage:" in done.stdout
