"""The arithmetic that costs time, in plain tensors, in more than one implementation.

One registry: an op's implementations in the order in which they are tried. ``plain`` is always there, fits everything,
is differentiable any number of times, and is what the others are held against; they save memory traffic, saved bytes or
kernels where they fit. A kernel for a device is one more file and one more entry.
"""

from __future__ import annotations

from lorica.kernels import function, gain, gated, grouped, inference, plain, recorded, together
from lorica.kernels.dropout import Dropped, draw_seed, keep_mask, scale_of
from lorica.kernels.projection import Projection
from lorica.kernels.registry import KERNELS, Kernel, asked, kernel_for, register, using

# One linear layer: (x, Projection) → y.
register("projection", "inference", inference.projection, inference.fits)
register("projection", "recorded", recorded.projection, recorded.fits)
register("projection", "function", function.projection, function.fits)
register("projection", "function", together.dropping, together.fits_one)
register("projection", "plain", plain.projection)

# Several that share their input: (x, [Projection, …]) → [y, …].
register("projections", "inference", inference.projections, inference.fits)
register("projections", "recorded", recorded.projections, recorded.fits_all)
register("projections", "function", together.projections, together.fits)
register("projections", "plain", plain.projections)

# The experts of a stack, on rows sorted by expert: (multiply, x, weight, a, b, scaling, offsets) → y.
register("grouped", "inference", grouped.inference, grouped.inference_fits)
register("grouped", "function", grouped.function, grouped.function_fits)
register("grouped", "plain", grouped.plain)

# What multiplies each output of a layer: (z, gain, rest) → y.
register("gain", "inference", gain.inference, inference.fits)
register("gain", "function", gain.scaled, gain.fits)
register("gain", "plain", gain.plain)

# A gated MLP as a whole: (x, Gated) → y.
register("gated", "inference", gated.inference_mlp, inference.fits)
register("gated", "function", gated.function_mlp, gated.function_fits)
register("gated", "plain", gated.plain_mlp)

__all__ = [
    "KERNELS",
    "Dropped",
    "Kernel",
    "Projection",
    "asked",
    "draw_seed",
    "keep_mask",
    "kernel_for",
    "register",
    "scale_of",
    "using",
]
