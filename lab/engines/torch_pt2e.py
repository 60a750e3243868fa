"""torchao's PT2E quantization, compiled by Inductor: the successor of FX graph mode."""

import warnings

import torch
from torch import nn

from lab.engines import Loaded, require
from lab.machine import has_vnni
from mobilevit import AttentionCore
from ptq.packing import written_bytes

NAME = "torch-pt2e"
# How Inductor counts the products that it found in the graph as quantized ones.
MATCHED = {
    "qconv_weight_prepack_matcher_count": "Conv",
    "qlinear_weight_prepack_matcher_count": "MatMul",
}


def version() -> str:
    return f"{require('torchao')[0].__version__}, torch {torch.__version__}"


def load(model, recipe, calibration, example) -> Loaded:
    """Return `model` quantized with the default settings for x86 on all of `calibration`.

    It is compiled for one image and one thread a call.
    """
    require("torchao")
    from torch._dynamo.utils import counters
    from torch._inductor import config
    from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e
    from torchao.quantization.pt2e.quantizer import x86_inductor_quantizer as x86

    quantizer = x86.X86InductorQuantizer()
    settings = x86.get_default_x86_inductor_quantization_config(reduce_range=not has_vnni())
    quantizer.set_global(settings)
    threads = torch.get_num_threads()
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        batch = {0: torch.export.Dim("batch")}
        pair = example.expand(2, *example.shape[1:]).contiguous()  # one would be exported as fixed
        # Strictly, as only then the quantizer tells calls of one module apart, such as a block's
        # ReLU in torchvision's ResNet.
        exported = torch.export.export(model, (pair,), dynamic_shapes=(batch,), strict=True)
        prepared = prepare_pt2e(exported.module(), quantizer)
        for x, _ in calibration:
            prepared(x)
        converted = convert_pt2e(prepared)
        counters.clear()
        torch.set_num_threads(1)  # the number is compiled in
        try:
            with config.patch(freezing=True):
                compiled = torch.compile(converted)
                compiled(example)
        finally:
            torch.set_num_threads(threads)

    def run(x):
        with torch.inference_mode(False), torch.no_grad():  # the mode it was compiled in
            return torch.cat([compiled(image[None].clone()) for image in x])

    # The module also keeps the float weights, of which its graph reads nothing any more.
    read = {node.target for node in converted.graph.nodes if node.op == "get_attr"}
    state = {name: tensor for name, tensor in converted.state_dict().items() if name in read}
    return Loaded(
        run,
        written_bytes(lambda path: torch.save(state, path)),
        products=products(model, counters["inductor"]),
    )


def products(model, matched) -> dict[str, dict[str, int]]:
    """Count convolutions and matrix products in integers and in float, attention's two in float.

    {"int8": {kind: number}, "float": {...}}. `matched`: {name in MATCHED: number}, of Inductor.
    """
    kinds = {"Conv": {nn.Conv2d: 1}, "MatMul": {nn.Linear: 1, AttentionCore: 2}}
    total = {k: sum(n.get(type(m), 0) for m in model.modules()) for k, n in kinds.items()}
    int8 = {kind: matched[name] for name, kind in MATCHED.items()}
    return {"int8": int8, "float": {kind: n - int8[kind] for kind, n in total.items()}}
