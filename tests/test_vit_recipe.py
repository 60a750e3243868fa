"""The quantizer of vision transformers, on networks of four projects."""

import json

import numpy as np
import onnxruntime
import pytest
import timm
import torch
from small import draw
from small_vits import CLASSES, SIDE, VITS, small_vit
from torch import nn

import ptq
from mobilevit import AttentionCore, MobileViT
from ptq.analysis.compare import logits_of
from ptq.export import to_onnx
from ptq.graph import captured
from ptq.layers import QuantizedAttentionCore, QuantizedLayer
from ptq.methods.ibert import IBertActivation
from ptq.packing import size_bytes
from ptq.recipe import Recipe
from ptq.recipes.vit import layers_of

BATCHES = [(draw(8, 3, SIDE, SIDE, seed=i), None) for i in range(3)]
X = BATCHES[0][0]


@pytest.fixture(scope="module", params=VITS)
def network(request):
    """A float network as its project made it, and taken apart."""
    closed = small_vit(request.param)
    return closed, ptq.open_attention(closed)


def logits(model, x=X):
    with torch.no_grad():
        return logits_of(model(x))


def test_attention_taken_apart_computes_the_same(network):
    closed, opened = network
    torch.testing.assert_close(logits(opened), logits(closed))
    assert sum(isinstance(module, AttentionCore) for module in opened.modules()) == 2
    assert not any(isinstance(module, nn.MultiheadAttention) for module in opened.modules())


def test_a_recipe_in_integers_leaves_no_norm_and_no_gelu_in_float(network):
    quantized = ptq.quantize(network[1], ptq.recipe("i-bert", network[1]), BATCHES)
    assert sum(isinstance(module, IBertActivation) for module in quantized.modules()) == 2
    left = {name for name, module in quantized.named_modules() if "GELU" in type(module).__name__}
    assert all(name.endswith(".layer") for name in left)  # those inside of ours


@pytest.mark.parametrize("bits, method", [(8, "tensor"), (4, "channel"), (8, "histogram")])
def test_it_is_quantized_saved_and_read_back(network, bits, method, tmp_path):
    _, model = network
    recipe = ptq.vit_recipe(model, bits, method, input_bits=8)
    quantized = ptq.quantize(model, recipe, BATCHES)
    linear = sum(type(module).forward is nn.Linear.forward for module in model.modules())
    layers = [m for m in quantized.modules() if isinstance(m, QuantizedLayer)]
    assert len(layers) == linear and {m.format.bits for m in layers} == {bits}
    cores = [m for m in quantized.modules() if isinstance(m, QuantizedAttentionCore)]
    assert len(cores) == 2 and all(core.inputs["q"].format.bits == 8 for core in cores)
    assert 0 < (logits(quantized) - logits(model)).square().mean() < logits(model).var()

    path = tmp_path / "vit.safetensors"
    ptq.save(quantized, recipe, path)
    read, again = ptq.load(path, model)
    assert again == recipe and torch.equal(logits(read), logits(quantized))
    # True bytes: codes of `bits` bits, and everything else as it was.
    rest = 4 * sum(p.numel() for p in model.parameters())
    codes = sum(m.codes.numel() for m in layers)
    least = rest - 4 * codes + codes * bits / 8
    assert path.stat().st_size == size_bytes(quantized, recipe)
    assert least < path.stat().st_size < least + 4 * sum(m.scale.numel() for m in layers) + 12_000


def test_it_is_exported_traced_and_written_as_onnx(network, tmp_path):
    _, model = network
    quantized = ptq.quantize(model, ptq.vit_recipe(model, 4, "tensor", input_bits=8), BATCHES)
    expected = logits(quantized)
    program = torch.export.export(quantized, (X,))
    torch.testing.assert_close(logits(program.module()), expected)
    traced = torch.jit.trace(quantized, X, strict=False)(X)
    traced = traced["logits"] if isinstance(traced, dict) else logits_of(traced)
    torch.testing.assert_close(traced.detach(), expected)
    to_onnx(quantized, X[:1], tmp_path / "vit.onnx")
    assert as_simulated(as_written(tmp_path / "vit.onnx", X), expected, logits(model))


def as_simulated(found, expected, exact):
    """Whether logits are far nearer to the simulated than these are to those in float. They are not
    equal: a sum in another order may move an activation to the level beside it."""
    off, lost = ((y - expected).square().mean() for y in (found, exact))
    return off < 0.5 * lost


def as_written(path, x):
    """What ONNX Runtime makes of a file when it changes nothing in it."""
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    return torch.from_numpy(session.run(["logits"], {"images": x.numpy()})[0])


# Which layers


PARTS = {
    "transformers": ("vit.layers.1.attention.k_proj", "vit.layers.0.mlp.fc2", "classifier"),
    "timm": ("blocks.1.attn.proj", "blocks.0.mlp.fc2", "head"),
    "torchvision": (
        "encoder.layers.encoder_layer_1.self_attention.out_proj",
        "encoder.layers.encoder_layer_0.mlp.3",
        "heads.head",
    ),
    "ours": ("blocks.1.attn.core", "blocks.0.ffn.2", "classifier"),
}


@pytest.mark.parametrize("name", VITS)
def test_parts_are_those_of_the_network(name):
    model = ptq.open_attention(small_vit(name))
    attention, mlp, classifier = PARTS[name]
    found = {part: layers_of(model, (part,)) for part in ("attention", "mlp", "classifier")}
    assert attention in found["attention"] and mlp in found["mlp"]
    assert found["classifier"] == [classifier]
    assert len(found["mlp"]) == 4 and not set(found["attention"]) & set(found["mlp"])
    recipe = ptq.vit_recipe(model, parts=("mlp",))
    quantized = ptq.quantize(model, recipe, BATCHES)
    layers = [n for n, m in quantized.named_modules() if isinstance(m, QuantizedLayer)]
    assert layers == found["mlp"]


def test_parts_of_mobilevit_and_of_files_of_older_transformers():
    model = MobileViT("xxs")
    assert len(layers_of(model, ("mlp",))) == 18 and len(layers_of(model, ("attention",))) == 27
    layer = nn.ModuleDict({"attention": nn.ModuleDict({"output": nn.Linear(2, 2)})})
    layer["output"] = nn.Linear(2, 2)
    assert layers_of(nn.Sequential(layer), ("attention",)) == ["0.attention.output"]
    assert layers_of(nn.Sequential(layer), ("mlp",)) == ["0.output"]


def test_a_share_is_drawn_by_the_seed_and_recorded():
    model = small_vit("ours")
    everything = layers_of(model, ("attention", "mlp"))

    def drawn(share, seed):
        recipe = ptq.vit_recipe(model, parts=("attention", "mlp"), share=share, seed=seed)
        assert Recipe.fromdict(json.loads(json.dumps(recipe.asdict()))) == recipe
        assert f"share {share:g} by seed {seed}" in recipe.title
        return {name for name in everything if recipe.layer_spec(name, {"product"})}

    half = drawn(0.5, 1)
    assert len(half) == round(len(everything) / 2) and half == drawn(0.5, 1)
    assert drawn(0.2, 1) < half < drawn(0.8, 1) < drawn(1, 1) == set(everything)
    assert len({frozenset(drawn(0.5, seed)) for seed in range(5)}) > 1
    assert len(drawn(0.01, 0)) == 1


def test_inputs_have_the_bits_of_weights_unless_others_are_asked_for():
    model = small_vit("ours")
    for bits, words in ((4, {}), (8, {}), (8, {"input_bits": 8})):
        linear, products = ptq.vit_recipe(model, bits if not words else 4, **words).layers
        assert linear.input == ptq.Uniform(bits, symmetric=False)
        assert products.input == ptq.Uniform(8)


# Which ranges


def weights_of(method, bits=4):
    model = small_vit("ours")
    quantized = ptq.quantize(model, ptq.vit_recipe(model, bits, method, parts=("mlp",)), BATCHES)
    name = layers_of(model, ("mlp",))[0]
    return model.get_submodule(name).weight.detach(), quantized.get_submodule(name)


@pytest.mark.parametrize("method", ["tensor", "channel"])
def test_scales_reach_from_the_smallest_to_the_largest_weight(method):
    weight, layer = weights_of(method)
    rows = weight.reshape(1, -1) if method == "tensor" else weight
    expected = torch.maximum(-rows.amin(1) / 8, rows.amax(1) / 7)
    torch.testing.assert_close(layer.scale, expected)


def least_error(values, candidates, levels):
    """Least squared error of rounding to levels[0]..levels[1] over (scale, zero-point) pairs."""
    errors = []
    for scale, zero in candidates:
        codes = np.clip(np.round(values / scale) + zero, *levels)
        errors.append(np.square((codes - zero) * scale - values).sum())
    return min(errors)


def test_a_histogram_finds_the_range_of_least_error():
    weight, layer = weights_of("histogram")
    row = weight[3].double().numpy()
    largest = max(-row.min() / 8, row.max() / 7)
    best = least_error(row, [(largest * k / 400, 0) for k in range(60, 441)], (-8, 7))
    chosen = np.square(layer.layer.weight[3].detach().double().numpy() - row).sum()
    assert chosen < 1.02 * best and chosen < least_error(row, [(largest, 0)], (-8, 7))

    # Inputs, over all batches and through the histogram.
    model = small_vit("ours")
    name = layers_of(model, ("mlp",))[1]  # what GELU gives, which has one long tail
    inputs = [x for (x,) in captured(model, model.get_submodule(name), BATCHES, "input")]
    values = torch.cat([x.flatten() for x in inputs]).detach().double().numpy()
    recipe = ptq.vit_recipe(model, 4, "histogram", parts=("mlp",), share=1)
    quantizer = ptq.quantize(model, recipe, BATCHES).get_submodule(name).input
    grid = [
        ((high - low) / 15, np.round(-low * 15 / (high - low)))
        for low in values.min() * np.linspace(0, 1, 12)
        for high in values.max() * np.linspace(0.2, 1, 60)
    ]
    ours = [(quantizer.scale.item(), quantizer.zero_point.item())]
    assert least_error(values, ours, (0, 15)) < 1.1 * least_error(values, grid, (0, 15))


# Comparing


def test_networks_are_compared_by_their_logits():
    a, b = small_vit("ours"), ptq.open_attention(small_vit("ours"))
    b.classifier.bias.data += torch.linspace(-2, 2, CLASSES)
    off = np.concatenate([(logits(b, x) - logits(a, x)).double().numpy() for x, _ in BATCHES])
    agree = np.concatenate(
        [(logits(b, x).argmax(1) == logits(a, x).argmax(1)).numpy() for x, _ in BATCHES]
    )
    found = ptq.compare_models(a, b, BATCHES)
    assert found["mse"] == pytest.approx(np.square(off).mean())
    assert found["mae"] == pytest.approx(np.abs(off).mean())
    assert found["top1_agreement_pct"] == pytest.approx(100 * agree.mean()) and 0 < agree.mean() < 1
    assert found["n_images"] == 24
    same = ptq.compare_models(a, a, BATCHES)
    assert same == {"mse": 0, "mae": 0, "top1_agreement_pct": 100, "n_images": 24}


# Bad input


@pytest.mark.parametrize(
    "words, says",
    [
        ({"method": "entropy"}, "no method is called entropy: there are tensor, channel, histo"),
        ({"parts": ("norms",)}, "no part is called norms: there are attention, mlp, classifier"),
        ({"parts": ()}, "for one part at least of attention, mlp, classifier"),
        ({"share": 0}, "a share is above 0 and at most 1, not 0"),
        ({"share": 1.5}, "not 1.5"),
        ({"bits": 1}, "2 to 16 bits, not 1"),
        ({"input_bits": 32}, "2 to 16 bits, not 32"),
    ],
)
def test_words_that_mean_nothing_are_refused(words, says):
    with pytest.raises(ValueError, match=says):
        ptq.vit_recipe(small_vit("ours"), **words)


def test_parts_that_a_network_lacks_are_named():
    with pytest.raises(ValueError, match="known as its attention: see ptq.open_attention"):
        ptq.vit_recipe(small_vit("torchvision"))
    assert ptq.vit_recipe(small_vit("torchvision"), parts=("mlp", "classifier")).layers
    with pytest.raises(ValueError, match="no layer of the network is known as its mlp"):
        ptq.vit_recipe(nn.Sequential(nn.Linear(2, 2)), parts=("mlp",))


def test_what_can_not_be_compared_is_refused():
    a, training = small_vit("ours"), small_vit("ours").train()
    with pytest.raises(ValueError, match="compared in evaluation mode"):
        ptq.compare_models(a, training, BATCHES)
    with pytest.raises(ValueError, match="no images to compare on"):
        ptq.compare_models(a, a, [])
    broken = small_vit("ours")
    broken.classifier.bias.data[0] = torch.nan
    with pytest.raises(ValueError, match="not finite"):
        ptq.compare_models(a, broken, BATCHES)


def test_attention_that_does_more_stays_closed():
    encoder = nn.TransformerEncoderLayer(24, 3, batch_first=True)
    normed = timm.layers.Attention(24, 3, qk_norm=True, norm_layer=nn.LayerNorm)
    others = nn.MultiheadAttention(24, 3, kdim=12, batch_first=True)
    for module in (encoder, normed, others, nn.MultiheadAttention(24, 3)):
        opened = ptq.open_attention(nn.Sequential(module))
        assert not any(isinstance(m, AttentionCore) for m in opened.modules())


def test_masks_and_other_tokens_are_refused_not_ignored():
    opened = ptq.open_attention(nn.Sequential(nn.MultiheadAttention(24, 3, batch_first=True)))[0]
    x = draw(2, 5, 24)
    assert opened(x, x, x)[0].shape == x.shape
    mask = torch.ones(5, 5, dtype=torch.bool)
    for call in (
        lambda: opened(x, x.clone(), x),
        lambda: opened(x, x, x, attn_mask=mask),
        lambda: opened(x, x, x, is_causal=True),
    ):
        with pytest.raises(ValueError, match="knows no masks and no other tokens"):
            call()
