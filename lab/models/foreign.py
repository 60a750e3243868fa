"""MobileViT weights from elsewhere: plain state dicts with our names or with those of timm, Hugging
Face transformers or Apple's ml-cvnets.

>>> network, layout = read_weights("model.safetensors", "mobilevit_s")
>>> save_checkpoint("mine.pth", as_checkpoint(network, "mobilevit_s", layout))

All four compute the same; they differ in names, in attention heads (the other three have four in
every block) and in the order of the colours that the weights were trained on. A network read here
always takes RGB. Names and colours: the three projects' code, of ml-cvnets its v0.1.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from lab.cli import BadInput
from lab.models import build, full_name, settings_of
from lab.models.checkpoint import FORMAT, load_state, read_tensors, tensor, without_prefix
from lab.schema import mapping
from lab.tasks import cifar10
from mobilevit import VARIANTS, from_timm

IMG_SIZE = 256  # the side of the images that the paper trains on, in pixels

# Where scripts keep the state dict in what they save. Averaged weights come first: where a file
# has both, they are the ones that the script evaluated.
WRAPPERS = (
    "state_dict_ema", "model_ema", "ema", "state_dict", "model_state_dict", "model_state", "model",
)  # fmt: skip

# Tensors that are no part of the network: the step count of torch's averaged models, and the head
# of transformers' segmentation network.
IGNORED = re.compile(r"n_averaged|segmentation_head\..*")

# transformers' and ml-cvnets' parameter names -> ours, as rewrites applied in this order.
_FROM_TRANSFORMERS = (
    (r"^mobilevit\.", ""),
    (r"^encoder\.layer\.(\d)\.layer\.", r"stages.\1."),
    (r"^encoder\.layer\.(\d)\.downsampling_layer\.", r"stages.\1.0."),
    (r"^encoder\.layer\.(\d)\.", r"stages.\1.1."),
    (r"^conv_stem\.", "stem."),
    (r"^conv_1x1_exp\.", "head."),
    (r"\.expand_1x1\.", ".expand."),
    (r"\.conv_3x3\.", ".depthwise."),
    (r"\.reduce_1x1\.", ".project."),
    (r"\.conv_kxk\.", ".local."),
    (r"\.conv_1x1\.convolution\.", ".to_tokens."),
    (r"\.conv_projection\.", ".project."),
    (r"\.fusion\.", ".fuse."),
    (r"\.convolution\.", ".conv."),
    (r"\.normalization\.", ".norm."),
    (r"\.transformer\.layer\.", ".layers."),
    (r"\.layernorm_before\.", ".norm1."),
    (r"\.layernorm_after\.", ".norm2."),
    (r"\.layernorm\.", ".norm."),
    (r"\.attention\.attention\.", ".attn."),
    (r"\.attention\.output\.dense\.", ".attn.proj."),
    (r"\.intermediate\.dense\.", ".ffn.0."),
    (r"\.output\.dense\.", ".ffn.2."),
)
_FROM_CVNETS = (
    (r"^encoder\.", ""),
    (r"^conv_1\.block\.", "stem."),
    *((rf"^layer_{stage}\.", f"stages.{stage - 1}.") for stage in range(1, 6)),
    (r"^conv_1x1_exp\.block\.", "head."),
    (r"^classifier\.fc\.", "classifier."),
    (r"\.block\.exp_1x1\.block\.", ".expand."),
    (r"\.block\.conv_3x3\.block\.", ".depthwise."),
    (r"\.block\.red_1x1\.block\.", ".project."),
    (r"\.local_rep\.conv_3x3\.block\.", ".local."),
    (r"\.local_rep\.conv_1x1\.block\.conv\.", ".to_tokens."),
    (r"\.global_rep\.(\d)\.pre_norm_mha\.0\.", r".layers.\1.norm1."),
    (r"\.global_rep\.(\d)\.pre_norm_mha\.1\.qkv_proj\.", r".layers.\1.attn.qkv."),
    (r"\.global_rep\.(\d)\.pre_norm_mha\.1\.out_proj\.", r".layers.\1.attn.proj."),
    (r"\.global_rep\.(\d)\.pre_norm_ffn\.0\.", r".layers.\1.norm2."),
    (r"\.global_rep\.(\d)\.pre_norm_ffn\.1\.", r".layers.\1.ffn.0."),
    (r"\.global_rep\.(\d)\.pre_norm_ffn\.4\.", r".layers.\1.ffn.2."),
    (r"\.global_rep\.\d\.", ".norm."),
    (r"\.conv_proj\.block\.", ".project."),
    (r"\.fusion\.block\.", ".fuse."),
)


def _renamed(state: dict[str, Tensor], rewrites) -> dict[str, Tensor]:
    renamed = {}
    for name, value in state.items():
        for pattern, ours in rewrites:
            name = re.sub(pattern, ours, name)
        renamed[name] = value
    return renamed


def _from_transformers(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Renamed, and query, key and value, which are layers of their own there, put in one."""
    state = _renamed(state, _FROM_TRANSFORMERS)
    for name in [name for name in state if ".attn.query." in name]:
        parts = [name.replace(".query.", f".{part}.") for part in ("query", "key", "value")]
        shapes = {state[part].shape if part in state else None for part in parts}
        if len(shapes) == 1 and shapes != {torch.Size()}:  # others are refused later, by name
            state[name.replace(".query.", ".qkv.")] = torch.cat([state.pop(p) for p in parts])
    return state


@dataclass(frozen=True)
class Layout:
    """How a project names the tensors of a MobileViT, and what network and pixels they are for."""

    name: str
    to_ours: Callable[[dict], dict]  # a state dict of that project -> one with our names
    heads: int | None = 4  # attention heads in every block; None: the variant's own
    bgr: bool = False  # whether the weights take blue, green, red
    mean: tuple[float, ...] = (0.0, 0.0, 0.0)  # of pixels in [0, 1], per channel
    std: tuple[float, ...] = (1.0, 1.0, 1.0)


LAYOUTS = (
    Layout("mobilevit.py", dict, heads=None, mean=cifar10.MEAN, std=cifar10.STD),
    Layout("timm", from_timm),
    Layout("transformers", _from_transformers, bgr=True),
    Layout("ml-cvnets", partial(_renamed, rewrites=_FROM_CVNETS), bgr=True),
)


def read_weights(path, name: str, heads=None) -> tuple[nn.Module, Layout]:
    """The network `name` with the weights in a file, in evaluation mode, and the file's layout.

    The file is .safetensors or a torch file of tensors: a state dict, as it is or under one of the
    names in WRAPPERS. The number of classes is that of the classifier's rows. `heads` overrides
    the attention heads of the layout. Raises BadInput for everything that does not fit.
    """
    state = _read_state(path)
    expected = _shapes(name)
    layout, state = _recognised(state, expected, path)
    if "classifier.weight" not in state or state["classifier.weight"].dim() != 2:
        raise BadInput(f"{path} has the names of {layout.name}, but no classifier's weights")
    _require_variant(state, name, path)
    for counter in expected:
        if counter.endswith(".num_batches_tracked"):  # not needed, and often left out
            state.setdefault(counter, torch.tensor(0))
    heads = layout.heads if heads is None else heads
    try:
        network = build(name, num_classes=len(state["classifier.weight"]), heads=heads)
    except ValueError as error:
        raise BadInput(f"{path}: {error}") from error
    load_state(network, state, f"{path}, with the names of {layout.name} turned into ours,")
    if layout.bgr:
        network.stem.conv.weight.data = network.stem.conv.weight.data.flip(1)
    return network.eval().to(memory_format=torch.channels_last), layout


def as_checkpoint(network: nn.Module, name: str, layout: Layout, classes=None, source="") -> dict:
    """A checkpoint of format 2 for a network that `read_weights` read from the file `source`.

    `classes` are the names of its classes, by default "class 0" and so on.
    """
    settings = settings_of(network)
    n = settings["num_classes"]
    classes = [f"class {k}" for k in range(n)] if classes is None else list(classes)
    if len(classes) != n:
        raise BadInput(f"the weights are for {n} classes, but {len(classes)} are named")
    return {
        "format": FORMAT,
        "model": name,
        "settings": settings,
        "task": "imagefolder",
        "classes": classes,
        "img_size": IMG_SIZE,
        "state_dict": network.state_dict(),
        "val_accuracy_pct": None,
        "test_accuracy_pct": None,
        "epoch": 0,
        "config": {"weights": str(source), "layout": layout.name},
        "normalize": {"mean": list(layout.mean), "std": list(layout.std)},
    }


def _read_state(path) -> dict[str, Tensor]:
    """The state dict in a file, out of its wrapper and without prefixes."""
    if Path(path).suffix == ".safetensors":
        try:
            state = load_file(path)
        except (OSError, SafetensorError) as error:
            raise BadInput(f"{path} is not a readable .safetensors file: {error}") from error
    else:
        state = read_tensors(path)
        if "state_dict" in state and ("settings" in state or "heads" in state):
            raise BadInput(f"{path} is a checkpoint of this project: give it as --checkpoint")
        wrapper = next((name for name in WRAPPERS if isinstance(state.get(name), dict)), None)
        state = state[wrapper] if wrapper else state
    mapping(tensor)(state, str(path))
    for name, value in state.items():
        if value.dim() and not value.is_floating_point():
            raise BadInput(f"{path}: {name} is {value.dtype}, but weights should be floats")
    return without_prefix({n: t for n, t in state.items() if not IGNORED.fullmatch(n)})


def _shapes(name: str) -> dict[str, torch.Size]:
    """The shape of every tensor of the network `name` with one class, by the tensor's name."""
    with torch.device("meta"):
        return {n: t.shape for n, t in build(name, num_classes=1).state_dict().items()}


def _recognised(state: dict, expected: dict, path) -> tuple[Layout, dict]:
    """The layout whose names fit most tensors, and the state dict with our names."""
    renamed = [(layout, layout.to_ours(state)) for layout in LAYOUTS]
    layout, ours = max(renamed, key=lambda pair: len(pair[1].keys() & expected.keys()))
    if 2 * len(ours.keys() & expected.keys()) < len(expected):
        first = f", its first name is {next(iter(state))}" if state else ""
        raise BadInput(
            f"{path} holds no MobileViT with the names of "
            f"{', '.join(layout.name for layout in LAYOUTS)}: it has {len(state)} tensors{first}"
        )
    return layout, ours


def _require_variant(state: dict, name: str, path) -> None:
    """Raise BadInput if the shapes are those of another variant than `name`."""

    def fits(variant: str) -> bool:
        body = {n: s for n, s in _shapes(variant).items() if not n.startswith("classifier.")}
        return all(n not in state or state[n].shape == shape for n, shape in body.items())

    if not fits(name):
        for other in map(full_name, VARIANTS):
            if fits(other):
                raise BadInput(f"{path}: these are weights of {other}, not of {name}")
