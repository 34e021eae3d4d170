"""Neural autoregressive distribution estimators: p(x) = Π_t p(x_σ(t) | x_σ(<t)) for the values of
an event in an order σ, each by hidden units that are a sum over the values before it.

Larochelle & Murray 2011 (NADE), Uria 2014 (one network for several orders). The network is
`nets/nade.py`, and what makes a model of it in `parts/orders.py`.
"""

from functools import partial
from typing import Literal

from genjax import nets
from genjax.nets.functional import functional
from genjax.parts.orders import Ordered, Ordering, ordered
from genjax.protocol import DataSpec, Model
from genjax.settings import Count, Dtype, builder


@builder
def nade(
    spec: DataSpec,
    *,
    hidden: Count = 500,
    activation: Literal["gelu", "relu", "sigmoid", "silu", "softplus", "tanh"] = "sigmoid",
    ordering: Ordering = Ordering(),
    dtype: Dtype = "float32",
) -> Model:
    """A neural autoregressive distribution estimator (NADE) of events of any shape; conditional if
    the spec has a condition.

    In an order σ, p_σ(x | c) = Π_t p(x_σ(t) | x_σ(<t), c), where with y the normalised values

        a_t = a_{t-1} + W_σ(t-1) y_σ(t-1),    h_t = g(a_t),    outputs_t = b_σ(t) + V_σ(t) h_t

    and with K = `n_orders` of them p(x | c) = 1/K Σ_k p_k(x | c), all by the same weights. The loss
    per example is -ln p_k(x | c) in nats, for one order that is drawn for each batch; for K = 1
    that is -ln p(x | c), and else at least that, in expectation. `log_prob` averages over all
    orders, and is exact. Shapes: x [B, *shape], D values an event. Density and sampling each take
    one pass of D sequential steps.

    Example:
        >>> import jax
        >>> from genjax import DataSpec, nade
        >>> model = nade(DataSpec((3, 3, 1), "binary"), hidden=8)
        >>> params, state = model.init(jax.random.key(0))
        >>> model.sample(params, state, jax.random.key(1), 2).shape
        (2, 3, 3, 1)

    Args:
        spec: binary or discrete data.
        hidden: units, the length of a and h.
        activation: g, of the sums of what came before.
        dtype: of the network's arithmetic; parameters and losses stay float32.

    Raises:
        ConfigError: for data that are not binary or discrete, an order that is no permutation, and
            settings that do not fit the data or each other.
    """
    orders, emit = ordering.of(spec, "A NADE")
    sizes = (spec.size, hidden, emit.n_outputs)
    module = partial(nets.nade.Nade, *sizes, cond_size=spec.cond_size, activation=activation)
    return ordered(Ordered(spec, functional(module, dtype), emit, orders), "nade")
