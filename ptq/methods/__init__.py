"""Methods by name: what a recipe's steps are called. A new one is a file and a line here.

Each is a function (model, reference, batches, recipe) -> None that changes `model`, the network
with quantized layers (ptq.layers), in place. `reference` is the same network in float, `batches`
the calibration images, or None. Layers that a method brings along are in the table of ptq.kinds.
"""

from ptq.methods import adaround, biases, calibrate, equalize, gptq, nearest, norms, ranking

STEPS = {
    "nearest": nearest.nearest,
    "gptq": gptq.gptq,
    "adaround": adaround.adaround,
    "calibrate": calibrate.calibrate,
    "shift_norms": norms.shift_norms,
    "replace_norms": norms.replace_norms,
    "equalize": equalize.equalize,
    "correct_biases": biases.correct_biases,
    "similarity": ranking.similarity,
    "ranking": ranking.ranking,
    "ranking_sum": ranking.ranking_sum,
    "ranking_alone": ranking.ranking_alone,
}
