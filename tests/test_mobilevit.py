"""The model against timm's, and through every tracer."""

import io
import warnings

import onnxruntime
import pytest
import timm
import torch
from torch import nn

from mobilevit import VARIANTS, MobileViT, fit_patches, fold, from_timm, unfold


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.mark.parametrize(
    "variant, num_classes, expected",
    [
        ("xxs", 10, 954_234),
        ("xs", 10, 1_936_698),
        ("s", 10, 4_944_042),
        ("xxs", 1000, 1_272_024),
        ("xs", 1000, 2_317_848),
        ("s", 1000, 5_578_632),
    ],
)
def test_parameter_count(variant, num_classes, expected):
    assert sum(p.numel() for p in MobileViT(variant, num_classes).parameters()) == expected


@pytest.mark.parametrize("variant", VARIANTS)
def test_equals_timm(variant):
    theirs = timm.create_model(f"mobilevit_{variant}", num_classes=10).eval()
    for module in theirs.modules():  # statistics as after training, not 0 and 1
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.1)
            module.running_var.uniform_(0.5, 1.5)
    ours = MobileViT(variant, 10, heads=4).eval()
    ours.load_state_dict(from_timm(theirs.state_dict()))
    for size in ((256, 256), (192, 192), (224, 224), (200, 136)):
        x = torch.randn(1, 3, *size)
        with torch.inference_mode():
            torch.testing.assert_close(ours(x), theirs(x), rtol=0, atol=1e-5)


@pytest.mark.parametrize("p", [1, 2, 3])
def test_unfold_puts_equal_positions_in_one_sequence(p):
    x = torch.arange(2 * 5 * 2 * p * 3 * p).view(2, 5, 2 * p, 3 * p)  # [B, d, H, W]
    tokens = unfold(x, p)
    assert tokens.shape == (2 * p * p, 6, 5)
    for b in range(2):
        for i in range(p):
            for j in range(p):
                patches = [x[b, :, i + p * r, j + p * c] for r in range(2) for c in range(3)]
                assert torch.equal(tokens[p * p * b + p * i + j], torch.stack(patches))
    assert torch.equal(fold(tokens, x, p), x)


@pytest.mark.parametrize("side, p, fitted", [(8, 2, 8), (7, 2, 8), (32, 3, 33), (10, 4, 12)])
def test_maps_are_stretched_to_whole_patches(side, p, fitted):
    assert fit_patches(torch.zeros(1, 2, side, 12), p).shape == (1, 2, fitted, 12)


@pytest.mark.parametrize("patches", [1, 3, (8, 4, 2)])
def test_patches_change_the_sequences_and_no_weight(patches):
    usual, other = MobileViT("xxs").eval(), MobileViT("xxs", patches=patches).eval()
    other.load_state_dict(usual.state_dict())
    lengths = []
    for stage in other.stages[2:]:
        stage[1].norm.register_forward_hook(lambda m, args, y: lengths.append(y.shape[1]))
    x = torch.randn(1, 3, 96, 96)  # maps of 12, 6 and 3 pixels a side
    assert not torch.allclose(other(x), usual(x), atol=1e-5)
    assert lengths == {1: [144, 36, 9], 3: [16, 4, 1], (8, 4, 2): [4, 4, 4]}[patches]
    assert MobileViT(**other.settings).patches == other.patches


@pytest.mark.parametrize("stride, last", [(32, (16, 32)), (16, (16, 16)), (8, (8, 8))])
def test_features_have_the_strides_of_their_stages(stride, last):
    model = MobileViT("xxs", num_classes=None, output_stride=stride)
    maps = model.features(torch.zeros(1, 3, 128, 96))
    strides = (2, 4, 8, *last)
    channels = VARIANTS["xxs"].stages
    assert [m.shape[1:] for m in maps] == [
        (c, 128 // s, 96 // s) for c, s in zip(channels, strides)
    ]


@pytest.mark.parametrize(
    "variant, expected", [("xxs", 924_784), ("xs", 1_895_216), ("s", 4_833_952)]
)
def test_without_classes_the_features_remain(variant, expected):
    whole, trunk = MobileViT(variant).eval(), MobileViT(variant, num_classes=None).eval()
    assert sum(p.numel() for p in trunk.parameters()) == expected
    trunk.load_state_dict(whole.state_dict(), strict=False)
    x = torch.randn(1, 3, 64, 64)
    logits = whole.classifier(whole.head(trunk.features(x)[-1]).mean((2, 3)))
    torch.testing.assert_close(logits, whole(x))


def test_heads_are_those_of_the_shipped_weights_unless_others_are_asked_for():
    """No weight shows them, and others compute something else."""
    heads = {name: MobileViT(name).heads for name in VARIANTS}
    assert heads == {"xxs": (1, 1, 1), "xs": (1, 2, 3), "s": (1, 2, 3)}


def test_fresh_weights_keep_the_variance_of_gradients():
    """Of He et al., ICCV 2015, equation 14: 2 over what a filter's inputs are read by."""
    model = MobileViT("xxs")
    for conv in (model.head.conv, model.stages[0][0].expand.conv, model.stages[2][1].fuse.conv):
        wanted = (2 / (conv.out_channels * conv.kernel_size[0] ** 2)) ** 0.5
        assert conv.weight.std().item() == pytest.approx(wanted, rel=0.1)
    for linear in (model.classifier, model.stages[2][1].layers[0].attn.qkv):
        assert linear.weight.std().item() == pytest.approx(0.02, rel=0.1)
        assert not linear.bias.any()


@pytest.fixture
def traced():
    """A model, an example batch of 2 and what it answers to another batch, of 3."""
    model = MobileViT("xxs", 10).eval()
    x = torch.randn(3, 3, 72, 64)  # 72 / 8 is odd: the map is stretched to fit the patches
    return model, torch.randn(2, 3, 72, 64), x, model(x).detach()


def test_fx(traced):
    model, _, x, expected = traced
    torch.testing.assert_close(torch.fx.symbolic_trace(model)(x), expected)


def test_jit_trace(traced):
    model, example, x, expected = traced
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # image sizes become constants, as they should
        torch.testing.assert_close(torch.jit.trace(model, example)(x), expected)


def test_export(traced):
    model, example, x, expected = traced
    batch = torch.export.Dim("batch")
    program = torch.export.export(model, (example,), dynamic_shapes=({0: batch},))
    torch.testing.assert_close(program.module()(x), expected)


@pytest.mark.parametrize("dynamo", [True, False])
def test_onnx(traced, dynamo):
    model, example, x, expected = traced
    if dynamo:
        batch = {"dynamic_shapes": ({0: torch.export.Dim("batch")},)}
    else:
        batch = {"dynamic_axes": {"x": {0: "batch"}, "logits": {0: "batch"}}}
    file = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(
            model,
            (example,),
            file,
            dynamo=dynamo,
            input_names=["x"],
            output_names=["logits"],
            verbose=False,
            **batch,
        )
    session = onnxruntime.InferenceSession(file.getvalue(), providers=["CPUExecutionProvider"])
    (logits,) = session.run(None, {"x": x.numpy()})
    torch.testing.assert_close(torch.from_numpy(logits), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("shape", [(3, 64, 64), (1, 1, 64, 64), (1, 3, 31, 64), (1, 3, 64, 16)])
def test_other_inputs_are_refused(shape):
    with pytest.raises(ValueError, match=r"\[B, 3, H, W\]"):
        MobileViT("xxs")(torch.zeros(shape))


@pytest.mark.parametrize(
    "args, says",
    [
        (("xl",), "unknown variant"),
        (("xxs", 10, 3), "do not divide"),
        (("xxs", 10, 0), "divide"),
        (("xxs", 0), "num_classes"),
        (("xxs", 10, (1, 1)), "one whole number or three"),
        (("xxs", 10, 1, (2, 2)), "one whole number or three"),
        (("xxs", 10, 1, 0), "patches"),
        (("xxs", 10, 1, 2, 4), "output_stride"),
    ],
)
def test_impossible_networks_are_refused(args, says):
    with pytest.raises(ValueError, match=says):
        MobileViT(*args)
