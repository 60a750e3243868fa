"""OpenVINO on the CPU, from the QDQ ONNX file that ptq.export writes."""

import tempfile
import threading
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch

from lab.engines import Loaded, require

NAME = "openvino"
PRECISION = "f32"  # where a network is not quantized
# What computes as simulated. By default OpenVINO takes BF16 where the CPU has it, and rounds to 8
# bits what meets INT8 or INT4 weights in matrix products, 32 values to a scale.
AS_SIMULATED = {"INFERENCE_PRECISION_HINT": PRECISION, "DYNAMIC_QUANTIZATION_GROUP_SIZE": 0}
NO_LAYER = ""  # what is no layer's product
PRODUCTS = {"Convolution": "Conv", "FullyConnected": "MatMul", "MatMul": "MatMul"}


def version() -> str:
    return require("openvino", "onnx", "onnxscript")[0].__version__.split("-")[0]


def load(model, recipe, calibration, example) -> Loaded:
    """Return `model` exported and compiled; what is not quantized runs in FP32."""
    network, size_bytes = exported(model, example)
    return loaded(network, size_bytes)


def exported(model, example) -> tuple:
    """Return `model` as a network of OpenVINO for one image, and the bytes of its ONNX file.

    `example`: [b, 3, S, S], whose S is the network's.
    """
    openvino, *_ = require("openvino", "onnx", "onnxscript")
    from ptq.export import to_onnx

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "model.onnx")
        to_onnx(model, example, path)
        network = openvino.Core().read_model(path)
        size_bytes = path.stat().st_size
    network.reshape(list(example[:1].shape))
    return network, size_bytes


def loaded(network, size_bytes: int, precision: str = PRECISION) -> Loaded:
    """Compile a network for one thread a call, in `precision` where it is not quantized.

    Each calling thread gets a network of its own.
    """
    core = require("openvino")[0].Core()
    network = channels_last(network)
    lock, local = threading.Lock(), threading.local()

    def compiled():
        if not hasattr(local, "network"):
            with lock:
                local.network = core.compile_model(network, "CPU", one_thread(precision))
            local.request = local.network.create_infer_request()
        return local

    def run(x):
        request = compiled().request
        logits = [request.infer([image], share_inputs=True)[0] for image in _images(x)]
        return torch.from_numpy(np.concatenate(logits))

    return Loaded(run, size_bytes=size_bytes, products=executed_products(compiled().network))


def channels_last(network):
    """Return a copy of `network`, for images [1, 3, S, S], that takes [1, S, S, 3] instead.

    OpenVINO computes in that order, and images lie in memory in that order, so none is copied.
    """
    openvino, preprocess = require("openvino", "openvino.preprocess")
    steps = preprocess.PrePostProcessor(network.clone())
    steps.input().tensor().set_layout(openvino.Layout("NHWC"))
    steps.input().model().set_layout(openvino.Layout("NCHW"))
    return steps.build()


def _images(x) -> list:
    """Return images [b, 3, S, S] as b arrays [1, S, S, 3], not copied if `x` is channels-last."""
    return list(x.permute(0, 2, 3, 1).contiguous().numpy()[:, None])


def one_thread(precision: str) -> dict:
    """Return the settings to compile a network with for one thread a call.

    Dynamic quantization stays on, as it is by default: without it `w4` is about 7 % slower, and its
    logits change by 0.006.
    """
    return {
        "INFERENCE_NUM_THREADS": 1,
        "NUM_STREAMS": 1,
        "ENABLE_CPU_PINNING": False,  # to a core, the same for all that are compiled
        "INFERENCE_PRECISION_HINT": precision,
    }


def executed_products(compiled) -> dict[str, dict[str, int]]:
    """Count the convolutions and matrix products of a compiled model, in integers and in float.

    {"int8": {kind: number}, "float": {...}}. A product is in integers if its input is. A node's own
    precision does not tell: it is that of the narrowest thing that the node takes in, which may be
    weights that meet floats. Attention is one node with two products. The first is in integers if q
    and k are, the second if v is as well.
    """
    numbers = {"int8": Counter(), "float": Counter()}

    def count(kind, in_integers):
        numbers["int8" if in_integers else "float"][kind] += 1

    for node in compiled.get_runtime_model().get_ops():
        layer = _said(node, "layerType")
        if kind := PRODUCTS.get(layer):
            count(kind, _comes_in_integers(node.input_value(0)))
        elif layer == "Subgraph" and "softmax" in _said(node, "originalLayersNames").lower():
            n = sum(_comes_in_integers(value) for value in node.input_values())
            count("MatMul", n >= 2)
            count("MatMul", n >= 3)
    return {precision: dict(counts) for precision, counts in numbers.items()}


def _said(node, what: str) -> str:
    return str(node.get_rt_info()[what].astype(str))


def _comes_in_integers(value) -> bool:
    precisions = _said(value.get_node(), "outputPrecisions").split(",")
    one = precisions[min(value.get_index(), len(precisions) - 1)]  # a split has one for all parts
    return one in ("i8", "u8")


def operators_ms(networks: dict, example, n: int) -> dict[str, dict[str, float]]:
    """Return how many milliseconds a call of each network spends in each type of node.

    `networks`: {name: (network, precision)}. A type comes with its arithmetic, such as
    "Convolution INT8". Means of `n` calls, by OpenVINO's own counters.
    """
    compiled = {name: counted(*network) for name, network in networks.items()}
    spent = {name: Counter() for name in networks}
    for name, node, ms in nodes_ms(compiled, example, n):
        computed_in = node.exec_type.rpartition("_")[2].upper()
        arithmetic = {"I8": "INT8", "U8": "INT8", "F32": "FP32"}.get(computed_in, computed_in)
        spent[name][f"{node.node_type} {arithmetic}"] += ms / n
    return {name: {k: ms for k, ms in nodes.items() if ms} for name, nodes in spent.items()}


def layers_ms(files: dict, example, n: int) -> dict:
    """Return how many milliseconds a call of each network spends in the product of each layer.

    `files`: {key: ONNX file of ptq.export}. The result is {key: {name of a layer: ms}}, with
    NO_LAYER as the name of all else. Times are means of `n` calls.
    """
    from ptq.export import nodes_of_layers

    core = require("openvino")[0].Core()
    compiled, layers, spent = {}, {}, {key: Counter() for key in files}
    for key, path in files.items():
        network, layer_of = core.read_model(path), nodes_of_layers(path)
        network.reshape(list(example[:1].shape))
        compiled[key] = counted(network, PRECISION)
        layers[key] = {
            node.get_friendly_name(): layer_of[name]
            for node in compiled[key].get_runtime_model().get_ops()
            for name in _said(node, "originalLayersNames").split(",")
            if name in layer_of
        }
    for key, node, ms in nodes_ms(compiled, example, n):
        spent[key][layers[key].get(node.node_name, NO_LAYER)] += ms / n
    return spent


def counted(network, precision: str):
    """Return a network compiled as `loaded` does it, which also takes the time of its nodes."""
    settings = one_thread(precision) | {"PERF_COUNT": True}
    core = require("openvino")[0].Core()
    return core.compile_model(channels_last(network), "CPU", settings)


def nodes_ms(compiled: dict, example, n: int) -> Iterator[tuple]:
    """Yield key, node and milliseconds for each node of `n` calls of each network of `compiled`.

    The networks take turns, after a call of each that is not counted, since it is slower.
    """
    images = _images(example)
    requests = {key: network.create_infer_request() for key, network in compiled.items()}
    for call in range(n + 1):
        for key, request in requests.items():
            request.infer(images)
            for node in request.profiling_info if call else ():
                yield key, node, 1000 * node.real_time.total_seconds()
