"""A quantized network as one of integers alone, from the codes of images to those of logits."""

import copy
from collections.abc import Callable
from operator import attrgetter

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from mobilevit import AttentionCore
from ptq.folding import fold_norms, spread_scales
from ptq.graph import Tracer
from ptq.integer.layers import IntegerActivation, IntegerNorm, IntegerSoftmaxCore
from ptq.integer.operators import (
    Attention,
    ClippedReLU,
    Codes,
    Concatenation,
    Constant,
    Mean,
    Norm,
    Product,
    Sum,
    Table,
    Unresized,
)
from ptq.integer.rescale import OutOfRange, fits
from ptq.layers import QuantizedAttentionCore, QuantizedLayer, Quantizer, copied

ADVICE = "take a recipe that computes it in integers, such as i-bert"
# Layers that recipes such as i-bert compute in integers, in float or quantized otherwise.
QUANTIZABLE = (QuantizedLayer, QuantizedAttentionCore, AttentionCore, nn.Conv2d, nn.Linear)
QUANTIZABLE += (nn.LayerNorm, nn.SiLU, nn.GELU)


class IntegerNetwork(nn.Module):
    """Codes of images [B, C, H, W] -> codes of logits [B, K], int64.

    `operators` is a module of torch.fx: print(network.operators.code) shows what it does in which
    order, and its state holds integers alone. `encode` and `decode` are the ends, where values are.
    """

    def __init__(self, operators: nn.Module, image: Quantizer, scale: float):
        super().__init__()
        self.operators, self.image, self.scale = operators, image, scale
        self.zero_point = int(image.zero_point)

    def encode(self, images: Tensor) -> Tensor:
        """Return the codes of images, as the format of the first layer's input has them.

        ValueError for an image that is not finite.
        """
        return self.image.encode(images, "an image").long()

    def forward(self, codes: Tensor) -> Tensor:
        """Return the codes of logits.

        OutOfRange for codes that the images' format does not have, TypeError unless int64.
        """
        format = self.image.format
        if fits(codes, 63, "a code of an image").numel():
            low, high = (int(end) for end in codes.aminmax())
            if low < format.qmin or high > format.qmax:
                raise OutOfRange(f"codes of images lie in {format.qmin} to {format.qmax}")
        return self.operators(codes - self.zero_point)

    def decode(self, codes: Tensor) -> Tensor:
        """Return the logits that codes stand for, float64."""
        return codes.double() * self.scale


@torch.no_grad()
def integer_network(quantized: nn.Module, products: torch.dtype = torch.float64) -> IntegerNetwork:
    """Return the network of integers that `quantized` simulates.

    `quantized`: what `ptq.quantize` gave by a recipe that quantizes the inputs of all products and
    has integer forms of all other layers, such as `i-bert`.
    `products`: the type that matrix products are computed in, torch.int64 or, to the same bits,
    torch.float64.

    It is on the CPU. Batch norms are folded. Between two layers a tensor has 32 bits, as fine as
    its largest possible value permits. ValueError names a layer that has no integer form.
    """
    if products not in (torch.int64, torch.float64):
        raise ValueError(f"integers are multiplied in torch.int64 or torch.float64, not {products}")
    quantized = copied(quantized).cpu()
    network = copy.deepcopy(quantized).double().eval()  # scales are folded and divided in float64
    spread_scales(network)
    fold_norms(network)
    try:
        traced = Tracer().trace(network)
    except Exception as error:  # control flow that looks at values; torch.fx has no common base
        raise ValueError(f"torch.fx can't follow the network: {error}") from error
    image = image_quantizer(quantized, traced)
    graph, operators = torch.fx.Graph(), {}
    copies: dict[torch.fx.Node, torch.fx.Node] = {}
    known: dict[torch.fx.Node, Codes] = {}  # of what a node gives
    for node in traced.nodes:
        if node.op == "placeholder":
            scale, reach = float(image.scale), 2**image.format.bits
            copies[node], known[node] = graph.placeholder(node.name), Codes(scale, reach)
            continue
        if node.op == "output":
            if not isinstance(node.args[0], torch.fx.Node):
                raise ValueError("the network gives more than one tensor")
            graph.output(copies[node.args[0]])
            break
        inputs, operator, codes = translated(node, network, known, products)
        known[node] = codes
        if operator is None:
            copies[node] = graph.node_copy(node, copies.__getitem__)
        else:
            operators[node.name] = operator
            copies[node] = graph.call_module(node.name, tuple(copies[n] for n in inputs))
    module = torch.fx.GraphModule(operators, graph).eval()
    return IntegerNetwork(module, image, known[node.args[0]].scale)


def image_quantizer(network: nn.Module, traced: torch.fx.Graph) -> Quantizer:
    """Return the quantizer of images, whose codes the network takes in.

    ValueError unless all that the network does first with an image is to quantize it in one way.
    """
    left = [node for node in traced.nodes if node.op == "placeholder"]
    found = None
    while left:
        for user in left.pop().users:
            name = name_of(user)
            module = network.get_submodule(name) if user.op == "call_module" else None
            if name == "size" or (name == "getattr" and user.args[1] == "shape"):
                continue  # no value of it
            if type(module) in KEEP or (module is None and name in MOVES - {"relu"}):
                left.append(user)
            elif isinstance(module, QuantizedLayer) and isinstance(module.input, Quantizer):
                if len(module.input.scale) > 1:
                    raise ValueError(f"{name} takes in images without one scale: {ADVICE}")
                if found and not same_grid(module.input, found):
                    raise ValueError(f"{name} rounds images to other codes than another layer")
                found = module.input
            else:
                raise ValueError(f"{name} takes in the image in float: {advice(module)}")
    if found is None:
        raise ValueError(f"the network has no quantized layer: {ADVICE}")
    return found


def advice(layer: nn.Module | None) -> str:
    """Say what to do about a layer in float, or about a function, which is None."""
    return ADVICE if isinstance(layer, QUANTIZABLE) else "no recipe computes it in integers"


def same_grid(a: Quantizer, b: Quantizer) -> bool:
    return a.format == b.format and all(map(torch.equal, a.grid, b.grid))


def translated(
    node: torch.fx.Node, network: nn.Module, known: dict, products: torch.dtype
) -> tuple[list[torch.fx.Node], nn.Module | None, Codes]:
    """Return the nodes that a node's operator takes in, the operator, and the codes that it gives.

    Where the operator is None, the node does to codes what it does to values.
    """
    name = name_of(node)
    try:
        if node.op == "get_attr":
            constant = Constant(attrgetter(name)(network))
            return [], constant, constant.codes
        inputs = tensors(node)
        if node.op == "call_module":
            module = network.get_submodule(name)
            operator, codes = layer_form(module, [known[n] for n in inputs], products)
            return inputs, operator, codes
        of_inputs = [known[n] for n in inputs]
        if name in MOVES:
            return inputs, None, of_inputs[0]
        if name in RESIZES:
            settings = node.args[len(inputs) :]  # the patch side
            return inputs, Unresized(node.target, name, settings), of_inputs[0]
        if name in FUNCTIONS:
            operator = FUNCTIONS[name](node, of_inputs)
            return inputs, operator, getattr(operator, "codes", of_inputs[0])
        raise ValueError("has no integer form: the network computes with it outside of its layers")
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from error


def name_of(node: torch.fx.Node) -> str:
    return node.target if isinstance(node.target, str) else node.target.__name__


def tensors(node: torch.fx.Node) -> list[torch.fx.Node]:
    return [arg for arg in tree_leaves((node.args, node.kwargs)) if isinstance(arg, torch.fx.Node)]


def layer_form(
    layer: nn.Module, inputs: list[Codes], products: torch.dtype
) -> tuple[nn.Module, Codes]:
    """Return the integer operator of a layer and the codes that it gives."""
    if type(layer) in SAME:
        return layer, inputs[0]
    form = next((form for kind, form in FORMS.items() if isinstance(layer, kind)), None)
    if form is None:
        batch_norm = isinstance(layer, nn.BatchNorm2d)
        what = "it has to follow a convolution" if batch_norm else advice(layer)
        raise ValueError(f"a {type(layer).__name__} in float has no integer form: {what}")
    if getattr(layer, "published", False):
        raise ValueError(
            "published arithmetic has scales that depend on channels or data, and no integer form: "
            "take the recipe without -published"
        )
    operator = form(layer, inputs, products)
    return operator, getattr(operator, "codes", inputs[0])


def product_form(layer: QuantizedLayer, inputs: list[Codes], products: torch.dtype) -> Product:
    if layer.format is None or not isinstance(layer.input, Quantizer):
        raise ValueError(f"its weight or its input is in float: {ADVICE}")
    if layer.format.group_size or (layer.format.granularity == "channel" and layer.format.axis):
        raise ValueError("weights with several scales for one channel have sums of several scales")
    return Product(layer, *inputs, products)


def pool_form(pool: nn.AdaptiveAvgPool2d, inputs: list[Codes], products: torch.dtype) -> Mean:
    if pool.output_size not in (1, (1, 1)):
        raise ValueError("pooling has an integer form only over the whole feature map")
    return Mean((2, 3), keep=True)


def sum_form(node: torch.fx.Node, inputs: list[Codes]) -> Sum:
    if len(inputs) != 2 or node.kwargs:
        raise ValueError("has an integer form only for two tensors")
    return Sum(*inputs)


def arguments(node: torch.fx.Node, *names: str) -> dict:
    """Return what a call names after its tensors, by torch's names; ValueError for any other."""
    given = dict(zip(names, node.args[1:]))
    named = {k: v for k, v in node.kwargs.items() if k not in ("input", "tensors")}
    given |= {{"axis": "dim", "keepdims": "keepdim"}.get(k, k): v for k, v in named.items()}
    if given.keys() - set(names):
        raise ValueError(f"has an integer form only with {' and '.join(names)}")
    return given


def mean_form(node: torch.fx.Node, inputs: list[Codes]) -> Mean:
    given = arguments(node, "dim", "keepdim")
    axes = given.get("dim")
    if axes is None:
        raise ValueError("has an integer form only over named axes")
    return Mean((axes,) if isinstance(axes, int) else tuple(axes), given.get("keepdim", False))


def cat_form(node: torch.fx.Node, inputs: list[Codes]) -> Concatenation:
    return Concatenation(inputs, arguments(node, "dim").get("dim", 0))


# {type of layer: function (layer, codes of its inputs, type of products) -> operator}
FORMS: dict[type, Callable] = {
    QuantizedLayer: product_form,
    IntegerActivation: lambda layer, inputs, products: Table(layer, *inputs),
    IntegerSoftmaxCore: lambda core, inputs, products: Attention(core, *inputs, products),
    IntegerNorm: lambda norm, inputs, products: Norm(norm, *inputs),
    nn.AdaptiveAvgPool2d: pool_form,
    nn.ReLU6: lambda relu, inputs, products: ClippedReLU(*inputs, 6),
}
FUNCTIONS = {
    "add": sum_form,
    "iadd": sum_form,
    "cat": cat_form,
    "concat": cat_form,
    "mean": mean_form,
}
# What gives the codes of its result from the codes of its input, whatever their scale.
KEEP = (nn.Identity, nn.Flatten, nn.Dropout, nn.ZeroPad2d)
SAME = (*KEEP, nn.ReLU, nn.MaxPool2d)
MOVES = {"permute", "transpose", "flatten", "unflatten", "reshape", "view", "expand", "contiguous"}
MOVES |= {"unbind", "chunk", "squeeze", "unsqueeze", "getitem", "getattr", "size", "relu"}
MOVES |= {"check_images", "unfold", "fold"}  # of our models, each a single node of the graph
RESIZES = {"fit_patches", "resize_like"}  # likewise
