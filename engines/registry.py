"""All engines by name: those that execute what this project quantized, and peers."""

from engines import (
    nncf_openvino,
    onnx_runtime,
    openvino_cpu,
    ort_static,
    torch_eager,
    torch_fx,
    torch_pt2e,
)

ENGINES = {engine.NAME: engine for engine in (torch_eager, onnx_runtime, openvino_cpu)}
# These quantize by their own methods.
PEERS = {engine.NAME: engine for engine in (torch_fx, nncf_openvino, ort_static, torch_pt2e)}
