"""Operators of a network in integers alone: what a processor without floating point computes.

Tensors are int64 and hold codes: a value is scale * code, with the zero-point already taken off.
Scales are Python numbers, from which each operator makes its integer constants beforehand, so no
float touches a tensor. What should fit a smaller register is checked: see `rescale.fits`.

`rescale`: from one scale to another, sums, square roots. `activations`: softmax, SiLU, GELU.
`norm`: layer norm. `published`: the same operators as papers and their code have them. `layers`
puts them into a float network, from values to values of codes; `network` has no float inside.
"""

from ptq.integer.rescale import OutOfRange

__all__ = ["OutOfRange"]
