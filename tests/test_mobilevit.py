"""The model against timm's, and through every tracer."""

import io
import warnings

import onnxruntime
import pytest
import timm
import torch
from torch import nn

from mobilevit import VARIANTS, MobileViT, fold, from_timm, unfold


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


def test_unfold_puts_equal_positions_in_one_sequence():
    x = torch.arange(2 * 3 * 4 * 6).view(2, 3, 4, 6)  # [B, d, H, W]
    tokens = unfold(x)
    assert tokens.shape == (2 * 4, 6, 3)
    for b in range(2):
        for i in range(2):
            for j in range(2):
                patches = [x[b, :, i + 2 * r, j + 2 * c] for r in range(2) for c in range(3)]
                assert torch.equal(tokens[4 * b + 2 * i + j], torch.stack(patches))
    assert torch.equal(fold(tokens, x), x)


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
        (("xxs", 10, (1, 1)), "one number or three"),
    ],
)
def test_impossible_networks_are_refused(args, says):
    with pytest.raises(ValueError, match=says):
        MobileViT(*args)
