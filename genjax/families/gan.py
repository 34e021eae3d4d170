"""Generative adversarial networks: a generator G(z) against a discriminator that tells its samples
from the data.

Goodfellow 2014 (minimax and non-saturating), Mao 2017 (least squares), Lim & Ye 2017 (hinge),
Arjovsky 2017 and Gulrajani 2017 (Wasserstein, gradient penalty), Mescheder 2018 (R1, R2),
Jolicoeur-Martineau 2018 and Huang 2024 (relativistic pairing, R3GAN), Miyato 2018 (spectral
normalisation), Mirza 2014, Odena 2017, Miyato & Koyama 2018 (conditions).
"""

from collections.abc import Callable
from functools import partial
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax.core import Tracer

from genjax.checks import check_cond, checked
from genjax.errors import ConfigError, unknown_name
from genjax.nets.functional import Net, functional
from genjax.nets.gan import (
    DCGANFeatures,
    DCGANGenerator,
    Discriminator,
    MLPFeatures,
    MLPGenerator,
    ResidualFeatures,
    ResidualGenerator,
)
from genjax.parts.distributions import softplus
from genjax.protocol import Array, Aux, Batch, DataSpec, Key, Model, Params, State


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

NETS: dict[str, tuple[type, type]] = {
    "mlp": (MLPGenerator, MLPFeatures),
    "dcgan": (DCGANGenerator, DCGANFeatures),
    "resnet": (ResidualGenerator, ResidualFeatures),
}


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


def _used(weight: Any) -> bool:
    # A traced number cannot be compared with 0, and being swept it is meant to be used.
    return isinstance(weight, Tracer) or weight != 0


def _nets(
    spec: DataSpec,
    net: str,
    latent_dim: int,
    hidden: tuple[int, ...],
    channels: tuple[int, ...],
    norms: tuple[bool, bool],
    conditions: tuple[str, str],
    spectral: bool,
    bias: bool,
    dtype: str,
) -> tuple[Net, Net]:
    """Generator and discriminator as pure functions of (x or z, condition [N, E] or None,
    train=...).
    """
    make_generator, make_features = NETS[net]
    widths, e = (hidden if net == "mlp" else channels), spec.cond_size
    knows_concat, knows_norm = conditions[0] == "concat", conditions[0] == "batch_norm"
    generator = partial(
        make_generator,
        latent_dim,
        spec.shape,
        widths[::-1],
        concat=e * knows_concat,
        norm=norms[0],
        norm_cond=e * knows_norm,
    )
    options: dict[str, Any] = {"concat": e * (conditions[1] == "concat"), "spectral": spectral}
    if net != "mlp":
        options["norm"] = norms[1]
    discriminator = partial(
        Discriminator,
        partial(make_features, spec.shape, widths, **options),
        projection=e * (conditions[1] == "projection"),
        auxiliary=e * (conditions[1] == "auxiliary"),
        bias=bias,
        spectral=spectral,
    )
    return functional(generator, dtype), functional(discriminator, dtype)


def gan(
    spec: DataSpec,
    *,
    latent_dim: int = 16,
    net: Literal["mlp", "dcgan", "resnet"] = "mlp",
    hidden: tuple[int, ...] = (128, 128),
    channels: tuple[int, ...] = (32, 64),
    objective: Literal[
        "minimax", "nonsaturating", "least_squares", "hinge", "wasserstein", "relativistic"
    ] = "nonsaturating",
    r1: float = 0.0,
    r2: float = 0.0,
    gradient_penalty: float = 0.0,
    spectral_norm: bool = False,
    generator_norm: Literal["none", "batch"] = "none",
    discriminator_norm: Literal["none", "batch"] = "none",
    generator_cond: Literal["concat", "batch_norm"] = "concat",
    discriminator_cond: Literal["concat", "projection", "auxiliary"] = "concat",
    auxiliary_weight: float = 1.0,
    discriminator_steps: int = 1,
    dtype: Literal["float32", "bfloat16"] = "float32",
) -> Model:
    """A generative adversarial network; conditional if the spec has a condition.

    Two players take turns: "discriminator", `discriminator_steps` times a step, and "generator".
    With real examples x and z ~ N(0, I) their losses per example are those of `OBJECTIVES`, and the
    discriminator's has these terms added: r1 ½|∇D(x)|² + r2 ½|∇D(G(z))|² + gradient_penalty
    (|∇D(u)| - 1)², u = x + t (G(z) - x), t ~ U(0, 1).

    There is neither `log_prob` nor `bound`. Discriminators see events on the normalised scale; the
    generator's values are real numbers (through tanh for binary and discrete data), which `sample`
    rounds to values of the data. All discriminator turns of one step see the same real examples
    with new z; the papers draw new ones each time. Shapes: x [B, *shape], z [B, latent_dim].

    Extras, on events in the units of the data:
        generate: (params, state, z, cond=None) -> G(z), not rounded, [B, *shape].
        logit: (params, state, x, cond=None) -> D(x), [B].

    Args:
        spec: the data; binary, discrete or continuous.
        latent_dim: dimensions of z.
        net: both players' networks: "mlp", or "dcgan" or "resnet" for images.
        hidden: for "mlp": widths of the discriminator's hidden layers; the generator has them
            reversed.
        channels: for images: channels of the discriminator, each entry halving the image; the
            generator has them reversed.
        objective: the two losses.
        r1: weight of the zero-centred gradient penalty on real examples.
        r2: the same on generated examples.
        gradient_penalty: weight of the one-centred gradient penalty between real and generated
            examples (WGAN-GP: 10).
        spectral_norm: divide each of the discriminator's kernels by its largest singular value.
        generator_norm: normalisation between the generator's layers.
        discriminator_norm: normalisation between the discriminator's convolutions.
        generator_cond: where the generator takes a condition: beside z, or in its batch
            normalisations.
        discriminator_cond: where the discriminator takes it: beside x, as a projection, or as an
            auxiliary task to predict.
        auxiliary_weight: weight of the auxiliary task's loss, in nats, for both players.
        discriminator_steps: turns of the discriminator for one of the generator.
        dtype: of the networks' arithmetic; parameters and losses stay float32.

    Raises:
        ConfigError: for settings that do not exist or do not fit the data or each other.
    """
    if spec.kind == "tokens":
        raise ConfigError(
            "A GAN models binary, discrete or continuous data; got tokens. Use a sequence family."
        )
    if objective not in OBJECTIVES:
        raise unknown_name("objective", objective, OBJECTIVES)
    if net not in NETS:
        raise unknown_name("net", net, NETS)
    choices = {
        "generator_norm": (generator_norm, ("none", "batch")),
        "discriminator_norm": (discriminator_norm, ("none", "batch")),
        "generator_cond": (generator_cond, ("concat", "batch_norm")),
        "discriminator_cond": (discriminator_cond, ("concat", "projection", "auxiliary")),
        "dtype": (dtype, ("float32", "bfloat16")),
    }
    for label, (value, allowed) in choices.items():
        if value not in allowed:
            raise unknown_name(label, value, allowed)
    for label, number in {
        "latent_dim": latent_dim,
        "discriminator_steps": discriminator_steps,
    }.items():
        if number < 1:
            raise ConfigError(f"{label} must be at least 1; got {number}.")
    penalties = {"r1": r1, "r2": r2, "gradient_penalty": gradient_penalty}
    for label, weight in penalties.items():
        if not isinstance(weight, Tracer) and weight < 0:
            raise ConfigError(
                f"{label} is the weight of a penalty and must not be negative; got {weight}."
            )
    if discriminator_norm == "batch":
        if net == "mlp":
            raise ConfigError(
                "discriminator_norm='batch' is for convolutional nets; use net='dcgan' or 'resnet'."
            )
        used = [label for label, weight in penalties.items() if _used(weight)]
        if used:
            raise ConfigError(
                f"{' and '.join(used)}: a gradient penalty is of one example, and batch "
                "normalisation couples them. "
                "Use discriminator_norm='none'."
            )
    if generator_cond == "batch_norm" and generator_norm != "batch":
        raise ConfigError(
            "generator_cond='batch_norm' needs batch normalisation: say generator_norm='batch' as "
            "well."
        )
    if generator_cond == "batch_norm" and net == "mlp" and not hidden:
        raise ConfigError(
            "generator_cond='batch_norm' needs a hidden layer to normalise; got hidden=()."
        )
    if not spec.conditional and (generator_cond, discriminator_cond) != ("concat", "concat"):
        raise ConfigError(
            f"generator_cond={generator_cond!r} and discriminator_cond={discriminator_cond!r} say "
            "where a condition goes, but "
            f"{spec.name} has none. Take conditional data (--conditional), or leave both at "
            "'concat'."
        )
    losses = OBJECTIVES[objective]
    generator, discriminator = _nets(
        spec,
        net,
        latent_dim,
        tuple(hidden),
        tuple(channels),
        (generator_norm == "batch", discriminator_norm == "batch"),
        (generator_cond, discriminator_cond),
        spectral_norm,
        not losses.shift_invariant,
        dtype,
    )

    def init(key: Key) -> tuple[Params, State]:
        key_generator, key_discriminator = jax.random.split(key)
        nets = {
            "generator": generator.init(key_generator),
            "discriminator": discriminator.init(key_discriminator),
        }
        return {name: params for name, (params, _) in nets.items()}, {
            name: state for name, (_, state) in nets.items()
        }

    def condition(cond: Any) -> Array | None:
        return jax.nn.one_hot(cond, spec.n_classes) if spec.n_classes else cond

    def generated(
        params: Params, state: State, z: Array, c: Array | None, train: bool
    ) -> tuple[Array, State]:
        """G(z) on the normalised scale [N, *shape], and the generator's next state."""
        y, new = generator.apply(params["generator"], state["generator"], z, c, train=train)
        return (y if spec.kind == "continuous" else jnp.tanh(y)), new

    def auxiliary_loss(prediction: Array | None, c: Array | None) -> Array | float:
        """-ln p(c | x) of the auxiliary task: a class, or a vector as N(prediction, I) up to a
        constant; nats [N].
        """
        if prediction is None or c is None:
            return 0.0
        if spec.n_classes:
            return -jnp.sum(c * jax.nn.log_softmax(prediction), axis=-1)
        return 0.5 * jnp.sum(jnp.square(prediction - c), axis=-1)

    def latent(key: Key, n: int) -> Array:
        return jax.random.normal(key, (n, latent_dim))

    def discriminator_loss(
        params: Params, state: State, batch: Batch, key: Key, step: Array
    ) -> tuple[Array, Aux]:
        key_z, key_between = jax.random.split(key)
        real, c = spec.normalize(batch.x), condition(batch.cond)
        fake, _ = generated(params, state, latent(key_z, real.shape[0]), c, train=True)
        own, after = params["discriminator"], state["discriminator"]
        (on_real, guess_real), after = discriminator.apply(own, after, real, c, train=True)
        (on_fake, guess_fake), after = discriminator.apply(own, after, fake, c, train=True)
        value = losses.discriminator(on_real, on_fake)
        metrics = {"real_logit": on_real, "fake_logit": on_fake}
        # Odena 2017, equation 3: the discriminator names the class of generated examples, too.
        value += (
            0.5 * auxiliary_weight * (auxiliary_loss(guess_real, c) + auxiliary_loss(guess_fake, c))
        )

        def logit(x: Array) -> Array:
            return discriminator.apply(own, after, x, c, train=False)[0][0]

        between = real
        if _used(gradient_penalty):
            t = jax.random.uniform(key_between, (real.shape[0], *[1] * (real.ndim - 1)))
            between = real + t * (fake - real)
        for weight, penalty, x in (
            (r1, zero_centred_penalty, real),
            (r2, zero_centred_penalty, fake),
            (gradient_penalty, one_centred_penalty, between),
        ):
            if _used(weight):
                value += weight * penalty(logit, x)
        return value, Aux({**state, "discriminator": after}, metrics)

    def generator_loss(
        params: Params, state: State, batch: Batch, key: Key, step: Array
    ) -> tuple[Array, Aux]:
        real, c = spec.normalize(batch.x), condition(batch.cond)
        fake, after = generated(params, state, latent(key, real.shape[0]), c, train=True)
        judge = partial(discriminator.apply, params["discriminator"], state["discriminator"])
        (on_fake, guess), _ = judge(fake, c, train=True)
        (on_real, _), _ = judge(
            real, c, train=True
        )  # for most objectives without effect, and then not computed
        value = losses.generator(on_real, on_fake) + auxiliary_weight * auxiliary_loss(guess, c)
        return value, Aux({**state, "generator": after}, {})

    def generate(params: Params, state: State, z: Array, cond: Any = None) -> Array:
        check_cond(spec, cond, z.shape[0])
        return spec.denormalize(generated(params, state, z, condition(cond), train=False)[0])

    def logit(params: Params, state: State, x: Array, cond: Any = None) -> Array:
        check_cond(spec, cond, x.shape[0])
        own, c = params["discriminator"], condition(cond)
        return discriminator.apply(own, state["discriminator"], spec.normalize(x), c, train=False)[
            0
        ][0]

    def sample(params: Params, state: State, key: Key, n: int, cond: Any = None) -> Array:
        x = generate(params, state, latent(key, n), cond)
        return x if spec.kind == "continuous" else jnp.round(x)

    return checked(
        Model(
            spec=spec,
            init=init,
            losses={"discriminator": discriminator_loss, "generator": generator_loss},
            sample=sample,
            turns=(("discriminator", discriminator_steps), ("generator", 1)),
            extras={"generate": generate, "logit": logit},
        )
    )
