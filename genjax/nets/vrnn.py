"""The networks of a recurrent variational autoencoder. What depends on x_t alone is computed for
all steps at once.
"""

from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
from flax import nnx

from genjax.nets.cells import Carry, Cell
from genjax.nets.mlp import ACTIVATIONS, MLP
from genjax.nets.recurrent import RecurrentLayer
from genjax.nets.sequence import EventEmbed
from genjax.protocol import Array, DataSpec


def unchanged(x: Array) -> Array:
    """The activation of networks without hidden layers."""
    return x


class JointMLP(nnx.Module):
    """An MLP of two inputs. `first(a)`, the part of its first layer that depends on a, can be
    computed ahead of time.
    """

    def __init__(
        self,
        d_a: int,
        d_b: int,
        hidden: Sequence[int],
        d_out: int,
        activation: str,
        *,
        rngs: nnx.Rngs,
    ) -> None:
        width, *rest = *hidden, d_out
        self.first = nnx.Linear(d_a, width, rngs=rngs)
        self.second = nnx.Linear(d_b, width, use_bias=False, rngs=rngs)
        self.activation = ACTIVATIONS[activation]
        self.rest = MLP(width, rest[:-1], d_out, activation=activation, rngs=rngs) if rest else None

    def __call__(self, first: Array, b: Array) -> Array:
        h = first + self.second(b)
        return h if self.rest is None else self.rest(self.activation(h))


class VariationalRecurrentNet(nnx.Module):
    """Chung 2015's φ_x, φ_z, φ_prior, φ_enc, φ_dec and f.

    A feature extractor is dense layers of the widths `hidden`, with an activation after each, the
    first for x being an `EventEmbed` (so the condition comes in there); without hidden layers all
    is linear. h_0 = f(start, h = 0) for a learned start, where the paper has 0, so that the first
    step knows of the condition. For latent_dim 0 there is no z.
    """

    def __init__(
        self,
        spec: DataSpec,
        cell: Cell,
        latent_dim: int,
        d_hidden: int,
        hidden: Sequence[int],
        n_outputs: int,
        activation: str,
        droppable: bool = False,
        *,
        rngs: nnx.Rngs,
    ) -> None:
        d_first, d_feature = (hidden[0], hidden[-1]) if hidden else (d_hidden, d_hidden)
        self.d_hidden, self.latent_dim, self.n_carry = d_hidden, latent_dim, cell.n_carry
        self.activation = ACTIVATIONS[activation] if hidden else unchanged
        self.embed = EventEmbed(spec, d_first, droppable, rngs=rngs)
        deeper = None
        if len(hidden) > 1:
            deeper = MLP(d_first, hidden[1:-1], d_feature, activation=activation, rngs=rngs)
        self.x_features = deeper
        self.layer = RecurrentLayer(cell, d_feature, d_hidden, rngs=rngs)
        if latent_dim:
            self.z_features = MLP(
                latent_dim, hidden[:-1], d_feature, activation=activation, rngs=rngs
            )
            self.z_inputs = nnx.Linear(
                d_feature, cell.n_gates * d_hidden, use_bias=False, rngs=rngs
            )
            self.prior = MLP(d_hidden, hidden, 2 * latent_dim, activation=activation, rngs=rngs)
            self.encoder = JointMLP(
                d_feature, d_hidden, hidden, 2 * latent_dim, activation, rngs=rngs
            )
            self.decoder: Any = JointMLP(
                d_feature, d_hidden, hidden, n_outputs, activation, rngs=rngs
            )
        else:
            self.decoder = MLP(d_hidden, hidden, n_outputs, activation=activation, rngs=rngs)

    def _features(self, embedded: Array) -> Array:
        h = self.activation(embedded)
        return h if self.x_features is None else self.activation(self.x_features(h))

    def begin(self, n: int, c: Array | None, dropped: Array | None) -> Carry:
        """The carry that holds h_0."""
        zeros = jnp.zeros((n, self.d_hidden), self.layer.kernel[...].dtype)
        a = self.layer.inputs(self._features(self.embed.initial(n, c, dropped)))
        return self.layer.step(a, (zeros,) * self.n_carry)

    def features(self, x: Array, c: Array | None, dropped: Array | None) -> Array:
        """φ_x of events x [N, *event], [N, d]."""
        return self._features(self.embed.one(x, c, dropped))

    def observe(self, features: Array) -> tuple[Array, Array]:
        """What the encoder and f make of features [N, d]: the parts of their first layers, [N, ...]
        each.
        """
        first = self.encoder.first(features) if self.latent_dim else features
        return first, self.layer.inputs(features)

    def prior_of(self, h: Array) -> Array:
        """Mean and raw scale of p(z_t | h_{t-1}), [N, 2 latent_dim]."""
        return self.prior(h) if self.latent_dim else h[:, :0]

    def posterior_of(self, observed: tuple[Array, Array], h: Array) -> Array:
        """Mean and raw scale of q(z_t | x_t, h_{t-1}), [N, 2 latent_dim]."""
        return self.encoder(observed[0], h) if self.latent_dim else h[:, :0]

    def outputs_of(self, z: Array, h: Array) -> Array:
        """The parameters of p(x_t | z_t, h_{t-1}), [N, n_outputs]."""
        if not self.latent_dim:
            return self.decoder(h)
        return self.decoder(self.decoder.first(self.activation(self.z_features(z))), h)

    def recur(self, observed: tuple[Array, Array], z: Array, carry: Carry) -> Carry:
        """The carry that holds h_t = f(φ_x(x_t), φ_z(z_t), h_{t-1})."""
        a = observed[1]
        if self.latent_dim:
            a = a + self.z_inputs(self.activation(self.z_features(z)))
        return self.layer.step(a, carry)
