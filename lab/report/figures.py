"""All figures by the names of their files: functions from Results to a figure, or to None."""

from lab.report import row_figures, study_figures, tradeoffs

FIGURES = {
    "headline": row_figures.headline,
    "methods": row_figures.methods,
    "pareto": row_figures.pareto,
    "tradeoffs": tradeoffs.tradeoffs,
    "confusion": row_figures.confusion,
    "input_sizes": row_figures.input_sizes,
    "training_curves": study_figures.training_curves,
    "layers": study_figures.layers,
    "milliseconds": study_figures.milliseconds,
    "waterfall": study_figures.waterfall,
}
