"""What quantization does to each single tensor of a network, in one pass over some images.

Each tensor is looked at twice. Locally: its values in the float network against the same rounded
to its format, so that the error is the format's own. Cumulatively: its values in the float network
against those in the quantized one, in which all before it is quantized as well.

    >>> quantized = ptq.quantize(model, recipe, batches)
    >>> found = profile(model, quantized, recipe, batches)
    >>> worst = found["tensors"][0]
"""

import contextlib
from collections import defaultdict
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map_only

from ptq.analysis.compare import logits_of
from ptq.analysis.costs import first_images, sampled_loss
from ptq.analysis.tensors import Error, TensorStats
from ptq.formats import Uniform
from ptq.graph import hooked, never_ran
from ptq.integer.layers import IntegerSoftmaxCore
from ptq.layers import (
    IntegerLayer,
    QuantizedAttentionCore,
    QuantizedLayer,
    Quantizer,
    located,
)
from ptq.pipeline import float_twin, layer_specs
from ptq.recipe import LayerSpec, Recipe

IMAGES = 64  # that are looked at
CHANNEL_AXIS = {nn.Conv2d: 1, nn.Linear: -1, nn.LayerNorm: -1}  # of a layer's inputs
CORES = (QuantizedAttentionCore, IntegerSoftmaxCore)
CORE_AXIS = {"q": -1, "k": -1, "v": -1, "scores": 1, "attention": 1}  # channels, or heads


def profile(
    model: nn.Module, quantized: nn.Module, recipe: Recipe, batches, n_images: int = IMAGES
) -> dict:
    """Return statistics of every tensor that `recipe` quantizes.

    They are taken over the first `n_images` of `batches`.
    `quantized` is what `ptq.quantize(model, recipe, batches)` gave. The result holds plain values:
    "tensors", worst first, each with what TensorStats.as_dict gives, and besides

    - "layer", "role" and "block": where it is;
    - "fisher": squared gradient of the loss at labels drawn from the network's own predictions,
      averaged over the tensor's elements and the images;
    - "noise": mean squared change of the outputs when this tensor alone is quantized, over their
      variance, to first order and along one random direction an image. Tensors are ordered by it;

    "blocks", as the network registers them, with the QSNR in dB of what each puts out, "local" when
    it alone is quantized and "cumulative"; "outputs_db", that of the network; "n_images". Images
    are run one by one, so that memory does not grow with their number. ValueError as `ptq.quantize`
    raises it, or if the outputs do not depend on the images.
    """
    both = Both(model, quantized, recipe, batches)
    for x, *_ in first_images(batches, n_images):
        for image in x:
            both.see(image[None])
    return both.as_dict()


@dataclass(eq=False)
class Watched:
    """A tensor that is quantized: its `role` for a layer, and the module `path` that puts it out.

    A weight has no path. `fisher` and `noise` are sums over images.
    """

    layer: str
    role: str
    path: str | None
    stats: TensorStats
    fisher: float = 0.0
    noise: float = 0.0


@dataclass
class Block:
    """Errors in what a block puts out."""

    local: Error = field(default_factory=Error)
    cumulative: Error = field(default_factory=Error)


class Both:
    """A float network and its quantized copy, their modules of the same names, side by side."""

    def __init__(self, model: nn.Module, quantized: nn.Module, recipe: Recipe, batches):
        self.float, self.quantized = float_twin(model, recipe, batches), quantized
        for module in self.float.modules():
            if getattr(module, "inplace", False):  # what went into a block is needed after it
                module.inplace = False
        specs = layer_specs(model, recipe)
        self.tensors = [
            t for name in specs for t in watched_tensors(model, quantized, name, specs[name])
        ]
        if not self.tensors:
            raise ValueError(f"recipe {recipe.name} quantizes no tensor")
        self.block_of = {t.layer: block_of(model, t.layer) for t in self.tensors}
        self.blocks = {name: Block() for name in self.block_of.values()}
        self.outputs, self.seen = Error(), []
        device = next(model.parameters()).device
        self.generator = torch.Generator(device).manual_seed(0)
        self.weights, self.weight_errors = {}, {}
        for tensor in self.tensors:
            if tensor.path is None:
                weight = self.float.get_submodule(tensor.layer).layer.weight.requires_grad_()
                codes = quantized.get_submodule(tensor.layer).codes
                self.weights[tensor] = [weight]
                self.weight_errors[tensor] = self.error(tensor, weight, codes)

    def see(self, image: Tensor) -> None:
        """Take in what both networks make of an image, [1, ...]."""
        values, calls, logits = self.float_pass(image)
        self.differentiate(logits, values)
        values = {t: [x.detach() for x in of_tensor] for t, of_tensor in values.items()}
        logits = logits.detach()
        with torch.no_grad():
            for name, (args, kwargs, y) in calls.items():
                alone = self.quantized.get_submodule(name)(*args, **kwargs)
                with located(f"output of {name}"):
                    self.blocks[name].local.add(y, first_tensor(alone), None)
            self.outputs.add(logits, self.quantized_pass(image, values, calls), None)
        self.seen.append(logits.flatten())

    def error(self, tensor: Watched, x: Tensor, codes: Tensor | None = None) -> Tensor:
        """Take in the values of a tensor, and return what quantization adds to them."""
        with torch.no_grad(), located(f"{tensor.role} of {tensor.layer}"):
            return tensor.stats.add(x.detach(), codes) - x

    def float_pass(self, image: Tensor) -> tuple[dict, dict, Tensor]:
        """Run the float network, and return what it makes of an image.

        {tensor: its values at each of its calls}, each a node of its own in the graph; {name of a
        block: arguments, keyword arguments and output of its first call}; the outputs.
        """
        values, entered, calls = defaultdict(list), {}, {}

        def keep(tensor, args, kwargs, output):
            node = output.clone()  # so that its gradient is that of this use alone
            values[tensor].append(node if node.requires_grad else node.requires_grad_())
            return node.clone()  # what follows may write over it

        def enter(name, module, *given):  # copied, as a block may add to its input in place
            entered.setdefault(name, tree_map_only(Tensor, lambda x: x.detach().clone(), given))

        def keep_call(name, args, kwargs, output):
            calls.setdefault(name, (*entered[name], first_tensor(output).detach().clone()))

        paths = {tensor: tensor.path for tensor in self.tensors if tensor.path is not None}
        with (
            torch.enable_grad(),
            contextlib.ExitStack() as stack,
            hooked(self.float, paths, keep),
            hooked(self.float, {name: name for name in self.blocks}, keep_call),
        ):
            for name in self.blocks:
                register = self.float.get_submodule(name).register_forward_pre_hook
                stack.enter_context(register(partial(enter, name), with_kwargs=True))
            logits = logits_of(self.float(image))
        return dict(values), calls, logits

    def differentiate(self, logits: Tensor, values: dict) -> None:
        """Take in the float values of all tensors, and what their errors do to the outputs."""
        nodes = [node for of_tensor in (values | self.weights).values() for node in of_tensor]
        direction = torch.randn(logits.shape, generator=self.generator, device=logits.device)
        with torch.enable_grad():
            loss = sampled_loss(logits, self.generator)
        of_loss = torch.autograd.grad(loss, nodes, retain_graph=True, allow_unused=True)
        along = torch.autograd.grad(logits, nodes, direction, allow_unused=True)
        gradients = iter(zip(of_loss, along))
        for tensor, of_tensor in (values | self.weights).items():
            change = 0.0
            for node, (of_node, along_node) in zip(of_tensor, gradients):
                error = self.weight_errors.get(tensor)
                error = self.error(tensor, node) if error is None else error
                if of_node is not None:  # else nothing of it reaches the outputs
                    tensor.fisher += float(of_node.square().mean()) / len(of_tensor)
                    change += float((along_node * error).sum())
            tensor.noise += change**2 / logits.numel()

    def quantized_pass(self, image: Tensor, values: dict, calls: dict) -> Tensor:
        """Compare what the quantized network puts out at the same places; return its outputs."""

        def compare(tensor, args, kwargs, output):
            with located(f"{tensor.role} of {tensor.layer}"):
                is_softmax = tensor.role == "attention"
                tensor.stats.add_quantized(values[tensor].pop(0), output, is_softmax)

        def look_inside(name, args, kwargs, output):
            """Compare the tensors inside of an integer layer.

            It computes with codes, past its quantizers: what these make is seen when it computes in
            float. What it really puts out is seen as it is.
            """
            layer = self.quantized.get_submodule(name)
            inside = {tensor.role: tensor for tensor in integer[name]}
            passed = {t: t.path for r, t in inside.items() if r not in ("attention", "output")}
            with hooked(self.quantized, passed, compare):
                layer.simulate(*args)
            if "output" in inside:
                compare(inside["output"], args, kwargs, output)
            if "attention" in inside:
                compare(inside["attention"], args, kwargs, attention(layer, *args[:2]))

        def compare_block(name, args, kwargs, output):
            if name in calls:
                with located(f"output of {name}"):
                    self.blocks[name].cumulative.add(calls.pop(name)[2], first_tensor(output), None)

        integer, plain = defaultdict(list), {}
        for tensor in self.tensors:
            if isinstance(self.quantized.get_submodule(tensor.layer), IntegerLayer):
                integer[tensor.layer].append(tensor)
            elif tensor.path is not None:
                plain[tensor] = tensor.path
        with (
            hooked(self.quantized, plain, compare),
            hooked(self.quantized, {name: name for name in integer}, look_inside),
            hooked(self.quantized, {name: name for name in self.blocks}, compare_block),
        ):
            return logits_of(self.quantized(image))

    def as_dict(self) -> dict:
        n, variance = len(self.seen), float(torch.cat(self.seen).double().var())
        if not variance > 0:
            raise ValueError("the network puts out the same numbers whatever it sees")
        for tensor in self.tensors:
            if not tensor.stats.local.n:
                raise never_ran(tensor.layer)
        tensors = [
            {
                "layer": tensor.layer,
                "role": tensor.role,
                "block": self.block_of[tensor.layer],
                "noise": tensor.noise / n / variance,
                "fisher": tensor.fisher / n,
                **tensor.stats.as_dict(),
            }
            for tensor in self.tensors
        ]
        ran = {name: block for name, block in self.blocks.items() if block.cumulative.n}
        return {
            "tensors": sorted(tensors, key=lambda t: t["noise"], reverse=True),
            "blocks": [
                {
                    "name": name,
                    "local_db": block.local.as_dict()["qsnr_db"],
                    "cumulative_db": block.cumulative.as_dict()["qsnr_db"],
                }
                for name, block in ran.items()
            ],
            "outputs_db": self.outputs.as_dict()["qsnr_db"],
            "n_images": n,
        }


def watched_tensors(
    model: nn.Module, quantized: nn.Module, name: str, spec: LayerSpec
) -> list[Watched]:
    """Return the tensors that a layer's `spec` quantizes, with their grids in `quantized`."""
    layer, found = quantized.get_submodule(name), []
    module = model.get_submodule(name)
    axis = next((axis for kind, axis in CHANNEL_AXIS.items() if isinstance(module, kind)), None)
    if isinstance(layer, QuantizedLayer) and layer.format is not None:
        grid = (layer.scale, torch.zeros_like(layer.scale, dtype=torch.int32))
        found.append(Watched(name, "weight", None, TensorStats(layer.format, grid, 0)))
    for path, module in layer.named_modules():
        if isinstance(module, Quantizer):
            role = "input" if path == "0" else path.rpartition(".")[2]  # of a pointwise layer
            of_channels = CORE_AXIS[role] if isinstance(layer, CORES) else axis
            stats = TensorStats(module.format, module.grid, of_channels)
            found.append(Watched(name, role, f"{name}.{path}", stats))
    if isinstance(layer, CORES) and "attention" not in layer.inputs:
        format, grid = spec.attention, ()
        if isinstance(format, Uniform):  # as published: fixed units, no quantizer
            scale = torch.full_like(layer.inputs["q"].scale, 1 / layer.integer_softmax()[1])
            grid = (scale, torch.zeros_like(scale, dtype=torch.int32))
        stats = TensorStats(format, grid, CORE_AXIS["attention"])
        found.append(Watched(name, "attention", f"{name}.softmax", stats))
    return found


def attention(core: IntegerSoftmaxCore, q: Tensor, k: Tensor) -> Tensor:
    """Return the softmax [..., N, N] that a core multiplies with v, as the core computes it."""
    v, core.inputs["v"] = core.inputs["v"], nn.Identity()
    try:
        return core.compute(q, k, torch.eye(k.shape[-2], device=k.device))
    finally:
        core.inputs["v"] = v


def block_of(model: nn.Module, layer: str) -> str:
    """Return the name of the block that holds a layer.

    Blocks are the outermost elements of lists and sequences that are not lists themselves. Without
    one, it is the layer itself.
    """
    sequences = (nn.Sequential, nn.ModuleList)
    parts = layer.split(".")
    for i in range(len(parts)):
        outer, name = ".".join(parts[:i]), ".".join(parts[: i + 1])
        if isinstance(model.get_submodule(outer), sequences):
            if not isinstance(model.get_submodule(name), sequences):
                return name
    return layer


def first_tensor(output) -> Tensor:
    return next(leaf for leaf in tree_leaves(output) if isinstance(leaf, Tensor))
