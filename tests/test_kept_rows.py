"""A row is kept, and a run goes on, only where everything it hangs on is what it was."""

import shutil
from types import SimpleNamespace

import pytest
import torch
from conftest import SYNTHETIC, fails_with_one_line, run
from test_imagefolder import folder_of

import ptq
from lab import files, subject
from lab.cli import BadInput
from lab.engines import openvino_nncf_control
from lab.models import build
from lab.models.checkpoint import read_tensors
from lab.report.row_figures import at_most
from lab.report.rows import read_row, reusable_row
from lab.subject import load_subject
from lab.tasks.augment import fractions
from lab.tasks.masks import Pictures
from lab.tasks.segmentation import scaled_crop
from lab.training.start import require_compiler


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """Mere weights of XXS for two classes, with four heads or one."""
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("weights") / "weights.pth"
    torch.save(build("mobilevit_xxs", num_classes=2).state_dict(), path)
    return path


def identity(weights, folder, heads=None):
    found = load_subject(weights, folder, weights_of="mobilevit_xxs", heads=heads)
    recipe = ptq.recipe("fp32", found.model)
    return found.identity(recipe, "torch-eager", 0, 10)


def test_other_images_or_heads_make_another_row(weights, tmp_path):
    folder_of(tmp_path / "a", {"cat": 6, "dog": 6})
    (tmp_path / "b").mkdir()
    for ours, theirs in (("cat", "dog"), ("dog", "cat")):
        shutil.copytree(tmp_path / "a" / ours, tmp_path / "b" / theirs)
    shutil.copytree(tmp_path / "a", tmp_path / "same")
    first = identity(weights, tmp_path / "a")
    assert identity(weights, tmp_path / "same") == first
    differing = {k for k, v in identity(weights, tmp_path / "b").items() if v != first[k]}
    assert differing == {"images_sha256"}
    differing = {k for k, v in identity(weights, tmp_path / "a", 4).items() if v != first[k]}
    assert differing == {"settings"} and first["settings"]["heads"] == [1, 1, 1]


def test_masks_and_boxes_are_part_of_a_rows_images(tmp_path):
    names = ("a", "b")
    for name in names:
        (tmp_path / name).write_bytes(b"the same length")

    class Masked(Pictures):
        def mask(self, i):
            return torch.full((4, 4), int(self.masks[i].name), dtype=torch.uint8)

    def digest(*masks):
        paths = tuple(tmp_path / name for name in names)
        pictures = Masked(paths, tuple(tmp_path / str(m) for m in masks), ("x", "y"), None)
        return subject.Subject.images_sha256.func(SimpleNamespace(images=pictures))

    assert digest(0, 1) == digest(0, 1) != digest(1, 0)


def test_rows_of_before_images_were_recorded_are_kept(tmp_path):
    shipped = "results/mobilevit_xxs/fp32@torch-eager.json"
    row = read_row(shipped)
    assert "images_sha256" not in row and "settings" not in row
    asked = {k: row[k] for k in ("model", "checkpoint_sha256", "recipe", "n_images")}
    asked |= {"settings": {"heads": [1, 1, 1]}, "images_sha256": "0"}
    path = tmp_path / "row.json"
    files.write_json(path, row)
    assert reusable_row(path, asked) == row
    files.write_json(path, row | {"images_sha256": "1", "settings": asked["settings"]})
    with pytest.raises(BadInput, match="another images_sha256: "):
        reusable_row(path, asked)


def test_weights_that_are_replaced_while_they_are_read_are_noticed(
    checkpoint, tmp_path, monkeypatch
):
    path = tmp_path / "best.pth"
    shutil.copy(checkpoint, path)
    real = subject.model_from_checkpoint

    def read_and_replaced(path):
        found = real(path)
        torch.save({}, path)
        return found

    monkeypatch.setattr(subject, "model_from_checkpoint", read_and_replaced)
    with pytest.raises(BadInput, match="changed while it was read"):
        load_subject(path, None)


def test_a_replaced_teacher_ends_a_resumed_run(checkpoint, tmp_path):
    teacher, output = tmp_path / "teacher.pth", tmp_path / "run"
    shutil.copy(checkpoint, teacher)
    command = ("train.py", *SYNTHETIC, "--teacher", teacher, "--output", output)
    run(*command, "--max-minutes", "0.0001", code=3)
    torch.save(torch.load(teacher, weights_only=True) | {"epoch": 7}, teacher)
    fails_with_one_line(*command, "--resume", says="is another file than")
    config = files.read_json(output / "config.json")
    for damaged in ([], config | {"sha256": None}, config | {"sha256": {"teacher": 1}}):
        files.write_json(output / "config.json", damaged)
        fails_with_one_line(*command, "--resume", says="config.json")
    files.write_json(output / "config.json", config)
    shutil.copy(checkpoint, teacher)
    run(*command, "--resume", "--max-minutes", "0.0001", code=3)


def test_a_run_that_was_killed_between_its_files_is_not_finished(checkpoint, tmp_path):
    for file in checkpoint.parent.iterdir():
        if file.is_file():
            shutil.copy(file, tmp_path)
    best = torch.load(tmp_path / "best.pth", weights_only=True) | {"test_accuracy_pct": None}
    state, log = read_tensors(tmp_path / "last.pth"), tmp_path / "log.csv"
    finish = ("train.py", "--finish", "--output", tmp_path)
    torch.save(best | {"epoch": best["epoch"] + 1}, tmp_path / "best.pth")
    fails_with_one_line(*finish, says="does not know yet: --resume the run")
    whole = log.read_text()
    for damage, says in (
        ({"val_accuracy_pct": None}, "val_accuracy_pct"),
        ({"val_accuracy_pct": 101.0}, "val_accuracy_pct"),
    ):
        torch.save(best | damage, tmp_path / "best.pth")
        fails_with_one_line(*finish, says=says)
    torch.save(best, tmp_path / "best.pth")
    for seconds in ("nan", "1e999", "-1"):
        history = [line | {"seconds": seconds} for line in state["history"]]
        torch.save(state | {"history": history}, tmp_path / "last.pth")
        fails_with_one_line(*finish, says="seconds is")
    history = [line | {"more": "1"} for line in state["history"]]
    torch.save(state | {"history": history}, tmp_path / "last.pth")
    log.write_text(whole.splitlines()[0])  # killed before the log was written
    run(*finish)
    assert log.read_text() == whole


def test_a_log_without_the_chosen_epoch_is_one_line(checkpoint, tmp_path):
    folder = tmp_path / "runs" / "one"
    folder.mkdir(parents=True)
    for name in ("metrics.json", "config.json", "log.csv"):
        shutil.copy(checkpoint.parent / name, folder)
    files.write_json(
        folder / "metrics.json", files.read_json(folder / "metrics.json") | {"epoch": 9}
    )
    (tmp_path / "results").mkdir()
    flags = ("--results", tmp_path / "results", "--checkpoints", tmp_path / "runs")
    fails_with_one_line("plots.py", *flags, says="log.csv lacks epoch 9")


@pytest.mark.parametrize(
    "change, says",
    [
        ({"confusion": None}, "confusion should be 10 lines"),
        ({"energy": {"horowitz": {"unit": "pJ"}}}, "energy"),
        ({"products": {"int8": {}, "float": {}, "asked": 3}}, "asked"),
    ],
)
def test_fields_that_readers_need_are_checked(change, says, tmp_path):
    row = files.read_json("results/mobilevit_xxs/fp32@torch-eager.json")
    files.write_json(tmp_path / "row.json", row | change)
    with pytest.raises(BadInput, match=says):
        read_row(tmp_path / "row.json")


def test_draws_next_to_the_end_stay_below_one():
    draws = torch.tensor([0, 1, 2**30, 2**31 - 65, 2**31 - 1])
    found = fractions(draws)
    assert found.max() < 1 and found[2] == 0.5 and found[0] == 0
    last = fractions(torch.full((4,), 2**31 - 1)).tolist()
    image, mask = torch.zeros(3, 40, 50, dtype=torch.uint8), torch.zeros(40, 50, dtype=torch.uint8)
    cut = scaled_crop(image, mask, last, 32)
    assert cut[0].shape == (3, 32, 32) and cut[1].shape == (32, 32)


def test_nncf_with_control_is_for_classifiers(network):
    boxes = [(torch.zeros(2, 3, 32, 32), torch.zeros(2, 1, 6))]
    with pytest.raises(BadInput, match="judges classes"):
        openvino_nncf_control.load(network, None, boxes, boxes[0][0][:1])


def test_a_machine_without_a_compiler_is_told_before_a_run_begins(monkeypatch):
    def compiled(function):
        def call(*_):
            raise RuntimeError("No working C++ compiler\nand more")

        return call

    monkeypatch.setattr(torch, "compile", compiled)
    with pytest.raises(BadInput, match="can't compile here: No working C\\+\\+ compiler$"):
        require_compiler(torch.device("cpu"))


def test_figures_say_that_nothing_is_lost():
    assert at_most(0.057) == "at most 0.06 points"
    assert at_most(0.0) == at_most(-0.1) == "no accuracy"


def test_options_of_plots_that_would_do_nothing_are_refused(tmp_path):
    fails_with_one_line("plots.py", "--check", "--figures", tmp_path, says="--check draws no")
    fails_with_one_line("plots.py", "--pages", tmp_path, says="--pages is for")
