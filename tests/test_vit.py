"""ViT and DeiT against timm and transformers, and their commands' bad input."""

import pytest
import timm
import torch
from test_foreign import randomized, saved

from lab.cli import BadInput
from lab.models import VIT, build, default_img_size, settings_of
from lab.models.checkpoint import model_from_checkpoint, save_checkpoint
from lab.models.foreign import as_checkpoint, family_of, load_timm, read_weights, timm_layout
from lab.models.vit import ViT, from_timm
from lab.subject import load_subject
from lab.training.optimizer import weight_groups
from lab.training.start import fresh_model, heads_to_build, load_start
from mobilevit import AttentionCore, MobileViT

N = 7  # classes
TINY = "deit_tiny_patch16_224"


def timm_cifar():
    """What timm's class makes of the sizes of vit_cifar."""
    sizes = {"img_size": 32, "patch_size": 4, "embed_dim": 192, "depth": 9, "num_heads": 3}
    return timm.models.VisionTransformer(**sizes, num_classes=N)


def with_positions(model):
    """`randomized`, and what is no layer's weight drawn anew as well."""
    for name, p in randomized(model).named_parameters():
        if "token" in name or "pos" in name:
            p.data.normal_(0, 0.5, generator=torch.Generator().manual_seed(len(name)))
    return model.eval()


def images(side):
    generator = torch.Generator().manual_seed(1)
    return torch.rand(1, 3, side, side, generator=generator, dtype=torch.float64)


def assert_computes(network, theirs, side):
    """Require equal logits in double precision, and every part of the image to matter."""
    x = images(side)
    with torch.inference_mode():
        ours, expected = (
            getattr(y, "logits", y) for y in (network.double()(x), theirs.double()(x))
        )
        torch.testing.assert_close(ours, expected, rtol=0, atol=1e-5)
        assert (ours - network(x.flip(-1))).abs().max() > 0.01


@pytest.mark.parametrize("name", VIT)
def test_has_the_parameters_of_timms(name):
    with torch.device("meta"):
        theirs = timm_cifar() if name == "vit_cifar" else timm.create_model(name, num_classes=N)
        ours = build(name, num_classes=N)
    count = [sum(p.numel() for p in model.parameters()) for model in (ours, theirs)]
    assert count[0] == count[1]
    assert sum(isinstance(module, AttentionCore) for module in ours.modules()) == len(ours.blocks)
    assert settings_of(ours) == {"num_classes": N}


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_equals_timm(tmp_path, suffix):
    theirs = with_positions(timm.create_model(TINY, num_classes=N))
    network, layout = read_weights(saved(tmp_path / f"w{suffix}", theirs.state_dict()), TINY)
    assert (layout.name, layout.mean, network.training) == ("timm", (0.485, 0.456, 0.406), False)
    assert_computes(network, theirs, 224)


def test_the_widths_of_a_large_one_equal_timms():
    """Two blocks of ViT-B: the others are as these."""
    theirs = with_positions(timm.create_model("vit_base_patch16_224", num_classes=N, depth=2))
    network = ViT("vit_base_patch16_224", N)
    network.blocks = network.blocks[:2]
    network.load_state_dict(from_timm(theirs.state_dict()))
    assert_computes(network.eval(), theirs, 224)


@pytest.mark.parametrize("names", ["in memory", "in files"])
def test_equals_transformers(tmp_path, names):
    transformers = pytest.importorskip("transformers")
    v = VIT["vit_cifar"]
    config = transformers.ViTConfig(
        image_size=v.img_size,
        patch_size=v.patch,
        hidden_size=v.dim,
        num_hidden_layers=v.layers,
        num_attention_heads=v.heads,
        intermediate_size=4 * v.dim,
        num_labels=N,
    )
    theirs = with_positions(transformers.ViTForImageClassification(config))
    if names == "in files":
        theirs.save_pretrained(tmp_path)
        path = tmp_path / "model.safetensors"
    else:
        path = saved(tmp_path / "w.safetensors", theirs.state_dict())
    network, layout = read_weights(path, "vit_cifar")
    assert layout.name == "transformers"
    assert_computes(network, theirs, 32)


NAMES = {name: name for name in (*VIT, "mobilevit_xxs", "mobilevit_xs", "mobilevit_s")}
NAMES["efficientnet_lite0"] = "tf_efficientnet_lite0"


@pytest.mark.parametrize("name", [name for name in NAMES if name != "vit_cifar"])
def test_pixels_are_those_that_timms_weights_take(name):
    config, layout = timm.models.get_pretrained_cfg(NAMES[name]), timm_layout(name)
    side = default_img_size(name)
    assert (layout.mean, layout.std) == (config.mean, config.std)
    assert config.input_size == (3, side, side)
    resize = layout.pixels()["resize"]
    assert resize["crop"] == pytest.approx(config.crop_pct) and not resize["stretch"]
    assert resize["interpolation"] == config.interpolation


def test_deits_of_transformers_are_resized_to_256_and_cut():
    """Their preprocessing resizes to 256 and cuts 224 out; that of ViTs only stretches to 224."""
    layouts = {
        name: next(of for of in family_of(name).layouts if of.name == "transformers")
        for name in ("deit_tiny_patch16_224", "vit_base_patch16_224")
    }
    found = [layout.pixels()["resize"] for layout in layouts.values()]
    assert found[0] == {"crop": 224 / 256, "interpolation": "bicubic", "stretch": True}
    assert found[1] == {"crop": 1.0, "interpolation": "bilinear", "stretch": True}


def test_a_checkpoint_of_weights_from_elsewhere_is_read_again(tmp_path):
    theirs = with_positions(timm_cifar())
    path = saved(tmp_path / "w.pth", theirs.state_dict())
    network, layout = read_weights(path, "vit_cifar")
    checkpoint = as_checkpoint(network, "vit_cifar", layout, source=path)
    assert checkpoint["img_size"] == 32
    save_checkpoint(tmp_path / "best.pth", checkpoint)
    assert_computes(model_from_checkpoint(tmp_path / "best.pth")[0], theirs, 32)
    save_checkpoint(tmp_path / "best.pth", checkpoint | {"img_size": 64})
    with pytest.raises(BadInput, match="best.pth: the network takes images of 32x32 pixels, not"):
        model_from_checkpoint(tmp_path / "best.pth")


def test_weights_of_others_are_refused_by_name(tmp_path):
    tiny = saved(tmp_path / "tiny.pth", timm.create_model(TINY, num_classes=N).state_dict())
    with pytest.raises(BadInput, match=f"these are weights of {TINY}, not of deit_small"):
        read_weights(tiny, "deit_small_patch16_224")
    with pytest.raises(BadInput, match="--heads is for MobileViT, not for deit_tiny"):
        read_weights(tiny, TINY, heads=4)
    distilled = timm.create_model("deit_tiny_distilled_patch16_224", num_classes=N).state_dict()
    with pytest.raises(BadInput, match="has dist_token, which the network has not"):
        read_weights(saved(tmp_path / "d.pth", distilled), TINY)
    mobilevit = saved(tmp_path / "m.pth", MobileViT("xxs").state_dict())
    with pytest.raises(BadInput, match="m.pth holds no ViT with the names of lab/models/vit.py"):
        read_weights(mobilevit, TINY)


def test_other_sizes_and_no_classes_are_refused():
    network = ViT("vit_cifar").eval()
    for shape in ((1, 3, 64, 64), (1, 1, 32, 32), (3, 32, 32)):
        with pytest.raises(ValueError, match=r"takes images as \[B, 3, 32, 32\], got"):
            network(torch.rand(shape))
    for settings in ({"num_classes": 0}, {"heads": 2}):
        with pytest.raises(ValueError, match="vit_cifar|num_classes"):
            build("vit_cifar", **settings)
    with pytest.raises(BadInput, match="vit_cifar: the network takes images of 32x32 pixels"):
        fresh_model("vit_cifar", N, None, 0, sides=[32, 64])


def test_starts_that_it_does_not_know_are_refused(tmp_path, monkeypatch):
    no_start = {"heads": None, "widened": None, "pretrained": False}
    assert heads_to_build("vit_cifar", **no_start) is None
    for change, says in (
        ({"heads": 2}, "--heads is for MobileViT, not for vit_cifar"),
        ({"widened": "a.pth"}, "--widen is for MobileViT, not for vit_cifar"),
        ({"pretrained": True}, "timm has no weights for vit_cifar"),
    ):
        with pytest.raises(BadInput, match=says):
            heads_to_build("vit_cifar", **no_start | change)
    ours = ViT("vit_cifar", N)
    _, layout = read_weights(saved(tmp_path / "w.pth", ours.state_dict()), "vit_cifar")
    checkpoint = as_checkpoint(ours, "vit_cifar", layout) | {"task": "other"}
    save_checkpoint(tmp_path / "vit.pth", checkpoint)
    with pytest.raises(BadInput, match="--widen is for MobileViT, not for vit_cifar"):
        model = MobileViT("xxs", N)
        load_start(
            model, "mobilevit_xxs", widened=tmp_path / "vit.pth", task="synthetic", val_size=9
        )
    with pytest.raises(BadInput, match="--img-size: the network takes images of 32x32"):
        load_subject(tmp_path / "vit.pth", None, "synthetic", img_size=64)

    source = with_positions(timm.create_model(TINY))
    monkeypatch.setattr(timm, "create_model", lambda name, pretrained: source)
    pretrained = ViT(TINY, N)
    load_timm(pretrained, TINY)
    assert pretrained.positions.equal(source.pos_embed)
    assert pretrained.classifier.weight.shape == (N, 192)


def test_norms_have_timms_epsilon_and_fresh_weights_its_spread():
    torch.manual_seed(0)
    ours, theirs = ViT("vit_cifar"), timm.create_model("deit_tiny_patch16_224")
    epsilons = [
        {m.eps for m in model.modules() if isinstance(m, torch.nn.LayerNorm)}
        for model in (ours, theirs)
    ]
    assert epsilons[0] == epsilons[1]
    for name in ("positions", "blocks.0.attn.qkv.weight", "blocks.8.ffn.0.weight"):
        assert ours.get_parameter(name).std().item() == pytest.approx(0.02, rel=0.1)


def test_class_token_and_positions_do_not_decay():
    model = ViT("vit_cifar")
    decayed, rest = weight_groups(model, 0.1)
    assert {p.data_ptr() for p in rest["params"]} >= {
        model.class_token.data_ptr(),
        model.positions.data_ptr(),
    }
    assert all(p.ndim > 1 for p in decayed["params"])
    assert len(decayed["params"]) + len(rest["params"]) == len(list(model.parameters()))
