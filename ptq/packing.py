"""The file that holds a quantized network in few bits, and the bytes that it takes."""

import json
import re
import tempfile
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from ptq.formats import PowerOfTwo, Uniform
from ptq.layers import QuantizedLayer, Quantizer, check_inputs, copied, own_buffers
from ptq.pipeline import attach, check_formats, layer_specs
from ptq.recipe import Recipe

GRID = ("scale", "zero_point")  # of a quantizer
# What reading a damaged header may raise.
DAMAGE = (OSError, KeyError, TypeError, ValueError, AttributeError, RecursionError)


def size_bytes(model: nn.Module, recipe: Recipe) -> int:
    """Return the bytes of the file that holds a network's weights; it is written to find out.

    Quantized networks are packed as by `save`. Others are saved as torch saves their state.
    """
    if recipe.layers:
        return written_bytes(lambda path: save(model, recipe, path))
    return written_bytes(lambda path: torch.save(model.state_dict(), path))


def written_bytes(write: Callable[[Path], None]) -> int:
    """Return the bytes of the file that `write` writes to the path it is given."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "weights")
        write(path)
        return path.stat().st_size


def pack(codes: Tensor, bits: int) -> Tensor:
    """Return signed codes of any shape as uint8 bytes, `bits` to a code.

    The most significant bit comes first, and the last byte is filled up with zeros.
    """
    unsigned = (codes.flatten().cpu().numpy() + 2 ** (bits - 1)).astype(">u2")
    all_bits = np.unpackbits(unsigned.view(np.uint8).reshape(-1, 2), axis=1)
    return torch.from_numpy(np.packbits(all_bits[:, 16 - bits :]))


def unpack(data: Tensor, bits: int, shape) -> Tensor:
    """Undo `pack`: return codes int32 of `shape`. ValueError if `data` holds another number."""
    n = int(np.prod(shape))
    if len(data) != -(-n * bits // 8):
        raise ValueError(f"{len(data)} bytes do not hold {n} codes of {bits} bits")
    all_bits = np.unpackbits(data.numpy())[: n * bits].reshape(n, bits)
    padded = np.pad(all_bits, ((0, 0), (16 - bits, 0)))
    unsigned = np.packbits(padded, axis=1).view(">u2").astype(np.int32)
    return torch.from_numpy(unsigned.reshape(tuple(shape)) - 2 ** (bits - 1))


def save(model: nn.Module, recipe: Recipe, path) -> None:
    """Write a network that `ptq.quantize` gave to a safetensors file.

    Packed codes and scales take the place of weights, everything else stays as it is. The header
    holds the recipe and the network's `settings`, if it has any. OSError if it can't be written,
    ValueError for a network that another recipe quantized, and for what `load` would refuse: a
    pattern of the recipe, anything but a quantizer before a quantized layer, or `settings` that are
    no JSON.
    """
    check_patterns(recipe)
    check_formats(model, recipe)
    check_inputs(model)
    tensors = dict(model.state_dict())
    for name, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, QuantizedLayer) and module.format is not None:
            del tensors[f"{name}.layer.weight"]
            tensors[f"{name}.codes"] = pack(module.codes, module.format.bits)
        elif isinstance(module, nn.BatchNorm2d):
            tensors.pop(f"{name}.num_batches_tracked", None)  # of use in training only
    # A copy of each, because a file holds no tensor at two places.
    tensors = {n: t.clone(memory_format=torch.contiguous_format) for n, t in tensors.items()}
    header = {"recipe": recipe.asdict(), "settings": _settings(model)}
    metadata = {key: json.dumps(value) for key, value in header.items()}
    try:
        save_file(tensors, path, metadata=metadata)
    except SafetensorError as error:  # for a full disk as well
        raise OSError(str(error)) from error


def load(path, model: nn.Module) -> tuple[nn.Module, Recipe]:
    """Return the quantized network and the recipe in a file that `save` wrote.

    The network is rebuilt on a copy of `model`, a float network of the same architecture with any
    weights, and is on the same device. Raises ValueError if the file is damaged or holds another
    network.
    """
    try:
        with safe_open(path, "pt") as file:
            header = {key: json.loads(value) for key, value in file.metadata().items()}
            recipe, settings = Recipe.fromdict(header["recipe"]), header["settings"]
            tensors = {name: file.get_tensor(name) for name in file.keys()}
        check_patterns(recipe)
    except (SafetensorError, *DAMAGE) as error:
        raise ValueError(f"{path} holds no quantized network: {error}") from error
    ours = _settings(model)
    if settings != ours:  # weights have the same shapes with other heads
        raise ValueError(f"{path} holds another network: {settings}, but asked for is {ours}")
    device = next((t.device for t in model.state_dict().values()), None)
    model = copied(model).cpu().eval()
    try:
        attach(model, layer_specs(model, recipe))
        _fill(model, tensors)
    except (KeyError, RuntimeError, ValueError) as error:
        raise ValueError(f"{path} holds another network: {error}") from error
    return model.to(device), recipe


def _settings(model: nn.Module):
    """Return a network's `settings`, if any, as JSON gives them back; ValueError for no JSON."""
    try:
        return json.loads(json.dumps(getattr(model, "settings", None), allow_nan=False))
    except (TypeError, ValueError) as error:
        raise ValueError(f"a file can't hold the network's `settings`: {error}") from error


def check_patterns(recipe: Recipe) -> None:
    """Raise ValueError if a pattern of a recipe for a file is slow to match."""
    for pattern in (*(spec.pattern for spec in recipe.layers), recipe.units or ""):
        alone = [pattern] if "(" in pattern else pattern.split("|")
        repeats = max(len(re.findall(r"(?<!\\)[*+{]", alternative)) for alternative in alone)
        if re.search(r"\)[*+{]", pattern) or repeats > 3:
            raise ValueError(f"the pattern {pattern[:40]!r} repeats too much for a file's")


def _fill(model: nn.Module, tensors: dict[str, Tensor]) -> None:
    rebuilt = set()
    for name, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, Quantizer):
            scale, zero_point = (tensors[f"{name}.{k}"] for k in GRID)
            module.scale, module.zero_point = scale, zero_point
            n = _scales_of_input(model, name) or len(scale)
            fits = scale.shape == zero_point.shape == (n,) and zero_point.dtype == torch.int32
            _check_grid(name, scale, fits and _has_zero_points(module.format, zero_point))
            if isinstance(module.format, PowerOfTwo):
                _check_shifts(name, tensors[f"{name}.shifts"], module.format.most)
        elif isinstance(module, QuantizedLayer):
            bias = tensors.get(f"{name}.layer.bias")
            if bias is not None and module.layer.bias is None:  # it came with bias correction
                module.layer.bias = nn.Parameter(torch.empty_like(bias))
            if module.format is not None:
                codes, scale = tensors.pop(f"{name}.codes"), tensors[f"{name}.scale"]
                _check_grid(name, scale, codes.dtype == torch.uint8 and codes.dim() == 1)
                codes = unpack(codes, module.format.bits, module.layer.weight.shape)
                module.set_weight(codes, scale)
                rebuilt |= {f"{name}.codes", f"{name}.layer.weight"}
        elif isinstance(module, nn.BatchNorm2d):
            rebuilt.add(f"{name}.num_batches_tracked")
    own = own_buffers(model)
    for name, tensor in tensors.items():
        if name not in own and not tensor.isfinite().all():
            raise ValueError(f"{name} is not finite")
    state = OrderedDict(tensors)
    state._metadata = model.state_dict()._metadata  # versions, which some modules ask for
    missing, unexpected = model.load_state_dict(state, strict=False)
    wrong = [name for name in missing if name not in rebuilt] + unexpected
    if wrong:
        raise ValueError(f"{', '.join(wrong[:3])} missing or not expected")


def _has_zero_points(format: Uniform | PowerOfTwo, zero_point: Tensor) -> bool:
    """Say whether zero-points are codes of the format, and 0 where it is symmetric."""
    whole = format.whole if isinstance(format, PowerOfTwo) else format
    low, high = (0, 0) if whole.symmetric else (whole.qmin, whole.qmax)
    return bool(((zero_point >= low) & (zero_point <= high)).all())


def _check_shifts(name: str, shifts: Tensor, most: int) -> None:
    whole = shifts.dtype == torch.int64
    if not (whole and ((shifts >= 0) & (shifts <= most)).all()):
        raise ValueError(f"shifts of {name} are not those of its format")


def _scales_of_input(model: nn.Module, name: str) -> int | None:
    """Return how many scales the quantizer of this name has; None if its layer does not say."""
    format = model.get_submodule(name).format
    if isinstance(format, PowerOfTwo) or format.granularity == "tensor":
        return 1
    layer = getattr(model.get_submodule(name.rpartition(".")[0]), "layer", None)
    weight = getattr(layer, "weight", None)
    if weight is None or weight.dim() == 1 or format.axis != (1 if weight.dim() == 4 else -1):
        return None
    return weight.shape[1] * getattr(layer, "groups", 1)


def _check_grid(name: str, scale: Tensor, codes_fit: bool) -> None:
    good = scale.dtype == torch.float32 and scale.dim() == 1 and len(scale) > 0
    if not (good and codes_fit and (scale > 0).all()):
        raise ValueError(f"codes or scales of {name} are not those of its format")
