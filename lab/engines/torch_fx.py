"""torch's FX graph mode quantization: the published baseline, kept as it was done.

INT8 kernels behind torch.ao.quantization, with torch's own observers and settings.
"""

import copy
import warnings
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from tqdm import tqdm

from lab.engines import EngineMissing, Loaded
from ptq.analysis.sensitivity import noises, set_attribute, set_tensor
from ptq.packing import written_bytes
from ptq.pipeline import check_values

NAME = "torch-fx"
QCONFIG = "x86"  # torch's own default settings and kernels for this kind of processor
CHUNK = 2**18  # values that a thread counts at a time: few enough for its cache


def version() -> str:
    return torch.__version__


def load(model, recipe, calibration, example) -> Loaded:
    """Return `model` converted with the default settings of QCONFIG.

    `calibration`: a sequence of (input [b, 3, S, S], labels), its labels unused. EngineMissing
    where torch no longer has torch.ao.quantization or its INT8 kernels.
    """
    prepared = calibrated(model, calibration, example)
    from torch.ao.quantization.quantize_fx import convert_fx

    with warnings.catch_warnings(), torch.inference_mode():
        warnings.simplefilter("ignore")
        converted = convert_fx(prepared)
    state = converted.state_dict()
    return Loaded(converted, written_bytes(lambda path: torch.save(state, path)))


@torch.inference_mode()
def sensitivities(model, recipe, calibration, outputs) -> dict:
    """Return the noise of all "weights" and "activations" that FX quantizes.

    It has the form that `ptq.analysis.sensitivity.noises` gives. An activation has the name of the
    layer or operation that gives it. ValueError for weights that are not finite.
    """
    check_values(model)
    network = calibrated(model, calibration, calibration[0][0][:1])
    from torch.ao.quantization import ObserverBase

    alone = {"weights": {}, "activations": {}}
    for name, module in network.named_modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            observer = module.qconfig.weight()
            observer(module.weight)
            scale, zero_point = observer.calculate_qparams()
            limits = observer.quant_min, observer.quant_max
            value = torch.fake_quantize_per_channel_affine(
                module.weight, scale, zero_point.int(), 0, *limits
            )
            alone["weights"][name] = partial(set_tensor, module.weight, value)
    for node in network.graph.nodes:
        observer = network.get_submodule(node.target) if node.op == "call_module" else None
        if isinstance(observer, ObserverBase):
            network.set_submodule(node.target, switch := Switch(observer))
            (source,) = node.args
            name = source.target if source.op == "call_module" else source.name
            alone["activations"][name] = partial(set_attribute, switch, "on", True)
    return noises(network, outputs, alone)


class Switch(nn.Module):
    """Passes activations on; while `on`, as they are in the format that `observer` chose."""

    def __init__(self, observer):
        super().__init__()
        self.on = False
        scale, zero_point = observer.calculate_qparams()
        self.format = scale, zero_point.int(), observer.quant_min, observer.quant_max

    def forward(self, x):
        return torch.fake_quantize_per_tensor_affine(x, *self.format) if self.on else x


def calibrated(model, calibration, example):
    """Return a copy of `model` with observers that have seen `calibration`, ready to be converted.

    EngineMissing as for `load`.
    """
    try:
        from torch.ao.quantization import get_default_qconfig_mapping
        from torch.ao.quantization.quantize_fx import prepare_fx
    except ImportError as error:
        raise EngineMissing(
            f"torch {torch.__version__} has no torch.ao.quantization any more: "
            "its FX INT8 row needs an older torch, such as 2.11"
        ) from error
    if QCONFIG not in torch.backends.quantized.supported_engines:
        raise EngineMissing(f"this torch has no {QCONFIG!r} INT8 kernels for this CPU")
    torch.backends.quantized.engine = QCONFIG
    with warnings.catch_warnings(), torch.inference_mode():
        warnings.simplefilter("ignore")  # of deprecation, and of observers that saw nothing
        mapping = get_default_qconfig_mapping(QCONFIG)
        prepared = prepare_fx(copy.deepcopy(model).eval(), mapping, (example,))
        with FastHistograms():
            for x, _ in tqdm(calibration, "calibrating", leave=False, disable=None):
                prepared(x)
    return prepared


class FastHistograms(TorchFunctionMode):
    """Within this context torch.aminmax and torch.histc give the same values several times faster.

    Calibration spends most of its time in torch's default observer: in aminmax, which copies
    channels-last tensors first, and in histc. Counts are exact integers where torch.histc adds in
    float32, which stops at 2**24 a bin and thread.
    """

    def __torch_function__(self, func, types, args=(), kwargs=None):
        faster = {torch.aminmax: self.aminmax, torch.histc: self.histc}
        return faster.get(func, func)(*args, **(kwargs or {}))

    @staticmethod
    def aminmax(x, **dim):
        return torch.aminmax(x if dim else in_memory_order(x), **dim)

    @staticmethod
    def histc(x, bins=100, min=0, max=0):
        x, low, high = in_memory_order(x).flatten(), float(min), float(max)
        if low == high or not len(x):
            return torch.histc(x, bins, min, max)  # chooses a range by itself
        smallest, largest = (edge.item() for edge in x.aminmax())
        if not low <= smallest <= largest <= high:
            return torch.histc(x, bins, min, max)  # leaves out values beyond the range

        def counts(parts):
            total = torch.zeros(bins, dtype=torch.int64)
            values = torch.empty(CHUNK, dtype=x.dtype)
            indices = torch.empty(CHUNK, dtype=torch.int32)
            for part in parts:
                value, index = values[: len(part)], indices[: len(part)]
                torch.sub(part, low, out=value).mul_(bins).div_(high - low)
                total += torch.bincount(index.copy_(value).clamp_(max=bins - 1), minlength=bins)
            return total

        parts, threads = x.split(CHUNK), torch.get_num_threads()
        with ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,)) as pool:
            return sum(pool.map(counts, (parts[i::threads] for i in range(threads)))).to(x.dtype)


def in_memory_order(x):
    """Return channels-last `x` [b, C, H, W] as a contiguous [b, H, W, C], others as they are."""
    channels_last = x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last)
    return x.permute(0, 2, 3, 1) if channels_last else x
