"""Methods by name."""

from ptq.methods import adaround, gptq, nearest

ROUNDINGS = {"nearest": nearest.nearest, "gptq": gptq.gptq, "adaround": adaround.adaround}
