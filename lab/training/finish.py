"""The end of a training run: the weights chosen are judged on the test set, once."""

from pathlib import Path

from lab import files
from lab.cli import BadInput
from lab.models import run_name
from lab.models.checkpoint import load_checkpoint, network, plain, read_tensors, save_checkpoint
from lab.schema import mapping, percent, record, sequence, text
from lab.training.evaluation import score_on_test_set, trained_task
from lab.training.run import log_line, write_log


def finish(output: Path, data_dir, device) -> None:
    """Read the test set, once, with the weights chosen so far in the run that `output` holds."""
    paths = [output / name for name in ("best.pth", "last.pth", "config.json", "metrics.json")]
    best_path, last_path, about_path, metrics_path = paths
    if last_path.exists() and not best_path.exists():
        raise BadInput(f"{output} has no weights chosen yet: --resume the run")
    best = load_checkpoint(best_path)
    objective = trained_task(best, best_path).objective
    val, test = (f"{split}_{objective.METRIC}" for split in ("val", "test"))
    record({val: percent})(best, str(best_path))
    if best[test] is None:
        state = trained(last_path, objective)
        if best["epoch"] not in [line["epoch"] for line in state["history"]]:
            # A kill between the two: best.pth is written first.
            raise BadInput(
                f"{best_path} is of epoch {best['epoch']}, which {last_path} does not know yet: "
                "--resume the run"
            )
        write_log(output, state["history"], objective)  # a kill may have left an older one
        about = files.read_json(about_path)
        record({"hardware": text})(about, str(about_path))
        score, in_words = score_on_test_set(best_path, data_dir, device)
        printed = (
            f"{run_name(best['model'], best['task'])}: epoch {best['epoch']} chosen, "
            f"validation {best[val]:.2f} %, test {in_words}"
        )
        metrics = {
            "model": best["model"],
            "task": best["task"],
            "parameters": sum(p.numel() for p in network(best, best_path).parameters()),
            "epoch": best["epoch"],
            **so_far(state),
            val: best[val],
            test: score[objective.METRIC],
            **{k: v for k, v in score.items() if k not in ("loss", objective.METRIC)},
            "printed": printed,
            "config": state["config"],
        }
        how = {k: v for k, v in about.items() if k not in state["config"]}  # commit, hardware, ...
        files.write_json(metrics_path, metrics | how)
        save_checkpoint(best_path, best | {test: score[objective.METRIC]})
    metrics = files.read_json(metrics_path)
    record({"printed": text})(metrics, str(metrics_path))
    if best[test] is not None and last_path.exists():  # it may have trained on since it was judged
        files.write_json(metrics_path, metrics | so_far(trained(last_path, objective)))
    print(metrics["printed"])


def trained(last_path: Path, objective) -> dict:
    """Return what last.pth says of a run; BadInput if it has validated no epoch yet."""
    state = read_tensors(last_path)
    line = record(log_line(objective))
    record({"history": sequence(line), "config": mapping(plain)})(state, str(last_path))
    if not state["history"]:
        raise BadInput(f"{last_path} has no validated epoch yet: --resume the run")
    return state


def so_far(state: dict) -> dict:
    """Return what metrics.json says of how long a run in this `state` has trained."""
    return {
        "epochs_trained": state["history"][-1]["epoch"],
        "train_s": sum(float(row["seconds"]) for row in state["history"]),
    }
