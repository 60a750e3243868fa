"""torch's FX graph mode quantization: INT8 kernels behind torch.ao.quantization, torch's own
observers and settings. The published baseline, kept as it was done."""

import copy
import warnings

import torch
from tqdm import tqdm

from engines import EngineMissing, Loaded

NAME = "torch-fx"


def version() -> str:
    return torch.__version__


def load(model, recipe, calibration) -> Loaded:
    """`model` converted with the default qconfig named by the recipe.

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
    if recipe.qconfig not in torch.backends.quantized.supported_engines:
        raise EngineMissing(f"this torch has no {recipe.qconfig!r} INT8 kernels for this CPU")
    torch.backends.quantized.engine = recipe.qconfig
    with warnings.catch_warnings(), torch.inference_mode():
        warnings.simplefilter("ignore")  # of deprecation, and of observers that saw nothing
        mapping = get_default_qconfig_mapping(recipe.qconfig)
        example = (calibration[0][0][:1],)
        prepared = prepare_fx(copy.deepcopy(model).eval(), mapping, example)
        for x, _ in tqdm(calibration, "calibrating", leave=False, disable=None):
            prepared(x)
        converted = convert_fx(prepared)
    return Loaded(converted, converted.state_dict())
