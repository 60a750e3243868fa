"""Quantized networks as QDQ ONNX: integer weights in the file, every scale as calibrated here.

    x -> QuantizeLinear -> DequantizeLinear -> Conv or MatMul <- DequantizeLinear <- integer codes

Engines recognise the pattern and compute the product in integers. Weights of pointwise convolutions
whose product stays in float are stored as matrices, with an Unsqueeze before the Conv. Codes of at
most four bits are stored as ONNX INT4, two to a byte. Batch norms are folded, which changes scales
and biases only. One scale for a weight is written as the same for every output channel.

A file in which all codes are such as TensorRT takes (`tensorrt_fault`) is written for it:
`trtexec --onnx=FILE --int8`, and from TensorRT 11 on without the flag.
"""

import logging
import warnings

import ml_dtypes
import onnx
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ptq.folding import fold_norms, spread_scales
from ptq.formats import Uniform
from ptq.layers import QuantizedAttentionCore, QuantizedLayer, Quantizer, check_inputs, copied
from ptq.recipe import exportable_input, exportable_weight

OPSET = 21  # the first with INT4
# For people: neither engine reads its settings from an ONNX file.
RUN_AS_SIMULATED = (
    "OpenVINO: INFERENCE_PRECISION_HINT=f32, DYNAMIC_QUANTIZATION_GROUP_SIZE=0. "
    "ONNX Runtime: session.qdq_matmulnbits_accuracy_level=1."
)


def to_onnx(model: nn.Module, example: Tensor, path, about: dict[str, str] | None = None) -> None:
    """Write `model`, as `ptq.quantize` gave it or in float, for inputs [b, ...] like `example`.

    `about`: texts for the file's metadata.

    Raises ValueError for what is not written: activations in more than 8 bits, or in fewer with a
    scale per channel, weights of more than 8 bits or with scales per group, quantized inputs of
    norms and SiLU, anything else before a quantized layer.
    """
    check_inputs(model)
    model = copied(model).eval()
    spread_scales(model)
    fold_norms(model, [(example,)])
    for_tensorrt = not tensorrt_fault(model)
    int4, written = [], {}  # {layer: what is written for it}, also where it stands twice
    for name, module in list(model.named_modules(remove_duplicate=False)):
        if isinstance(module, QuantizedLayer):
            model.set_submodule(name, written.setdefault(module, _Layer(module)))
            if module.format is not None and module.format.bits <= 4:
                int4.append(f"{name}.codes")
        elif isinstance(module, QuantizedAttentionCore):
            model.set_submodule(name, _Core(module, for_tensorrt))
    if any(isinstance(module, Quantizer) for module in model.modules()):
        raise ValueError("ONNX export of quantized inputs of norms and SiLU is not written")
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        log = logging.getLogger("torch.onnx")
        level = log.level
        log.setLevel(logging.ERROR)
        try:
            program = torch.onnx.export(
                model,
                (example[:1].expand(2, *example.shape[1:]),),  # one of 1 would be exported as fixed
                dynamo=True,
                opset_version=OPSET,
                input_names=["images"],
                output_names=["logits"],
                dynamic_shapes=({0: torch.export.Dim("batch")},),
                verbose=False,
            )
        finally:
            log.setLevel(level)
    proto = program.model_proto
    _store_int4(proto, int4)
    _strip(proto.graph)
    onnx.helper.set_model_props(proto, {"run_as_simulated": RUN_AS_SIMULATED} | (about or {}))
    onnx.save(proto, path)


def nodes_of_layers(path) -> dict[str, str]:
    """Return {name of a product or of its output: name of the layer whose codes it takes in}.

    Products are the convolutions and matrix products of a file that `to_onnx` wrote.
    """
    graph = onnx.load(path).graph
    made_by = {name: node for node in graph.node for name in node.output}
    found = {}
    for node in graph.node:
        if node.op_type in ("Conv", "MatMul"):
            weight = node.input[1]
            while weight in made_by:  # behind DequantizeLinear and Unsqueeze
                weight = made_by[weight].input[0]
            if weight.endswith(".codes"):
                found |= dict.fromkeys((node.name, *node.output), weight.removesuffix(".codes"))
    return found


def tensorrt_fault(model: nn.Module) -> str:
    """Say why TensorRT does not compute a quantized network in integers; "" if it does.

    It takes 8-bit codes with a sign and without zero-points, one scale for an input, and codes for
    weights only where the input has codes, too. Source: NVIDIA's TensorRT 11 documentation,
    "Explicit Quantization", and the parser of ONNX files, onnx/onnx-tensorrt on GitHub.
    """
    for name, module in model.named_modules():
        if isinstance(module, Quantizer) and module.format != Uniform(8):
            return f"{name} has a zero-point, a scale per channel or not 8 bits"
        if isinstance(module, QuantizedLayer) and module.format is not None:
            if module.format.bits != 8:
                return f"the weight of {name} has {module.format.bits} bits"
            if not isinstance(module.input, Quantizer):
                return f"{name} has codes for its weight and none for its input"
    return ""


class _QDQ(nn.Module):
    """A quantizer as a pair of ONNX operators.

    Engines compute with 8-bit codes. What a format of fewer bits can't reach is clipped before.
    """

    def __init__(self, quantizer: Quantizer):
        super().__init__()
        fmt = quantizer.format
        per_tensor = fmt.granularity == "tensor"
        if not exportable_input(fmt):
            raise ValueError(f"ONNX export of activations in {fmt} is not written")
        self.dtype = torch.int8 if fmt.symmetric else torch.uint8
        self.axis = 0 if per_tensor else fmt.axis
        grid = quantizer.scale, quantizer.zero_point.to(self.dtype)
        scale, zero_point = (t[0] for t in grid) if per_tensor else grid
        self.register_buffer("scale", scale)
        self.register_buffer("zero_point", zero_point)
        self.limits = None
        if fmt.bits < 8:
            zero = quantizer.zero_point.item()
            self.limits = [(code - zero) * scale.item() for code in (fmt.qmin, fmt.qmax)]

    def forward(self, x: Tensor) -> Tensor:
        if self.limits:
            x = x.clamp(*self.limits)
        grid, attrs = (self.scale, self.zero_point), {"axis": self.axis}
        codes = torch.onnx.ops.symbolic(
            "QuantizeLinear", (x, *grid), attrs, dtype=self.dtype, shape=x.shape, version=OPSET
        )
        return _dequantized(codes, grid, attrs, x.shape)


def _dequantized(codes: Tensor, grid, attrs, shape) -> Tensor:
    return torch.onnx.ops.symbolic(
        "DequantizeLinear", (codes, *grid), attrs, dtype=torch.float32, shape=shape, version=OPSET
    )


class _Core(nn.Module):
    """A quantized attention core as ONNX operators.

    q k^T is an Einsum, which names the axis to sum over. MatMul wants keys transposed: OpenVINO is
    slow at that before they are quantized, and ONNX Runtime 1.32 fails if it comes after. TensorRT
    computes an Einsum in float.
    """

    def __init__(self, core: QuantizedAttentionCore, for_tensorrt: bool):
        super().__init__()
        self.inputs = nn.ModuleDict({name: _QDQ(q) for name, q in core.inputs.items()})
        self.for_tensorrt = for_tensorrt

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q = self.inputs["q"](q)
        if self.for_tensorrt:
            scores = q @ self.inputs["k"](k.mT)
        else:
            scores = torch.onnx.ops.symbolic(
                "Einsum",
                (q, self.inputs["k"](k)),
                {"equation": "bhnd,bhmd->bhnm"},
                dtype=q.dtype,
                shape=(*q.shape[:-1], k.shape[-2]),
                version=OPSET,
            )
        attention = (scores * q.shape[-1] ** -0.5).softmax(-1)
        return self.inputs["attention"](attention) @ self.inputs["v"](v)


class _Layer(QuantizedLayer):
    """A quantized layer as ONNX operators; matrices transposed, as MatMul multiplies them."""

    def __init__(self, quantized: QuantizedLayer):
        nn.Module.__init__(self)
        self.layer, self.format = quantized.layer, quantized.format
        quantizes = isinstance(quantized.input, Quantizer)
        self.input = _QDQ(quantized.input) if quantizes else nn.Identity()
        self.linear = isinstance(self.layer, nn.Linear)
        if self.format is not None:
            if not exportable_weight(self.format):
                raise ValueError(f"ONNX export of weights in {self.format} is not written")
            codes = quantized.codes.to(torch.int8)
            # OpenVINO 2026.4 keeps the codes [O, I, 1, 1] of a pointwise convolution that it does
            # not compute in integers, and each stream turns them into floats: with two or more the
            # results may be garbage. Behind an Unsqueeze they become floats once, when it loads.
            self.as_matrix = codes.shape[2:] == (1, 1) and not _in_integers(quantized)
            if self.as_matrix:
                codes = codes[:, :, 0, 0]  # [O, I]
            self.register_buffer("codes", codes.T.contiguous() if self.linear else codes)
            self.register_buffer("scale", quantized.scale)

    def forward(self, input: Tensor) -> Tensor:
        x, layer = self.input(input), self.layer
        if self.format is None:
            return layer(x)
        attrs = {"axis": 1 if self.linear else 0}
        weight = _dequantized(self.codes, (self.scale,), attrs, self.codes.shape)
        if self.linear:
            return x @ weight + layer.bias if layer.bias is not None else x @ weight
        if self.as_matrix:
            weight = weight[:, :, None, None]  # [O, I, 1, 1]
        return F.conv2d(
            x, weight, layer.bias, layer.stride, layer.padding, layer.dilation, layer.groups
        )


def _in_integers(quantized: QuantizedLayer) -> bool:
    """Say whether OpenVINO computes a pointwise convolution in integers.

    It does with more than four bits for weights and one scale for inputs.
    """
    if not isinstance(quantized.input, Quantizer) or quantized.format.bits <= 4:
        return False
    return quantized.input.format.granularity == "tensor"


def _store_int4(proto: onnx.ModelProto, names: list[str]) -> None:
    """Turn the INT8 initializers of these names into INT4.

    The exporter may have made one of several that are equal.
    """
    found = [tensor for tensor in proto.graph.initializer if tensor.name in names]
    if names and not found:
        raise RuntimeError("the ONNX exporter of this torch does not keep the names of tensors")
    for tensor in found:
        codes = onnx.numpy_helper.to_array(tensor).astype(ml_dtypes.int4)
        tensor.CopyFrom(onnx.numpy_helper.from_array(codes, tensor.name))


def _strip(graph: onnx.GraphProto) -> None:
    """Drop what the exporter notes for debugging: it outweighs four-bit weights."""
    for field in ("value_info", "metadata_props"):
        graph.ClearField(field)
    for entry in (*graph.node, *graph.initializer, *graph.input, *graph.output):
        entry.ClearField("metadata_props")
    for node in graph.node:
        if node.op_type in ("DequantizeLinear", "Unsqueeze"):  # one or two a layer
            node.ClearField("name")
