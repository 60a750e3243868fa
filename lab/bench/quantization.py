"""Speed of quantized networks on every engine. Their accuracy plays no part here."""

import copy
import functools
import sys
import traceback

import torch

import ptq
from lab.cli import BadInput
from lab.engines import (
    EngineMissing,
    openvino_bf16,
    openvino_cpu,
    openvino_nncf,
    openvino_nncf_control,
    published,
    tensorrt_gpu,
)
from lab.engines.measure import latency
from lab.engines.registry import engines_for, row_kind
from lab.models.checkpoint import model_from_checkpoint
from lab.recipes import to_nearest
from lab.tasks import cifar10
from ptq import RECIPES

NOT_TIMED = (published.NAME, openvino_nncf_control.NAME)  # peers that make nothing else to run
TIMED = (
    *("fp32", "w7a8-convs", "w7a8", "w8a8", "w4"),
    *(name for name, r in RECIPES.items() if r.peer and r.peer not in NOT_TIMED),
)
PROFILED = {
    "fp32": (openvino_cpu,),
    "int8-nncf": (openvino_cpu,),
    "w8a8": (openvino_cpu, openvino_bf16),
}


def engines(checkpoint, names, n_calls: int) -> dict:
    """Time an image of every method on every engine, in ms, all called in turn on one thread.

    `checkpoint`: path of the network. `names`: recipes. `n_calls`: timed calls of each. "faults" in
    the result has a line for each method that failed on an engine.
    BadInput if nothing can be timed.
    """
    model, described, batches, example = on_noise(checkpoint)
    runs, versions, recipes, faults = {}, {}, {}, []
    for recipe in recipes_for(model, names):
        network = ptq.quantize(model, to_nearest(recipe), batches)
        for engine in engines_for(recipe):
            if row_kind(recipe, engine) != "measured":
                continue
            what = f"{recipe.name}@{engine.NAME}"
            try:
                versions[engine.NAME] = engine.version()
                run = engine.load(network, recipe, batches, example).run
            except EngineMissing as missing:
                print(f"{what}: left out, {missing}")
                continue
            except Exception as error:  # such as no compiler for PT2E; the others go on
                traceback.print_exc()
                reason = str(error).split("\n")[0]
                faults.append(f"{what}: failed, {type(error).__name__}: {reason}")
                print(faults[-1], file=sys.stderr)
                continue
            runs[what] = functools.partial(run, example)
            recipes[recipe.name] = recipe.asdict()
    if not runs:
        raise BadInput("nothing can be timed here")
    return described | {
        "recipes": recipes,
        "engine_versions": versions,
        "latency_ms": latency(runs, n_calls),
        "faults": faults,
    }


def profile(checkpoint, n_calls: int) -> dict:
    """Measure where OpenVINO spends a call, type by type of its nodes, for some methods in turn.

    `checkpoint`: path of the network. `n_calls`: calls over which times, in ms, are averaged.
    BadInput if nothing can be profiled.
    """
    model, described, batches, example = on_noise(checkpoint)
    networks, recipes = {}, {}
    for recipe in recipes_for(model, PROFILED):
        network = ptq.quantize(model, to_nearest(recipe), batches)
        try:
            if recipe.peer:
                how = (openvino_nncf.recommended, network, batches, example)
                written = openvino_nncf.quantized(*how)
            else:
                written, _ = openvino_cpu.exported(network, example)
        except EngineMissing as missing:
            print(f"{recipe.name}: left out, {missing}")
            continue
        for engine in PROFILED[recipe.name]:
            what = f"{recipe.name}@{engine.NAME}"
            try:
                engine.version()
            except EngineMissing as missing:
                print(f"{what}: left out, {missing}")
                continue
            networks[what] = written, engine.PRECISION
            recipes[recipe.name] = recipe.asdict()
    if not networks:
        raise BadInput("nothing can be profiled here")
    return described | {
        "recipes": recipes,
        "engine_version": openvino_cpu.version(),
        "calls": n_calls,
        "ms": openvino_cpu.operators_ms(networks, example, n_calls),
    }


def tensorrt(checkpoint, n_calls: int) -> dict:
    """Time an image of FP32 and of 8 bits on TensorRT, in ms, and of FP32 in torch on the same GPU.

    All are called in turn. Images come from the CPU and logits go back to it.
    `checkpoint`: path of the network. `n_calls`: timed calls of each. BadInput without TensorRT.
    """
    try:
        engine_version = tensorrt_gpu.version()
    except EngineMissing as missing:
        raise BadInput(str(missing)) from missing
    model, described, batches, example = on_noise(checkpoint)
    on_gpu = copy.deepcopy(model).cuda()
    runs, recipes = {"fp32@torch-cuda": lambda: on_gpu(example.cuda()).cpu()}, {}
    for recipe in recipes_for(model, ("fp32", "w8a8-tensorrt")):
        network = ptq.quantize(model, to_nearest(recipe), batches)
        run = tensorrt_gpu.load(network, recipe, batches, example).run
        runs[f"{recipe.name}@{tensorrt_gpu.NAME}"] = functools.partial(run, example)
        recipes[recipe.name] = recipe.asdict()
    return described | {
        "recipes": recipes,
        "engine_version": engine_version,
        "latency_ms": latency(runs, n_calls),
    }


def recipes_for(model, names):
    """Yield the recipes of these names for `model`; print a line for each that does not suit it."""
    for name in names:
        try:
            yield ptq.recipe(name, model)
        except ValueError as error:
            print(f"{name}: left out, {error}")


def on_noise(path) -> tuple:
    """Return a checkpoint's network, its name and image size, and what to calibrate and run it on.

    That is one batch of eight images [8, 3, S, S] of noise, and the first of them [1, 3, S, S].
    """
    model, checkpoint = model_from_checkpoint(path)
    described = {"model": checkpoint["model"], "img_size": checkpoint["img_size"]}
    noise = torch.randint(256, (8, 3, cifar10.SIDE, cifar10.SIDE), dtype=torch.uint8)
    x = cifar10.to_input(noise, checkpoint["img_size"])
    return model, described, [(x, torch.zeros(8))], x[:1]
