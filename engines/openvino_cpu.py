"""OpenVINO on the CPU, from the QDQ ONNX file that ptq.export writes."""

import tempfile
import threading
from collections import Counter
from pathlib import Path

import torch

from engines import Loaded, require

NAME = "openvino"
PRODUCTS = {"Convolution": "Conv", "FullyConnected": "MatMul", "MatMul": "MatMul"}


def version() -> str:
    return require("openvino", "onnx", "onnxscript")[0].__version__.split("-")[0]


def load(model, recipe, calibration, example) -> Loaded:
    """`model` exported, compiled and run in FP32 where it is not quantized."""
    network, size_bytes = exported(model, example)
    return loaded(network, size_bytes)


def exported(model, example) -> tuple:
    """`model` as a network of OpenVINO for one image, and the bytes of its ONNX file."""
    openvino, *_ = require("openvino", "onnx", "onnxscript")
    from ptq.export import to_onnx

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "model.onnx")
        to_onnx(model, example, path)
        network = openvino.Core().read_model(path)
        size_bytes = path.stat().st_size
    network.reshape(list(example[:1].shape))
    return network, size_bytes


def loaded(network, size_bytes: int, precision: str = "f32") -> Loaded:
    """A network compiled for one thread a call, in `precision` where it is not quantized. Each
    calling thread gets one of its own: with several streams in one, OpenVINO 2026.4 computes
    networks with INT4 weights wrongly."""
    core = require("openvino")[0].Core()
    settings = {
        "INFERENCE_NUM_THREADS": 1,
        "NUM_STREAMS": 1,
        "INFERENCE_PRECISION_HINT": precision,
    }
    lock, local = threading.Lock(), threading.local()

    def compiled():
        if not hasattr(local, "network"):
            with lock:
                local.network = core.compile_model(network, "CPU", settings)
            local.request = local.network.create_infer_request()
        return local

    def run(x):
        request = compiled().request
        logits = [request.infer([image[None].contiguous().numpy()])[0] for image in x]
        return torch.cat([torch.from_numpy(row.copy()) for row in logits])

    return Loaded(run, size_bytes=size_bytes, products=executed_products(compiled().network))


def executed_products(compiled) -> dict[str, dict[str, int]]:
    """Convolutions and matrix products of a compiled model: {"int8": {...}, "float": {...}}. Those
    are in integers whose input is; a node's own precision is that of the narrowest thing that it
    takes in, be it weights that meet floats. Float attention is not among them: its products are
    fused into subgraphs."""

    def said(node, what) -> str:
        return str(node.get_rt_info()[what].astype(str))

    counted = {"int8": Counter(), "float": Counter()}
    for node in compiled.get_runtime_model().get_ops():
        if kind := PRODUCTS.get(said(node, "layerType")):
            source = node.input_value(0)
            precision = said(source.get_node(), "outputPrecisions").split(",")[source.get_index()]
            counted["int8" if precision in ("i8", "u8") else "float"][kind] += 1
    return {precision: dict(counts) for precision, counts in counted.items()}
