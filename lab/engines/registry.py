"""All engines by name: those that execute what this project quantized, and peers."""

from lab.engines import (
    onnx_runtime,
    onnx_runtime_static,
    openvino_bf16,
    openvino_cpu,
    openvino_nncf,
    torch_eager,
    torch_fx,
    torch_pt2e,
)

ENGINES = {
    engine.NAME: engine for engine in (torch_eager, onnx_runtime, openvino_cpu, openvino_bf16)
}
# These quantize by their own methods.
PEERS = {
    engine.NAME: engine for engine in (torch_fx, openvino_nncf, onnx_runtime_static, torch_pt2e)
}


def engines_for(recipe, names=tuple(ENGINES)) -> list:
    """The peer that a recipe names, or else those of ours with these names."""
    return [PEERS[recipe.peer]] if recipe.peer else [ENGINES[name] for name in names]
