"""Products, traffic and energy against closed forms, by layer and in total."""

import pytest
import torch
import torch.nn.functional as F
from small import draw, small_network
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import ptq
from mobilevit import AttentionCore, MobileViT
from ptq.analysis.energy import PRICES, count, energy, energy_by_prices

N, D, HEADS, DEPTH, CLASSES = 17, 24, 3, 2, 5  # of the small ViT: 16 patches of 4 x 4 pixels


class Explicit(nn.Module):
    def forward(self, q, k, v):
        return (q @ k.mT * q.shape[-1] ** -0.5).softmax(-1) @ v


class Block(nn.Module):
    def __init__(self, core):
        super().__init__()
        self.norm, self.qkv, self.core = nn.LayerNorm(D), nn.Linear(D, 3 * D), core()
        self.proj, self.mlp = nn.Linear(D, D), nn.Sequential(nn.Linear(D, 4 * D), nn.GELU())
        self.out = nn.Linear(4 * D, D)

    def forward(self, x):
        q, k, v = self.qkv(self.norm(x)).unflatten(-1, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)
        x = x + self.proj(self.core(q, k, v).transpose(1, 2).flatten(2))
        return x + self.out(self.mlp(x))


class ViT(nn.Module):
    def __init__(self, core=AttentionCore):
        super().__init__()
        self.patches = nn.Conv2d(3, D, 4, 4)
        self.token = nn.Parameter(torch.zeros(1, 1, D))
        self.blocks = nn.Sequential(*(Block(core) for _ in range(DEPTH)))
        self.head = nn.Linear(D, CLASSES)

    def forward(self, x):
        x = self.patches(x).flatten(2).mT
        x = torch.cat((self.token.expand(len(x), -1, -1), x), 1)
        return self.head(self.blocks(x)[:, 0])


def macs(network, x):
    return {name: layer.macs for name, layer in count(network, x)[0].items()}


@pytest.mark.parametrize("core", [AttentionCore, Explicit])
def test_a_vit_computes_what_its_closed_form_says(core):
    B = 2
    expected = {"patches": 16 * D * 3 * 4 * 4, "head": D * CLASSES}
    for i in range(DEPTH):
        expected |= {
            f"blocks.{i}.qkv": N * D * 3 * D,
            f"blocks.{i}.core": 2 * N * N * D,
            f"blocks.{i}.proj": N * D * D,
            f"blocks.{i}.mlp.0": N * D * 4 * D,
            f"blocks.{i}.out": N * 4 * D * D,
        }
    expected = {name: B * n for name, n in expected.items()}
    network = ViT(core).eval()
    assert macs(network, draw(B, 3, 16, 16)) == expected


def test_torch_alone_misses_fused_attention_and_counts_the_rest_alike():
    x = draw(1, 3, 16, 16)
    for core in (AttentionCore, Explicit):
        network = ViT(core).eval()
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            network(x)
        ours = sum(macs(network, x).values())
        missed = 0 if core is Explicit else DEPTH * 2 * N * N * D
        assert counter.get_total_flops() == 2 * (ours - missed)


def mobilevit_macs(model, side):
    """From the network's own layers and the sizes of maps, without running it."""
    total, H = 0, side
    for name, m in model.named_modules():
        if isinstance(m, nn.Conv2d):
            H //= m.stride[0]
            total += H * H * m.weight.numel()
        elif isinstance(m, nn.Linear):
            total += m.weight.numel() * (1 if name == "classifier" else H * H)
        elif isinstance(m, AttentionCore):
            width = model.get_submodule(name.removesuffix(".core")).dim
            total += 2 * H * H * (H * H // 4) * width  # four sequences of H * H / 4 tokens
    return total


@pytest.mark.parametrize(("variant", "gmacs"), [("xxs", 0.407), ("xs", 1.026), ("s", 2.001)])
def test_mobilevit_computes_what_its_closed_form_says(variant, gmacs):
    model = MobileViT(variant, num_classes=1000).eval()
    closed = mobilevit_macs(model, 256)
    assert round(closed / 1e9, 3) == gmacs
    small = mobilevit_macs(model, 64)
    assert sum(macs(model, draw(1, 3, 64, 64)).values()) == small < closed / 16


def test_attention_of_torch_is_counted_and_what_counts_nothing_is_named():
    layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True).eval()
    before = torch.backends.mha.get_fastpath_enabled()
    layers, uncounted = count(layer, draw(2, 5, 16))
    assert torch.backends.mha.get_fastpath_enabled() == before
    assert layers["self_attn"].macs == 2 * 5 * (4 * 16 * 16 + 2 * 5 * 16)
    assert layers["linear1"].macs == layers["linear2"].macs == 2 * 5 * 16 * 32
    assert {"aten.relu", "aten.native_layer_norm"} <= set(uncounted)
    assert not any("attention" in name or "mm" in name for name in uncounted)


def test_a_layer_reads_its_input_once_and_its_parameters_once():
    layers, _ = count(ViT().eval(), draw(3, 3, 16, 16))
    assert layers["patches"].activations == 3 * 3 * 16 * 16
    assert layers["patches"].parameters == {"patches.weight": D * 48, "patches.bias": D}
    assert layers["blocks.0.qkv"].activations == 3 * N * D
    assert layers["blocks.0.core"].activations == 3 * 3 * N * D  # q, k and v
    assert layers["blocks.0.core"].parameters == {}


class TwoLinear(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(8, 16, bias=False), nn.Linear(16, 4)

    def forward(self, x):
        return self.second(F.relu(self.first(x)))


# Weights 8-bit codes with 16 + 4 scales of 32 bits, and a bias of 4; inputs 8 + 16.
BY_HAND = {
    ("fp32", "horowitz"): 192 * 4.6 + (192 + 4) * 4 * 162.5 + 2 * 24 * 4 * 12.5,
    ("w8a8", "horowitz"): 192 * 0.3 + (192 + 4 * 24) * 162.5 + 2 * 24 * 12.5,
    ("w8a8", "horowitz-high"): 192 * 0.3 + (192 + 4 * 24) * 325 + 2 * 24 * 12.5,
    ("w4a8", "horowitz"): 192 * 0.2 + (96 + 4 * 24) * 162.5 + 2 * 24 * 12.5,
    # A float factor makes the product one of floats.
    ("w4", "horowitz"): 192 * 4.6 + (96 + 4 * 24) * 162.5 + 2 * 24 * 4 * 12.5,
    ("w8a8", "seed"): 192 * 1 + (192 + 4 * 24) * 10 + 2 * 24 * 10,
    ("w4a8", "seed"): 192 * 0.5 + (96 + 4 * 24) * 10 + 2 * 24 * 10,
    ("fp32", "seed"): 192 * 16 + (192 + 4) * 40 + 2 * 24 * 40,
}


@pytest.mark.parametrize(("recipe", "prices"), BY_HAND, ids="-".join)
def test_energy_is_what_one_adds_up_by_hand(recipe, prices):
    network = TwoLinear()
    found = energy(network, ptq.recipe(recipe, network), draw(1, 8), prices)
    assert found["total"] == pytest.approx(BY_HAND[recipe, prices])
    assert found["unit"] == PRICES[prices].unit and found["images"] == 1
    layers = found["layers"].values()
    parts = sum(v for layer in layers for kind, v in layer.items() if kind != "macs")
    assert parts == pytest.approx(found["total"])


def test_the_parts_of_all_layers_add_up_by_every_table_of_prices():
    network = TwoLinear()
    found = energy_by_prices(network, ptq.recipe("w4a8", network), draw(1, 8))
    assert found["seed"]["compute"] == pytest.approx(192 * 0.5)
    assert found["horowitz"]["weights"] == pytest.approx((96 + 4 * 24) * 162.5)
    assert found["horowitz-high"]["activations"] == pytest.approx(2 * 24 * 12.5)
    for of_table in found.values():
        parts = [of_table[part] for part in ("compute", "weights", "activations")]
        assert sum(parts) == pytest.approx(of_table["total"])
    assert energy_by_prices(network, ptq.recipe("int8-nncf", network), draw(1, 8)) is None


def test_attention_has_two_factors_of_activations():
    network = ViT().eval()
    x = draw(1, 3, 16, 16)
    w4a8, w6a6 = (energy(network, ptq.recipe(n, network), x)["layers"] for n in ("w4a8", "w6a6"))
    products = 2 * N * N * D
    assert w4a8["blocks.0.core"]["compute"] == pytest.approx(products * (0.2 + 0.1))
    assert w6a6["blocks.0.core"]["compute"] == pytest.approx(products * (0.2 * 36 / 64 + 0.1))
    assert w6a6["blocks.0.core"]["weights"] == 0


@pytest.mark.parametrize(("recipe", "softmax_bits"), [("fq-vit-a4", 4), ("i-vit-published", 16)])
def test_a_softmax_of_other_bits_has_its_own_price(recipe, softmax_bits):
    network = ViT().eval()
    layers = energy(network, ptq.recipe(recipe, network), draw(1, 3, 16, 16))["layers"]
    scores, of_v = N * N * D * (0.2 + 0.1), N * N * D * (0.2 * softmax_bits / 8 + 0.1)
    assert layers["blocks.0.core"]["compute"] == pytest.approx(scores + of_v)


def test_what_an_engine_does_by_itself_has_no_known_energy():
    network = small_network()
    with pytest.raises(ValueError, match="int8-nncf is carried out by nncf"):
        energy(network, ptq.recipe("int8-nncf", network), draw(1, 3, 64, 64))
    with pytest.raises(ValueError, match="no table of prices is called oil: there are horowitz"):
        energy(network, ptq.recipe("w8a8", network), draw(1, 3, 64, 64), "oil")
