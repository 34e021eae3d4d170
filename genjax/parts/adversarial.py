"""Objectives of two players, and the gradient penalties that keep one of them in check.

Goodfellow 2014 (minimax and non-saturating), Mao 2017 (least squares), Lim & Ye 2017 (hinge),
Arjovsky 2017 and Gulrajani 2017 (Wasserstein, gradient penalty), Mescheder 2018 (R1, R2),
Jolicoeur-Martineau 2018 and Huang 2024 (relativistic pairing).
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from genjax.parts.distributions import softplus
from genjax.protocol import Array

# --- objectives -----------------------------------------------------------------------------------


class Objective(NamedTuple):
    """The losses of both players as functions of the logits D(x) of a real and D(G(z)) of a
    generated example, [B] -> [B].

    Attributes:
        discriminator: (real, fake) -> loss.
        generator: (real, fake) -> loss.
        shift_invariant: whether only differences of logits matter, so that a bias of the logit
            would have no effect.
    """

    discriminator: Callable[[Array, Array], Array]
    generator: Callable[[Array, Array], Array]
    shift_invariant: bool = False


def _cross_entropy(real: Array, fake: Array) -> Array:
    """-ln σ(real) - ln(1 - σ(fake)), whose minimum over D is at D(x) = ln p(x)/q(x)."""
    return softplus(-real) + softplus(fake)


OBJECTIVES: dict[str, Objective] = {
    # min_G max_D E ln σ(D(x)) + E ln(1 - σ(D(G(z)))). Goodfellow 2014, equation 1.
    "minimax": Objective(_cross_entropy, lambda real, fake: -softplus(fake)),
    # The generator maximises ln σ(D(G(z))) instead. Goodfellow 2014, section 3.
    "nonsaturating": Objective(_cross_entropy, lambda real, fake: softplus(-fake)),
    # Mao 2017, equation 9: targets 1 for real and 0 for generated examples.
    "least_squares": Objective(
        lambda real, fake: 0.5 * jnp.square(real - 1) + 0.5 * jnp.square(fake),
        lambda real, fake: 0.5 * jnp.square(fake - 1),
    ),
    # Lim & Ye 2017; Miyato 2018, equations 16 and 17.
    "hinge": Objective(
        lambda real, fake: jax.nn.relu(1 - real) + jax.nn.relu(1 + fake), lambda real, fake: -fake
    ),
    # Arjovsky 2017, equation 3; the critic must be kept Lipschitz by a penalty or by spectral
    # normalisation.
    "wasserstein": Objective(
        lambda real, fake: fake - real, lambda real, fake: -fake, shift_invariant=True
    ),
    # Jolicoeur-Martineau 2018; Huang 2024, section 2: each generated example is compared with a
    # real one.
    "relativistic": Objective(
        lambda real, fake: softplus(fake - real),
        lambda real, fake: softplus(real - fake),
        shift_invariant=True,
    ),
}


# --- gradient penalties ---------------------------------------------------------------------------


def input_gradient(logit: Callable[[Array], Array], x: Array) -> Array:
    """∇_x D(x) of every example, [B, *shape] -> [B, *shape], for a D in which no example sees
    another.
    """
    return jax.grad(lambda x: jnp.sum(logit(x)))(x)


def _square_norm(x: Array) -> Array:
    return jnp.sum(jnp.square(x), axis=tuple(range(1, x.ndim)))


def zero_centred_penalty(logit: Callable[[Array], Array], x: Array) -> Array:
    """½ |∇_x D(x)|², [B]. R1 on real and R2 on generated examples: Mescheder 2018, section 4."""
    return 0.5 * _square_norm(input_gradient(logit, x))


def one_centred_penalty(logit: Callable[[Array], Array], x: Array) -> Array:
    """(|∇_x D(x)| - 1)², [B]. Gulrajani 2017, equation 3, at points between real and generated
    ones.
    """
    # The derivative of the square root at 0 is infinite, and a discriminator can start there.
    return jnp.square(jnp.sqrt(_square_norm(input_gradient(logit, x)) + 1e-12) - 1)
