"""FQ-ViT, I-BERT and I-ViT, whose layers compute in integers.

The recipes without `-published` give networks of integers alone; the papers' code leaves some in
float.

`fq-vit` has an 8-bit softmax, `fq-vit-a4` one of 4-bit powers of two. `-published`: the formats,
observers and arithmetic of the paper's code.
"""

from dataclasses import replace

from ptq.formats import Log2, PowerOfTwo, Uniform
from ptq.recipe import LayerSpec, Recipe
from ptq.recipes.mobilevit import CALIBRATED, CORES, GPTQ_INPUTS, W8A8_STEPS, layers, weights

UNSIGNED, SIGNED = Uniform(8, symmetric=False), Uniform(8)
NORMS, ACTIVATIONS = r".*norm\d?", r".*\.act|.*\.ffn\.1"
# 8 bits for what SiLU takes in cost accuracy (w8a8-silu of the ablation). It stands between 32 bits
# and 32 bits, so 16 take no more multiplications.
ACTIVATION = LayerSpec(ACTIVATIONS, input=Uniform(16), input_observer="minmax", kind="i-bert-act")
AS_PUBLISHED = {"input_observer": "minmax", "published": True}


def products(weight_bits: int = 8) -> tuple[LayerSpec, ...]:
    """Return our formats: 8-bit inputs, of depthwise convolutions with a scale per channel."""
    _, depthwise, _, others = layers(weight_bits, 8)
    return depthwise, others


def published_products(input: Uniform) -> tuple[LayerSpec, ...]:
    """Return the published formats: one scale an input, ranges from extreme to extreme."""
    return (LayerSpec(".*", weights(8), input, "minmax", "minmax"),)


def _fq_vit(attention: Uniform | Log2) -> tuple[LayerSpec, ...]:
    return (
        LayerSpec(NORMS, input=PowerOfTwo(8), output=UNSIGNED, kind="fq-vit-norm"),
        LayerSpec(CORES, input=UNSIGNED, attention=attention, kind="fq-vit-core"),
        ACTIVATION,
        *products(),
    )


def _published_fq_vit(bits: int) -> tuple[LayerSpec, ...]:
    norm, core = PowerOfTwo(8), Log2(bits, "3/2", zero_code=False)
    return (
        LayerSpec(NORMS, input=norm, output=UNSIGNED, kind="fq-vit-norm", **AS_PUBLISHED),
        LayerSpec(CORES, input=UNSIGNED, attention=core, kind="fq-vit-core", **AS_PUBLISHED),
        *published_products(UNSIGNED),
    )


def _i_bert(weight_bits: int = 8) -> tuple[LayerSpec, ...]:
    return (
        LayerSpec(NORMS, input=Uniform(16), output=UNSIGNED, kind="i-bert-norm"),
        LayerSpec(CORES, input=SIGNED, attention=UNSIGNED, kind="i-bert-core"),
        ACTIVATION,
        *products(weight_bits),
    )


_PUBLISHED_I_BERT = (
    LayerSpec(NORMS, input=Uniform(16), kind="i-bert-norm", **AS_PUBLISHED),
    LayerSpec(CORES, input=SIGNED, attention=UNSIGNED, kind="i-bert-core", **AS_PUBLISHED),
    LayerSpec(ACTIVATIONS, input=SIGNED, kind="i-bert-act", **AS_PUBLISHED),
    *published_products(SIGNED),
)
_I_VIT = (
    LayerSpec(NORMS, input=Uniform(16), output=UNSIGNED, kind="i-bert-norm"),
    LayerSpec(CORES, input=UNSIGNED, attention=UNSIGNED, kind="i-vit-core"),
    replace(ACTIVATION, kind="i-vit-act"),
    *products(),
)
# 16 bits of the softmax and of what a norm takes in, as in the code; the paper speaks of 8.
_PUBLISHED_I_VIT = (
    LayerSpec(NORMS, input=Uniform(16), kind="i-vit-norm", **AS_PUBLISHED),
    LayerSpec(
        CORES,
        input=SIGNED,
        attention=Uniform(16, symmetric=False),
        kind="i-vit-core",
        **AS_PUBLISHED,
    ),
    LayerSpec(ACTIVATIONS, input=SIGNED, kind="i-vit-act", **AS_PUBLISHED),
    *published_products(SIGNED),
)
_OURS = {"steps": W8A8_STEPS, **CALIBRATED}

INTEGER = (
    Recipe("fq-vit", "FQ-ViT, corrected, 8-bit softmax", _fq_vit(UNSIGNED), **_OURS),
    Recipe("fq-vit-a4", "FQ-ViT, corrected, 4-bit softmax", _fq_vit(Log2(4)), **_OURS),
    Recipe(
        "fq-vit-published", "FQ-ViT as published, 8-bit softmax", _published_fq_vit(8), **CALIBRATED
    ),
    Recipe(
        "fq-vit-a4-published",
        "FQ-ViT as published, 4-bit softmax",
        _published_fq_vit(4),
        **CALIBRATED,
    ),
    Recipe("i-bert", "I-BERT, refined", _i_bert(), **_OURS),
    Recipe("i-bert-w4", "I-BERT, refined, GPTQ to 4-bit weights", _i_bert(4), **GPTQ_INPUTS),
    Recipe("i-bert-published", "I-BERT as published", _PUBLISHED_I_BERT, **CALIBRATED),
    Recipe("i-vit", "I-ViT, corrected", _I_VIT, **_OURS),
    Recipe("i-vit-published", "I-ViT as published", _PUBLISHED_I_VIT, **CALIBRATED),
)
