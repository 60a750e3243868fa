"""torch's FX graph mode quantization: INT8 kernels behind torch.ao.quantization, torch's own
observers and settings. The published baseline, kept as it was done."""

import copy
import warnings
from concurrent.futures import ThreadPoolExecutor

import torch
from torch.overrides import TorchFunctionMode
from tqdm import tqdm

from engines import EngineMissing, Loaded

NAME = "torch-fx"
QCONFIG = "x86"  # torch's own default settings and kernels for this kind of processor
CHUNK = 2**16  # values that a thread counts at a time; what it makes of them stays in its cache


def version() -> str:
    return torch.__version__


def load(model, recipe, calibration, example) -> Loaded:
    """`model` converted with the default settings of QCONFIG.

    `calibration`: a sequence of (input [b, 3, S, S], labels), its labels unused. Raises
    EngineMissing where torch no longer has torch.ao.quantization or its INT8 kernels.
    """
    try:
        from torch.ao.quantization import get_default_qconfig_mapping
        from torch.ao.quantization.quantize_fx import convert_fx, prepare_fx
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
        with FastHistc():
            for x, _ in tqdm(calibration, "calibrating", leave=False, disable=None):
                prepared(x)
        converted = convert_fx(prepared)
    return Loaded(converted, state=converted.state_dict())


class FastHistc(TorchFunctionMode):
    """Within this context torch.histc gives the same counts several times faster.

    Calibration spends most of its time in the histograms of torch's default observer. The counts
    are exact integers where torch.histc adds in float32, which stops at 2**24 a bin and thread.
    """

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is torch.histc:
            return self.histc(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))

    @staticmethod
    def histc(x, bins=100, min=0, max=0):
        low, high = float(min), float(max)
        if x.is_contiguous(memory_format=torch.channels_last) and x.dim() == 4:
            x = x.permute(0, 2, 3, 1)  # the order of the values is free: take that in memory

        def counts(part):
            smallest, largest = (edge.item() for edge in part.aminmax())
            if not low <= smallest <= largest <= high or low == high:
                return torch.histc(part, bins, min, max)  # values outside the range, or none given
            codes = ((part - low) * bins / (high - low)).int().clamp_(max=bins - 1)
            return torch.bincount(codes, minlength=bins)

        parts = x.flatten().split(CHUNK)
        if len(parts) == 1 or low == high:
            return counts(x.flatten()).to(x.dtype)
        threads = torch.get_num_threads()
        with ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,)) as pool:
            return sum(pool.map(counts, parts)).to(x.dtype)
