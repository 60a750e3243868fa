"""Weights with other projects' names, against the networks of those projects."""

import re

import pytest
import safetensors.torch
import timm
import torch
from torch import nn

from lab.cli import BadInput
from lab.models.checkpoint import load_checkpoint, model_from_checkpoint, save_checkpoint
from lab.models.foreign import as_checkpoint, family_of, read_weights
from mobilevit import VARIANTS, MobileViT

N = 7  # classes
NAME = "mobilevit_xxs"


def randomized(model: nn.Module, seed=0) -> nn.Module:
    """With every weight and statistic drawn anew, so that no two tensors can be confused."""
    generator = torch.Generator().manual_seed(seed)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.1, generator=generator)
            module.running_var.uniform_(0.5, 1.5, generator=generator)
        if isinstance(module, nn.BatchNorm2d | nn.LayerNorm):
            module.weight.data.uniform_(0.5, 1.5, generator=generator)
            module.bias.data.normal_(0, 0.1, generator=generator)
        if isinstance(module, nn.Conv2d):  # transformers' own start is so small that images vanish
            nn.init.kaiming_normal_(module.weight, generator=generator)
        if isinstance(module, nn.Linear):
            module.weight.data.normal_(0, 0.1, generator=generator)
            module.bias.data.normal_(0, 0.1, generator=generator)
    return model.eval()


def transformers_network(variant: str, head="ImageClassification", **config) -> nn.Module:
    transformers = pytest.importorskip("transformers")
    v = VARIANTS[variant]
    config = transformers.MobileViTConfig(
        hidden_sizes=list(v.dims),
        neck_hidden_sizes=[v.stem, *v.stages, v.head],
        expand_ratio=float(v.expansion),
        num_labels=N,
        **config,
    )
    return randomized(getattr(transformers, f"MobileViTFor{head}")(config))


def cvnets_names(state: dict) -> dict:
    """Our state dict with the names of ml-cvnets, part by part as its code nests them."""
    renamed = {}
    for name, value in state.items():
        stage = re.match(r"stages\.(\d)\.(\d)\.", name)
        if stage is None:
            name = name.replace("stem.", "conv_1.block.").replace("head.", "conv_1x1_exp.block.")
            renamed[name.replace("classifier.", "classifier.fc.")] = value
            continue
        i, b = int(stage[1]), int(stage[2])
        rest, prefix = name[stage.end() :].split("."), f"layer_{i + 1}.{b}."
        last_norm = (2, 4, 3)[i - 2]
        match rest:
            case ["expand" | "depthwise" | "project" as part, *leaf] if i < 2 or b == 0:
                part = {"expand": "exp_1x1", "depthwise": "conv_3x3", "project": "red_1x1"}[part]
                new = f"block.{part}.block.{'.'.join(leaf)}"
            case ["local", *leaf]:
                new = f"local_rep.conv_3x3.block.{'.'.join(leaf)}"
            case ["to_tokens", leaf]:
                new = f"local_rep.conv_1x1.block.conv.{leaf}"
            case ["layers", j, "norm1", leaf]:
                new = f"global_rep.{j}.pre_norm_mha.0.{leaf}"
            case ["layers", j, "attn", "qkv" | "proj" as part, leaf]:
                part = {"qkv": "qkv_proj", "proj": "out_proj"}[part]
                new = f"global_rep.{j}.pre_norm_mha.1.{part}.{leaf}"
            case ["layers", j, "norm2", leaf]:
                new = f"global_rep.{j}.pre_norm_ffn.0.{leaf}"
            case ["layers", j, "ffn", k, leaf]:
                new = f"global_rep.{j}.pre_norm_ffn.{ {'0': 1, '2': 4}[k] }.{leaf}"
            case ["norm", leaf]:
                new = f"global_rep.{last_norm}.{leaf}"
            case ["project", *leaf]:
                new = f"conv_proj.block.{'.'.join(leaf)}"
            case ["fuse", *leaf]:
                new = f"fusion.block.{'.'.join(leaf)}"
        renamed[prefix + new] = value
    return renamed


def saved(path, state):
    save = safetensors.torch.save_file if path.suffix == ".safetensors" else torch.save
    save(state, path)
    return path


def images(side=64) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.rand(2, 3, side, side + 32, generator=generator, dtype=torch.float64)


def assert_computes(network, theirs, bgr=False):
    """Require `network` to give on RGB what `theirs` gives on RGB or BGR, and colours to matter.

    In double precision, where rounding can't hide a difference.
    """
    network.double()
    if isinstance(theirs, nn.Module):
        theirs.double()
    with torch.inference_mode():
        flipped, straight = (
            getattr(y, "logits", y) for y in map(theirs, (images().flip(1), images()))
        )
        expected, other = (flipped, straight) if bgr else (straight, flipped)
        torch.testing.assert_close(network(images()), expected, rtol=0, atol=1e-5)
        assert (expected - other).abs().max() > 0.1


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_equals_timm(tmp_path, variant, suffix):
    theirs = randomized(timm.create_model(f"mobilevit_{variant}", num_classes=N))
    path = saved(tmp_path / f"w{suffix}", theirs.state_dict())
    network, layout = read_weights(path, f"mobilevit_{variant}")
    assert (layout.name, network.heads, network.training) == ("timm", (4, 4, 4), False)
    assert_computes(network, theirs)


@pytest.mark.parametrize("variant", VARIANTS)
def test_equals_transformers_which_takes_blue_green_red(tmp_path, variant):
    theirs = transformers_network(variant)
    path = saved(tmp_path / "model.safetensors", theirs.state_dict())
    network, layout = read_weights(path, f"mobilevit_{variant}")
    assert (layout.name, network.num_classes) == ("transformers", N)
    assert_computes(network, theirs, bgr=True)


@pytest.mark.parametrize("stride", [16, 8])
def test_larger_maps_equal_those_of_transformers(stride):
    theirs = transformers_network("xxs", output_stride=stride).double()
    ours = MobileViT("xxs", N, heads=4, output_stride=stride).double().eval()
    transformers_layout = family_of(NAME).layouts[2]
    ours.load_state_dict(transformers_layout.to_ours(theirs.state_dict()))
    with torch.inference_mode():
        expected = theirs(images(96), output_hidden_states=True).hidden_states
        maps = ours.features(images(96))
    assert maps[-1].shape[-2:] == (96 // stride, 128 // stride)
    for a, b in zip(maps, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-9)


@pytest.mark.parametrize("variant", VARIANTS)
def test_equals_the_network_whose_weights_had_cvnets_names(tmp_path, variant):
    ours = randomized(MobileViT(variant, N, heads=4))
    path = saved(tmp_path / "w.pt", cvnets_names(ours.state_dict()))
    network, layout = read_weights(path, f"mobilevit_{variant}")
    assert layout.name == "ml-cvnets"
    assert_computes(network, ours, bgr=True)


@pytest.mark.parametrize("variant", VARIANTS)
def test_our_own_names_mean_the_variants_heads(tmp_path, variant):
    ours = randomized(MobileViT(variant, N))
    network, layout = read_weights(
        saved(tmp_path / "w.pth", ours.state_dict()), f"mobilevit_{variant}"
    )
    assert (layout.name, network.heads) == ("mobilevit.py", ours.heads)
    assert_computes(network, ours)


def test_heads_that_are_given_win(tmp_path):
    path = saved(tmp_path / "w.pth", MobileViT("xxs", N).state_dict())
    assert read_weights(path, NAME, heads=2)[0].heads == (2, 2, 2)
    with pytest.raises(BadInput, match="w.pth.* 7 heads do not divide"):
        read_weights(path, NAME, heads=7)


@pytest.mark.parametrize("wrapper", ["state_dict", "model", "ema"])
@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod.module."])
def test_wrappers_prefixes_and_halves_as_scripts_save_them(tmp_path, wrapper, prefix):
    theirs = randomized(timm.create_model(NAME, num_classes=N)).half()
    state = {prefix + name: tensor for name, tensor in theirs.state_dict().items()}
    path = saved(tmp_path / "w.pth", {"epoch": 3, wrapper: state, "optimizer": {"lr": 0.1}})
    network, _ = read_weights(path, NAME)
    assert network.stem.conv.weight.dtype == torch.float32
    assert_computes(network, theirs)


def test_averaged_weights_come_before_the_last_ones(tmp_path):
    last, averaged = (randomized(MobileViT("xxs", N), seed) for seed in (0, 1))
    averaged = torch.optim.swa_utils.AveragedModel(averaged).state_dict()
    path = saved(tmp_path / "w.pth", {"model": last.state_dict(), "model_ema": averaged})
    network, _ = read_weights(path, NAME)
    torch.testing.assert_close(network.classifier.weight, averaged["module.classifier.weight"])


def test_counts_of_batches_may_be_left_out(tmp_path):
    state = timm.create_model(NAME, num_classes=N).state_dict()
    state = {n: t for n, t in state.items() if not n.endswith("num_batches_tracked")}
    assert read_weights(saved(tmp_path / "w.pth", state), NAME)[1].name == "timm"


@pytest.mark.parametrize("layout", family_of(NAME).layouts, ids=lambda layout: layout.name)
def test_as_checkpoint_gives_one_that_can_be_read_again(tmp_path, layout):
    ours = randomized(MobileViT("xxs", N)).state_dict()
    state = {
        "mobilevit.py": lambda: ours,
        "timm": lambda: randomized(timm.create_model(NAME, num_classes=N)).state_dict(),
        "transformers": lambda: transformers_network("xxs").state_dict(),
        "ml-cvnets": lambda: cvnets_names(ours),
    }[layout.name]()
    path = saved(tmp_path / "w.pth", state)
    network, read = read_weights(path, NAME)
    assert read == layout
    save_checkpoint(tmp_path / "best.pth", as_checkpoint(network, NAME, read, source=path))
    again, checkpoint = model_from_checkpoint(tmp_path / "best.pth")
    assert_computes(again, network)
    assert checkpoint["classes"][0] == "class 0" and checkpoint["task"] == "imagefolder"
    assert checkpoint["normalize"]["mean"] == list(layout.mean)
    assert load_checkpoint(tmp_path / "best.pth")["config"]["layout"] == layout.name


def test_as_checkpoint_wants_a_name_for_each_class(tmp_path):
    network, layout = read_weights(
        saved(tmp_path / "w.pth", MobileViT("xxs", 2).state_dict()), NAME
    )
    assert as_checkpoint(network, NAME, layout, ("cat", "dog"))["classes"] == ["cat", "dog"]
    with pytest.raises(BadInput, match="for 2 classes, but 1 are named"):
        as_checkpoint(network, NAME, layout, ("cat",))


def without(name):
    return lambda state: state.pop(name) is None


def changed(name, tensor):
    return lambda state: state.update({name: tensor})


@pytest.mark.parametrize(
    "change, says",
    [
        (without("final_conv.conv.weight"), "timm .* lacks head.conv.weight"),
        (without("head.fc.weight"), "timm, but no classifier's weights"),
        (changed("head.fc.weight", torch.zeros(0, 320)), "num_classes must be at least 1"),
        (changed("head.fc.weight", torch.zeros(N, 3)), r"classifier.weight as \[7, 3\]"),
        (changed("head.fc.bias", torch.zeros(3)), r"classifier.bias as \[3\] instead of \[7\]"),
        (changed("extra.weight", torch.zeros(1)), "has extra.weight, which the network has not"),
        (changed("stem.conv.weight", torch.full((16, 3, 3, 3), torch.nan)), "not finite"),
        (changed("stem.bn.bias", torch.zeros(16, dtype=torch.int8)), "torch.int8"),
        (changed("stem.bn.bias", "zero"), "stem.bn.bias is a str"),
        (lambda state: state.clear(), "it has 0 tensors"),
        (changed(3, torch.zeros(1)), "is 3, but should be text"),
    ],
)
def test_weights_that_do_not_fit_are_refused_in_one_line(tmp_path, change, says):
    state = dict(timm.create_model(NAME, num_classes=N).state_dict())
    change(state)
    with pytest.raises(BadInput, match=f"w.pth.*{says}") as error:
        read_weights(saved(tmp_path / "w.pth", state), NAME)
    assert "\n" not in str(error.value) and len(str(error.value)) < 400


@pytest.mark.parametrize("variant", ["xs", "s"])
def test_weights_of_another_variant_are_named(tmp_path, variant):
    path = saved(tmp_path / "w.pth", timm.create_model(f"mobilevit_{variant}").state_dict())
    with pytest.raises(BadInput, match=f"these are weights of mobilevit_{variant}, not of {NAME}"):
        read_weights(path, NAME)


def test_other_networks_and_files_are_refused_in_one_line(tmp_path):
    state = timm.create_model("resnet18").state_dict()
    with pytest.raises(BadInput, match="no MobileViT .* first name is conv1.weight"):
        read_weights(saved(tmp_path / "w.pth", state), NAME)
    for name in ("broken.safetensors", "broken.pth"):
        (tmp_path / name).write_bytes(b"no tensors")
        for path in (tmp_path / name, tmp_path / f"absent {name}"):
            with pytest.raises(BadInput, match=path.name):
                read_weights(path, NAME)
    ours = {"state_dict": MobileViT("xxs").state_dict(), "model": "xxs", "heads": [1, 1, 1]}
    with pytest.raises(BadInput, match="give it as --checkpoint"):
        read_weights(saved(tmp_path / "w.pth", ours), NAME)


@pytest.mark.parametrize("key", [None, torch.zeros(()), torch.zeros(64, 32)])
def test_transformers_attention_with_a_part_that_does_not_fit(tmp_path, key):
    state = transformers_network("xxs").state_dict()
    name = "mobilevit.encoder.layer.2.transformer.layer.0.attention.attention.key.weight"
    state = {n: t for n, t in state.items() if n != name} | ({} if key is None else {name: key})
    with pytest.raises(BadInput, match="transformers .* lacks stages.2.1.layers.0.attn.qkv.weight"):
        read_weights(saved(tmp_path / "w.pth", state), NAME)


def test_detection_and_segmentation_networks_are_no_classifiers(tmp_path):
    body = MobileViT("xxs").state_dict()
    body = {n: t for n, t in body.items() if not n.startswith(("head.", "classifier."))}
    body = {f"encoder.{name}": tensor for name, tensor in cvnets_names(body).items()}
    with pytest.raises(BadInput, match="ml-cvnets, but no classifier's weights"):
        read_weights(saved(tmp_path / "w.pth", body), NAME)


def test_a_segmentation_head_beside_the_classifier_is_left_out(tmp_path):
    transformers = pytest.importorskip("transformers")
    config = transformers.MobileViTConfig(num_labels=N)
    state = transformers.MobileViTForSemanticSegmentation(config).state_dict()
    with pytest.raises(BadInput, match="transformers, but no classifier's weights"):
        read_weights(saved(tmp_path / "w.pth", state), "mobilevit_s")
    state |= transformers.MobileViTForImageClassification(config).state_dict()
    assert read_weights(saved(tmp_path / "w.pth", state), "mobilevit_s")[0].num_classes == N
