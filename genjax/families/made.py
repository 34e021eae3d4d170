"""Masked autoencoders: p(x) = Π_t p(x_σ(t) | x_σ(<t)) for the values of an event in an order σ, by
one dense network whose masks keep it so.

Germain 2015 (MADE), Uria 2014 (one network for several orders; NADE for one value after the other,
as sampling does it here). The network is `nets/masked.py`'s `MaskedMlp`, and what makes a model of
it in `parts/orders.py`.
"""

from functools import partial
from typing import Literal

from genjax import nets
from genjax.nets.functional import functional
from genjax.parts.orders import Ordered, Ordering, ordered
from genjax.protocol import DataSpec, Model
from genjax.settings import Dtype, Width, builder


@builder
def made(
    spec: DataSpec,
    *,
    hidden: tuple[Width, ...] = (500, 500),
    direct: bool = True,
    activation: Literal["gelu", "relu", "silu", "softplus", "tanh"] = "relu",
    ordering: Ordering = Ordering(),
    dtype: Dtype = "float32",
) -> Model:
    """A masked autoencoder (MADE) of events of any shape; conditional if the spec has a condition.

    In an order σ, p_σ(x | c) = Π_t p(x_σ(t) | x_σ(<t), c), and with K = `n_orders` of them
    p(x | c) = 1/K Σ_k p_k(x | c), all by the same weights. The loss per example is -ln p_k(x | c)
    in nats, for one order that is drawn for each batch; for K = 1 that is -ln p(x | c), and else
    at least that, in expectation. `log_prob` averages over all orders, and is exact. Shapes: x [B,
    *shape], D values an event.

    Example:
        >>> import jax
        >>> from genjax import DataSpec, made
        >>> model = made(DataSpec((3, 3, 1), "binary"), hidden=(8,), order="random", n_orders=2)
        >>> params, state = model.init(jax.random.key(0))
        >>> model.sample(params, state, jax.random.key(1), 2).shape
        (2, 3, 3, 1)

    Args:
        spec: binary or discrete data.
        hidden: widths of the hidden layers; empty means that each value is judged by a linear
            function of those before it.
        direct: whether a value also sees those before it directly, past the hidden layers.
        activation: between layers.
        dtype: of the network's arithmetic; parameters and losses stay float32.

    Raises:
        ConfigError: for data that are not binary or discrete, an order that is no permutation, and
            settings that do not fit the data or each other.
    """
    orders, emit = ordering.of(spec, "A masked autoencoder")
    module = partial(
        nets.masked.MaskedMlp,
        spec.size,
        tuple(hidden),
        emit.n_outputs,
        cond_size=spec.cond_size,
        direct=direct,
        activation=activation,
    )
    return ordered(Ordered(spec, functional(module, dtype), emit, orders), "made")
