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

from genjax import nets
from genjax.checks import check_cond, check_whole, checked
from genjax.errors import ConfigError
from genjax.nets.functional import Net, functional
from genjax.nets.own import Call, Network, batch_statistics, given_only, judging, own_net
from genjax.nets.platforms import beside
from genjax.parts.adversarial import (
    OBJECTIVES,
    Objective,
    one_centred_penalty,
    zero_centred_penalty,
)
from genjax.protocol import (
    Array,
    Aux,
    Batch,
    DataSpec,
    Key,
    Metrics,
    Model,
    Params,
    State,
    dtype_of,
)
from genjax.settings import Count, Depth, Dtype, NonNegative, Positive, builder, used

# --- the game -------------------------------------------------------------------------------------


class Game(NamedTuple):
    """The pieces of a GAN. The functions below take it.

    Attributes:
        spec: the data.
        latent_dim: dimensions of z.
        generator: (z, condition [N, E] or None, train=...) -> an event, without a last activation.
        discriminator: (x, condition, train=...) -> a logit [N], and an auxiliary task's prediction.
        objective: the two losses.
        r1, r2, gradient_penalty, auxiliary_weight: weights of what is added to them.
    """

    spec: DataSpec
    latent_dim: int
    generator: Net
    discriminator: Net
    objective: Objective
    r1: Array | float
    r2: Array | float
    gradient_penalty: Array | float
    auxiliary_weight: Array | float


class Noise(NamedTuple):
    """What a loss draws: z [B, latent_dim], and t [B, 1, ...] ~ U(0, 1) of the points between, or
    None where no penalty is taken there.
    """

    z: Array
    t: Array | None = None


class Players(NamedTuple):
    """What a GAN offers beside samples, on events in the units of the data.

    Attributes:
        generate: (params, state, z, cond=None) -> G(z), not rounded, [B, *shape].
        logit: (params, state, x, cond=None) -> D(x), [B].
    """

    generate: Callable[..., Array]
    logit: Callable[..., Array]


def draw_latent(latent_dim: int, key: Key, n: int, dtype: Any = jnp.float32) -> Array:
    """z ~ N(0, I), [n, latent_dim]."""
    return jax.random.normal(key, (n, latent_dim), dtype)


def discriminator_noise(game: Game, key: Key, batch: Batch) -> Noise:
    """What a turn of the discriminator draws: z, and t where there is a gradient penalty."""
    key_z, key_between = jax.random.split(key)
    n, ndim, dtype = batch.x.shape[0], len(game.spec.shape), nets.layers.wide(batch.x.dtype)
    z = beside(draw_latent(game.latent_dim, key_z, n, dtype), batch.x)
    if not used(game.gradient_penalty):
        return Noise(z)
    return Noise(z, jax.random.uniform(key_between, (n, *[1] * ndim), dtype))


def generator_noise(game: Game, key: Key, batch: Batch) -> Noise:
    """What a turn of the generator draws: z."""
    n, dtype = batch.x.shape[0], nets.layers.wide(batch.x.dtype)
    return Noise(beside(draw_latent(game.latent_dim, key, n, dtype), batch.x))


def generated(
    game: Game, params: Params, state: State, z: Array, c: Array | None, train: bool
) -> tuple[Array, State]:
    """G(z) on the normalised scale [N, *shape], and the generator's next state."""
    own, before = params["generator"], state["generator"]
    y, after = game.generator.apply(own, before, z, c, train=train)
    return (y if game.spec.kind == "continuous" else jnp.tanh(y)), after


def auxiliary_loss(spec: DataSpec, prediction: Array | None, c: Array | None) -> Array | float:
    """-ln p(c | x) of the auxiliary task: a class, or a vector as N(prediction, I) up to a
    constant; nats [N].
    """
    if prediction is None or c is None:
        return 0.0
    if spec.n_classes:
        return -jnp.sum(c * jax.nn.log_softmax(prediction), axis=-1)
    return 0.5 * jnp.sum(jnp.square(prediction - c), axis=-1)


def penalties(
    game: Game, logit: Callable[[Array], Array], real: Array, fake: Array, noise: Noise
) -> list[Array]:
    """The gradient penalties that are used, weighted, [B] each."""
    found = []
    if used(game.r1):
        found.append(game.r1 * zero_centred_penalty(logit, real))
    if used(game.r2):
        found.append(game.r2 * zero_centred_penalty(logit, fake))
    if noise.t is not None:
        between = real + noise.t * (fake - real)
        found.append(game.gradient_penalty * one_centred_penalty(logit, between))
    return found


def discriminator_loss(
    game: Game, params: Params, state: State, batch: Batch, noise: Noise
) -> tuple[Array, Metrics, State]:
    """The discriminator's loss [B], what is reported, and its next state."""
    spec, apply = game.spec, game.discriminator.apply
    real, c = spec.normalize(batch.x), spec.embed(batch.cond, params)
    fake, _ = generated(game, params, state, noise.z, c, train=True)
    own, after = params["discriminator"], state["discriminator"]
    (on_real, guess_real), after = apply(own, after, real, c, train=True)
    (on_fake, guess_fake), after = apply(own, after, fake, c, train=True)
    # Odena 2017, equation 3: the discriminator names the class of generated examples, too.
    guesses = auxiliary_loss(spec, guess_real, c) + auxiliary_loss(spec, guess_fake, c)

    def logit(x: Array) -> Array:
        return apply(own, after, x, c, train=False)[0][0]

    value = game.objective.discriminator(on_real, on_fake)
    value += 0.5 * game.auxiliary_weight * guesses
    for penalty in penalties(game, logit, real, fake, noise):
        value += penalty
    return value, {"real_logit": on_real, "fake_logit": on_fake}, after


def generator_loss(
    game: Game, params: Params, state: State, batch: Batch, noise: Noise
) -> tuple[Array, State]:
    """The generator's loss [B], and its next state."""
    spec = game.spec
    real, c = spec.normalize(batch.x), spec.embed(batch.cond, params)
    fake, after = generated(game, params, state, noise.z, c, train=True)
    judge = partial(game.discriminator.apply, params["discriminator"], state["discriminator"])
    (on_fake, guess), _ = judge(fake, c, train=True)
    # For most objectives without effect, and then not computed.
    (on_real, _), _ = judge(real, c, train=True)
    value = game.objective.generator(on_real, on_fake)
    return value + game.auxiliary_weight * auxiliary_loss(spec, guess, c), after


# --- assembly -------------------------------------------------------------------------------------


def _own_players(
    spec: DataSpec,
    made: tuple[Net, Net],
    own: tuple[Network | None, Network | None],
    latent_dim: int,
    dtype: str,
) -> tuple[Net, Net]:
    """Generator and discriminator, each the user's own where there is one."""
    cond = [("cond", (spec.cond_size,))] if spec.conditional else []
    generator, discriminator = made
    if own[0] is not None:
        inputs = [("z", (latent_dim,)), *cond]
        call = Call("the generator of a GAN", inputs, spec.shape, trains=True)
        generator = given_only(own_net(own[0], call, dtype))
    if own[1] is not None:
        inputs = [("x", spec.shape), *cond]
        call = Call("the discriminator of a GAN", inputs, (), trains=True)
        discriminator = judging(given_only(own_net(own[1], call, dtype)))
    return generator, discriminator


# Settings of the networks that are here, and what they are where nobody gives them.
OF_PLAYERS: dict[str, dict[str, Any]] = {
    "generator": {"generator_norm": "none", "generator_cond": "concat"},
    "discriminator": {
        "discriminator_norm": "none",
        "discriminator_cond": "concat",
        "spectral_norm": False,
    },
}


def _check_own(own: dict[str, Network | None], given: dict[str, Any]) -> None:
    """Refuse settings of a network that a user's own stands in the place of."""
    for player, usual in OF_PLAYERS.items():
        names = [name for name, value in usual.items() if given[name] != value]
        if own[player] is not None and names:
            raise ConfigError(
                f"{' and '.join(names)}: for the {player} that is here. With one of your own leave "
                "it out, and write into the network what it does."
            )


def initial(game: Game, key: Key) -> tuple[Params, State]:
    """Random parameters, and what both players carry."""
    key_generator, key_discriminator = jax.random.split(key)
    params, state = {}, {}
    params["generator"], state["generator"] = game.generator.init(key_generator)
    params["discriminator"], state["discriminator"] = game.discriminator.init(key_discriminator)
    return params, state


def _check_penalties(coupled: bool, weights: dict[str, Any], remedy: str) -> None:
    """Refuse gradient penalties of a discriminator that normalises by statistics of batches."""
    penalised = [name for name, weight in weights.items() if used(weight)]
    if coupled and penalised:
        raise ConfigError(
            f"{' and '.join(penalised)}: a gradient penalty is of one example, and batch "
            f"normalisation couples them. {remedy}"
        )


def _check_norms(
    net: str,
    hidden: tuple[int, ...],
    generator: tuple[str, str],
    discriminator: str,
    weights: dict[str, Any],
) -> None:
    """Refuse normalisations that do not fit the net, the penalties or each other. `generator` is
    its norm and where it takes a condition.
    """
    norm, where = generator
    if discriminator == "batch" and net == "mlp":
        raise ConfigError(
            "discriminator_norm='batch' is for convolutional nets; use net='dcgan' or 'resnet'."
        )
    _check_penalties(discriminator == "batch", weights, "Use discriminator_norm='none'.")
    if where == "batch_norm" and norm != "batch":
        raise ConfigError(
            "generator_cond='batch_norm' needs batch normalisation: say generator_norm='batch' as "
            "well."
        )
    if where == "batch_norm" and net == "mlp" and not hidden:
        raise ConfigError(
            "generator_cond='batch_norm' needs a hidden layer to normalise; got hidden=()."
        )


def _check_data(spec: DataSpec, generator_cond: str, discriminator_cond: str) -> None:
    check_whole(spec, "A GAN")
    if not spec.conditional and (generator_cond, discriminator_cond) != ("concat", "concat"):
        raise ConfigError(
            f"generator_cond={generator_cond!r} and discriminator_cond={discriminator_cond!r} say "
            f"where a condition goes, but {spec.name} has none. Take conditional data "
            "(--conditional), or leave both at 'concat'."
        )


def _players(game: Game) -> Players:
    spec = game.spec

    def generate(params: Params, state: State, z: Array, cond: Any = None) -> Array:
        check_cond(spec, cond, z.shape[0])
        y, _ = generated(game, params, state, z, spec.embed(cond, params), train=False)
        return spec.denormalize(y)

    def logit(params: Params, state: State, x: Array, cond: Any = None) -> Array:
        check_cond(spec, cond, x.shape[0])
        apply = partial(game.discriminator.apply, params["discriminator"], state["discriminator"])
        return apply(spec.normalize(x), spec.embed(cond, params), train=False)[0][0]

    return Players(generate, logit)


def assembled(game: Game, discriminator_steps: int) -> Model:
    """The game as a model."""
    players = _players(game)

    def discriminator_turn(
        params: Params, state: State, batch: Batch, key: Key, step: Array
    ) -> tuple[Array, Aux]:
        noise = discriminator_noise(game, key, batch)
        value, metrics, after = discriminator_loss(game, params, state, batch, noise)
        return value, Aux({**state, "discriminator": after}, metrics)

    def generator_turn(
        params: Params, state: State, batch: Batch, key: Key, step: Array
    ) -> tuple[Array, Aux]:
        noise = generator_noise(game, key, batch)
        value, after = generator_loss(game, params, state, batch, noise)
        return value, Aux({**state, "generator": after}, {})

    def sample(params: Params, state: State, key: Key, n: int, cond: Any = None) -> Array:
        z = draw_latent(game.latent_dim, key, n, dtype_of(params))
        x = players.generate(params, state, z, cond)
        return x if game.spec.kind == "continuous" else jnp.round(x)

    return Model(
        spec=game.spec,
        init=partial(initial, game),
        losses={"discriminator": discriminator_turn, "generator": generator_turn},
        sample=sample,
        turns=(("discriminator", discriminator_steps), ("generator", 1)),
        noise={
            "discriminator": partial(discriminator_noise, game),
            "generator": partial(generator_noise, game),
        },
        extras=players,
    )


@builder
def gan(
    spec: DataSpec,
    *,
    latent_dim: Count = 16,
    net: Literal["mlp", "dcgan", "resnet"] = "mlp",
    hidden: tuple[Count, ...] = (128, 128),
    channels: tuple[Count, ...] = (32, 64),
    objective: Literal[
        "minimax", "nonsaturating", "least_squares", "hinge", "wasserstein", "relativistic"
    ] = "nonsaturating",
    r1: NonNegative = 0.0,
    r2: NonNegative = 0.0,
    gradient_penalty: NonNegative = 0.0,
    spectral_norm: bool = False,
    generator_norm: Literal["none", "batch"] = "none",
    discriminator_norm: Literal["none", "batch"] = "none",
    generator_cond: Literal["concat", "batch_norm"] = "concat",
    discriminator_cond: Literal["concat", "projection", "auxiliary"] = "concat",
    auxiliary_weight: Positive = 1.0,
    discriminator_steps: Depth = 1,
    dtype: Dtype = "float32",
    generator: Network | None = None,
    discriminator: Network | None = None,
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

    `extras` are `Players`.

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
        spectral_norm: divide each of the discriminator's kernels by its largest singular value, but
            not that of the auxiliary task's head.
        generator_norm: normalisation between the generator's layers.
        discriminator_norm: normalisation between the discriminator's convolutions.
        generator_cond: where the generator takes a condition: beside z, or in its batch
            normalisations.
        discriminator_cond: where the discriminator takes it: beside x, as a projection, or as an
            auxiliary task to predict.
        auxiliary_weight: weight of the auxiliary task's loss, in nats, for both players.
        discriminator_steps: turns of the discriminator for one of the generator.
        dtype: of the networks' arithmetic; parameters and losses stay float32.
        generator: in Python, a Flax module of one's own in the place of that of `net`: (z [n,
            latent_dim], and cond [n, cond_size] where there is one) -> [n, *shape], without a last
            activation; with `train`, where its call has such an argument, and then statistics of
            batches are kept in the state. See `nets.own`.
        discriminator: the same, (normalised x [n, *shape], and cond) -> a logit [n].

    Raises:
        ConfigError: for settings that do not exist or do not fit the data or each other.

    Example:
        >>> import jax
        >>> from genjax import DataSpec, gan
        >>> model = gan(DataSpec((2,), "continuous"), latent_dim=3, hidden=(8,), r1=1.0)
        >>> params, state = model.init(jax.random.key(0))
        >>> x = model.sample(params, state, jax.random.key(1), 5)
        >>> model.extras.logit(params, state, x).shape
        (5,)
        >>> model.turns
        (('discriminator', 1), ('generator', 1))
    """
    weights = {"r1": r1, "r2": r2, "gradient_penalty": gradient_penalty}
    _check_data(spec, generator_cond, discriminator_cond)
    _check_norms(net, hidden, (generator_norm, generator_cond), discriminator_norm, weights)
    own = {"generator": generator, "discriminator": discriminator}
    given = {
        "generator_norm": generator_norm,
        "generator_cond": generator_cond,
        "discriminator_norm": discriminator_norm,
        "discriminator_cond": discriminator_cond,
        "spectral_norm": spectral_norm,
    }
    _check_own(own, given)
    widths, losses = tuple(hidden if net == "mlp" else channels), OBJECTIVES[objective]
    of_generator = nets.gan.generator(spec, net, widths, latent_dim, generator_norm, generator_cond)
    of_discriminator = nets.gan.discriminator(
        spec,
        net,
        widths,
        discriminator_norm,
        discriminator_cond,
        spectral_norm,
        bias=not losses.shift_invariant,
    )
    made = functional(of_generator, dtype), functional(of_discriminator, dtype)
    nets_of = _own_players(spec, made, (generator, discriminator), latent_dim, dtype)
    _check_penalties(
        discriminator is not None and batch_statistics(nets_of[1]),
        weights,
        "Take a discriminator without, such as one with LayerNorm or GroupNorm.",
    )
    game = Game(
        spec,
        latent_dim,
        *nets_of,
        losses,
        auxiliary_weight=auxiliary_weight,
        **weights,
    )
    labels = nets.gan.labels(spec, net, len(widths), [name for name in own if own[name] is None])
    return checked(assembled(game, discriminator_steps)._replace(labels=labels))
