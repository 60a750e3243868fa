"""All engines by name: those that run what this project quantized, and peers. A line for each.

An engine is a module with `NAME`, `version()` and `load(model, recipe, calibration, example) ->
Loaded`. `model` comes from `ptq.quantize`, `calibration` is a sequence of (input, labels) or None,
`example` an input [1, 3, S, S]. EngineMissing says why one can't run here.
"""

from lab.engines import (
    onnx_runtime,
    onnx_runtime_static,
    openvino_bf16,
    openvino_cpu,
    openvino_nncf,
    published,
    tensorrt_gpu,
    torch_eager,
    torch_fx,
    torch_pt2e,
)

OURS = (torch_eager, onnx_runtime, openvino_cpu, openvino_bf16)
ON_GPU = (tensorrt_gpu,)
PEERS = (published, torch_fx, openvino_nncf, onnx_runtime_static, torch_pt2e)  # quantize themselves
ENGINES = {engine.NAME: engine for engine in OURS + ON_GPU + PEERS}


def engines_for(recipe, names=tuple(engine.NAME for engine in OURS)) -> list:
    """The peer that a recipe names, or else the engines with these names."""
    return [ENGINES[recipe.peer]] if recipe.peer else [ENGINES[name] for name in names]


def row_kind(recipe, engine) -> str:
    """Say "simulated" where floats stand in for numbers of few bits, otherwise "measured"."""
    simulates = engine is published or (engine is torch_eager and recipe.layers)
    return "simulated" if simulates else "measured"
