"""What devices do by their makers' data sheets, and how many FLOPs a function asks for: the share
of the one that the other comes to is comparable between machines and frameworks.
"""

import math
import re
from collections.abc import Callable
from typing import Any

import jax
from jax.extend.core import ClosedJaxpr, Jaxpr

# What one device, as jax counts them, does and holds: bfloat16 FLOP/s and bytes of memory. From
# Google's pages on the architecture of each version (https://cloud.google.com/tpu/docs, 2025); of a
# v4 chip jax sees two cores.
CHIPS = {
    "TPU v4": (137.5e12, 16 * 2**30),
    "TPU v5 lite": (197e12, 16 * 2**30),
    "TPU v5": (459e12, 95 * 2**30),
    "TPU v6 lite": (918e12, 32 * 2**30),
}
# bfloat16 FLOP/s of dense products on the tensor cores, by the name of the card. From NVIDIA's data
# sheets of each card, where figures "with sparsity" are twice as large.
GPUS = {
    "B200": 2250e12,
    "GH200": 989e12,
    "H200": 989e12,
    "H200 NVL": 835e12,
    "H100": 989e12,
    "H100 PCIe": 756e12,
    "H100 NVL": 835e12,
    "A100": 312e12,
    "A100 PCIe": 312e12,
    "L40S": 362e12,
    "L40": 181e12,
    "L4": 121e12,
    "A10G": 70e12,
    "RTX 4090": 165e12,
    "RTX 3090": 71e12,
}
# What else stands in a name and changes nothing: makers, sockets, memory.
_BESIDE = re.compile(r"NVIDIA|Tesla|GeForce|SXM\d?|HBM\d?\w?|\d+GB")


def datasheet_peak(device_kind: str) -> float | None:
    """bfloat16 FLOP/s of a device by its name in jax; None for one that is not known, as are laptop
    versions and parts of a card.
    """
    if device_kind in CHIPS:
        return CHIPS[device_kind][0]
    words = device_kind.replace("-", " ").replace("PCIE", "PCIe").split()
    return GPUS.get(" ".join(word for word in words if not _BESIDE.fullmatch(word)))


def product_flops(f: Callable[..., Any], *args: Any) -> float:
    """FLOPs of the matrix products and convolutions of `f(*args)`, by its jaxpr: two for each
    multiplication and addition, loops by their length, of branches the most costly one.
    Of a form for each platform, the one that is not written for any counts; of attention all
    pairs of positions, though a causal one sees half of them.

    It counts what was asked for, whatever a compiler makes of it; what is computed again on the way
    back counts twice. Of a `while` loop, whose length is not known, one trip counts.

    Args:
        args: arrays or their shapes.

    Example:
        >>> import jax.numpy as jnp
        >>> product_flops(jnp.matmul, jnp.ones((2, 3)), jnp.ones((3, 4)))
        48.0
    """
    return _of_jaxpr(jax.make_jaxpr(f)(*args).jaxpr)


def _of_jaxpr(jaxpr: Jaxpr) -> float:
    return sum(_of_equation(equation) for equation in jaxpr.eqns)


def _of_equation(equation: Any) -> float:
    name, params = equation.primitive.name, equation.params
    if name == "dot_general":
        (contracted, _), _ = params["dimension_numbers"]
        shape = equation.invars[0].aval.shape
        summed = math.prod(shape[axis] for axis in contracted)
        return 2.0 * math.prod(equation.outvars[0].aval.shape) * summed
    if name == "conv_general_dilated":
        kernel, numbers = equation.invars[1].aval.shape, params["dimension_numbers"]
        taps = math.prod(kernel) / kernel[numbers.rhs_spec[0]]
        # Between the numbers of a dilated input lie zeros, as in the gradient of a stride.
        taps /= math.prod(params["lhs_dilation"])
        return 2.0 * math.prod(equation.outvars[0].aval.shape) * taps
    if name.startswith("dot_product_attention_"):  # cuDNN's: of queries and keys [B, T, N, h]
        (b, t, heads, width), s = equation.invars[0].aval.shape, equation.invars[1].aval.shape[1]
        return (4.0 if "_fwd" in name else 8.0) * b * heads * t * s * width
    inner = [_of_jaxpr(one) for value in params.values() for one in _jaxprs_in(value)]
    if name == "cond":
        of_platforms = params.get("branches_platforms") or ()
        return inner[of_platforms.index(None)] if None in of_platforms else max(inner, default=0.0)
    return sum(inner) * params.get("length", 1) if name == "scan" else sum(inner)


def _jaxprs_in(value: Any) -> list[Jaxpr]:
    if isinstance(value, ClosedJaxpr):
        return [value.jaxpr]
    if isinstance(value, Jaxpr):
        return [value]
    if isinstance(value, tuple | list):
        return [one for part in value for one in _jaxprs_in(part)]
    return []
