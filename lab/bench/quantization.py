"""Speed of what quantize.py makes, on every engine."""

import functools

import torch

import ptq
from lab.cli import BadInput
from lab.engines import EngineMissing, openvino_bf16, openvino_cpu, openvino_nncf, torch_eager
from lab.engines.measure import latency
from lab.engines.registry import engines_for
from lab.models.checkpoint import model_from_checkpoint
from lab.tasks import cifar10
from ptq import RECIPES

PROFILED = (
    ("fp32", openvino_cpu),
    ("int8-nncf", openvino_cpu),
    ("w8a8", openvino_cpu),
    ("w8a8", openvino_bf16),
)


def engines(args) -> dict:
    """Milliseconds an image of every method on every engine, all called in turn on one thread.

    Values do not matter for speed: calibration is on noise, and all weights round to nearest.
    """
    model, checkpoint, batches, example = on_noise(args)
    runs, versions = {}, {}
    peers = [recipe.name for recipe in RECIPES.values() if recipe.peer]
    for name in ("fp32", "w7a8-convs", "w7a8", "w8a8", "w4", *peers):
        recipe = RECIPES[name].to_nearest()
        network = ptq.quantize(model, recipe, batches)
        for engine in engines_for(recipe):
            if recipe.simulated and engine is torch_eager:
                continue
            try:
                versions[engine.NAME] = engine.version()
                run = engine.load(network, recipe, batches, example).run
                runs[f"{name}@{engine.NAME}"] = functools.partial(run, example)
            except EngineMissing as missing:
                print(f"{name}@{engine.NAME}: left out, {missing}")
            except Exception as error:  # such as no compiler for PT2E; the others go on
                reason = str(error).split("\n")[0]
                print(f"{name}@{engine.NAME}: failed, {type(error).__name__}: {reason}")
    return {
        "model": checkpoint["model"],
        "img_size": checkpoint["img_size"],
        "engine_versions": versions,
        "latency_ms": latency(runs, args.latency_runs),
    }


def profile(args) -> dict:
    """Where OpenVINO spends a call, type by type of its nodes, for some methods in turn."""
    model, checkpoint, batches, example = on_noise(args)
    networks = {}
    for name, engine in PROFILED:
        recipe = RECIPES[name].to_nearest()
        what = f"{name}@{engine.NAME}"
        try:
            engine.version()
            network = ptq.quantize(model, recipe, batches)
            if recipe.peer:
                network = openvino_nncf.quantized(network, batches, example)
            else:
                network, _ = openvino_cpu.exported(network, example)
        except EngineMissing as missing:
            print(f"{what}: left out, {missing}")
            continue
        networks[what] = network, engine.PRECISION
    if not networks:
        raise BadInput("nothing can be profiled here")
    return {
        "model": checkpoint["model"],
        "img_size": checkpoint["img_size"],
        "engine_version": openvino_cpu.version(),
        "calls": args.latency_runs,
        "ms": openvino_cpu.operators_ms(networks, example, args.latency_runs),
    }


def on_noise(args) -> tuple:
    """A checkpoint's network and fields, eight images of noise to calibrate on, and one of them."""
    model, checkpoint = model_from_checkpoint(args.checkpoint)
    noise = torch.randint(256, (8, 3, cifar10.SIDE, cifar10.SIDE), dtype=torch.uint8)
    x = cifar10.to_input(noise, checkpoint["img_size"])
    return model, checkpoint, [(x, torch.zeros(8))], x[:1]
