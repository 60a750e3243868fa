"""All engines by name: those that run what this project quantized, and peers. A line for each."""

from lab.engines import (
    integer,
    onnx_runtime,
    onnx_runtime_static,
    openvino_bf16,
    openvino_cpu,
    openvino_nncf,
    openvino_nncf_control,
    published,
    tensorrt_gpu,
    torch_eager,
    torch_float64,
    torch_fx,
    torch_pt2e,
)

IN_TORCH = (torch_eager, torch_float64, integer)
OURS = (*IN_TORCH, onnx_runtime, openvino_cpu, openvino_bf16)
ON_GPU = (tensorrt_gpu,)
PEERS = (  # quantize by themselves
    *(published, torch_fx, openvino_nncf, openvino_nncf_control),
    *(onnx_runtime_static, torch_pt2e),
)
ENGINES = {engine.NAME: engine for engine in OURS + ON_GPU + PEERS}


def engines_for(recipe, names=tuple(engine.NAME for engine in OURS)) -> list:
    """Return the peer that a recipe names, alone, or else the engines with these names."""
    return [ENGINES[recipe.peer]] if recipe.peer else [ENGINES[name] for name in names]


def row_kind(recipe, engine) -> str:
    """Return the kind of an engine's rows: "simulated", "integer" or "measured".

    In simulated rows floats stand in for numbers of few bits. In integer rows integers alone
    compute, but not fast.
    """
    if engine is integer:
        return "integer"
    only_simulates = engine in (published, torch_float64)
    simulates = only_simulates or (engine is torch_eager and recipe.layers)
    return "simulated" if simulates else "measured"
