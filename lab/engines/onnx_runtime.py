"""ONNX Runtime on the CPU, from the QDQ ONNX file that ptq.export writes."""

import tempfile
from collections import Counter
from pathlib import Path

import torch

from lab.engines import Loaded, require

NAME = "onnxruntime"
# Operators of an optimised graph that multiply, by what they multiply in and by their kind.
PRODUCTS = {
    "int8": {
        "Conv": ("QLinearConv", "ConvInteger"),
        "MatMul": ("QGemm", "QLinearMatMul", "MatMulIntegerToFloat", "MatMulInteger"),
    },
    "float": {
        "Conv": ("Conv", "FusedConv"),
        "MatMul": ("MatMul", "FusedMatMul", "Gemm", "FusedGemm", "MatMulNBits", "Einsum"),
    },
}


def version() -> str:
    return require("onnxruntime", "onnx", "onnxscript")[0].__version__


def load(model, recipe, calibration, example) -> Loaded:
    """Return `model` exported and loaded; what is not quantized runs in FP32."""
    require("onnxruntime", "onnx", "onnxscript")
    from ptq.export import to_onnx

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "model.onnx")
        to_onnx(model, example, path)
        return loaded(path)


def loaded(path: Path) -> Loaded:
    """Return the network of an ONNX file, which runs on one thread a call.

    Leaves the optimised file beside `path`. ValueError for a file that is damaged.
    """
    ort, *_ = require("onnxruntime", "onnx")
    optimised = path.with_suffix(".optimised.onnx")
    options = ort.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    options.log_severity_level = 3
    # Products with 4-bit weights in FP32, where the default may round activations to 8 bits.
    options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", "1")
    options.optimized_model_filepath = str(optimised)
    try:
        session = ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # its classes have no base of their own
        raise ValueError(f"{path} is no ONNX file that runs: {error}") from error

    def run(x):
        (logits,) = session.run(None, {"images": x.contiguous().numpy()})
        return torch.from_numpy(logits)

    size_bytes = path.stat().st_size
    return Loaded(run, size_bytes=size_bytes, products=executed_products(optimised))


def executed_products(path) -> dict[str, dict[str, int]]:
    """Count the products of an optimised graph: {"int8": {kind: number}, "float": {...}}."""
    import onnx

    found = Counter(node.op_type for node in onnx.load(path).graph.node)
    return {
        precision: {kind: sum(found[name] for name in names) for kind, names in kinds.items()}
        for precision, kinds in PRODUCTS.items()
    }
