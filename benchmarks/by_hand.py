"""Training steps of every family as anyone would write them in plain jax: nothing of genjax, flax
or optax computes here.

A loss is (params of all players, x, noise) -> the mean over the batch, nats or squared error summed
over the event. Weights have the places that genjax's builders give them, and noise is what the
model's own loss draws (`Model.noise`), so that a step can be compared weight by weight.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

Loss = Callable[[Any, Array, Any], Array]
Draw = Callable[[Array, Array], Any]  # (key, x) -> noise
SOFTENING = 1 / 400  # keeps the noise level of straight lines finite at their ends


class HandWritten(NamedTuple):
    """A hand-written training: init(params, key) -> state and step(state, x) -> (state, loss of the
    last player).
    """

    init: Callable[..., Any]
    step: Callable[..., Any]


def adam(losses: Mapping[str, Loss], draws: Mapping[str, Draw], rate: float = 1e-3) -> HandWritten:
    """Each player in turn takes a step of Adam on its own loss, with the noise of its own draw."""

    def init(params: Any, key: Array) -> dict[str, Any]:
        return {
            "params": params,
            "m": jax.tree.map(jnp.zeros_like, params),
            "v": jax.tree.map(jnp.zeros_like, params),
            "count": jnp.zeros((), jnp.int32),
            "key": key,
        }

    def step(ts: Any, x: Array) -> Any:
        params, m, v, count = dict(ts["params"]), dict(ts["m"]), dict(ts["v"]), ts["count"] + 1
        c1, c2 = 1 - 0.9 ** count.astype(jnp.float32), 1 - 0.999 ** count.astype(jnp.float32)
        value = jnp.zeros(())
        for turn, (player, loss) in enumerate(losses.items()):
            key = jax.random.fold_in(ts["key"], ts["count"] * len(losses) + turn)
            noise = draws[player](key, x)
            value, grads = jax.value_and_grad(lambda own: loss({**params, player: own}, x, noise))(
                params[player]
            )
            m[player] = jax.tree.map(lambda m, g: 0.9 * m + 0.1 * g, m[player], grads)
            v[player] = jax.tree.map(lambda v, g: 0.999 * v + 0.001 * g * g, v[player], grads)
            params[player] = jax.tree.map(
                lambda p, m, v: p - rate * (m / c1) / (jnp.sqrt(v / c2) + 1e-8),
                params[player],
                m[player],
                v[player],
            )
        return {"params": params, "m": m, "v": v, "count": count, "key": ts["key"]}, value

    return HandWritten(jax.jit(init), jax.jit(step, donate_argnums=0))


def dense(p: Any, x: Array) -> Array:
    """x W + b, or x Wᵀ where the kernel is kept transposed."""
    kernel = p["kernel"] if p["kernel"].shape[0] == x.shape[-1] else p["kernel"].T
    y = x @ kernel
    return y + p["bias"] if "bias" in p else y


def mlp(p: Any, x: Array, activation: Callable[[Array], Array]) -> Array:
    """Dense layers with an activation between them."""
    *inner, last = (p["layers"][i] for i in sorted(p["layers"]))
    for layer in inner:
        x = activation(dense(layer, x))
    return dense(last, x)


def categorical(x: Array, logits: Array) -> Array:
    """ln softmax(logits)[x]."""
    return jnp.take_along_axis(jax.nn.log_softmax(logits), x[..., None].astype(jnp.int32), axis=-1)[
        ..., 0
    ]


# --- one event ------------------------------------------------------------------------------------


def vae_loss(params: Any, x: Array, noise: Any) -> Array:
    """A Bernoulli VAE of binary images."""
    p, flat = params["vae"], x.reshape(x.shape[0], -1)
    mean, log_scale = jnp.split(mlp(p["encoder"], 2.0 * flat - 1.0, jax.nn.gelu), 2, axis=1)
    z = mean + jnp.exp(log_scale) * noise.epsilon[0]
    logits = mlp(p["decoder"], z, jax.nn.gelu)
    log_likelihood = jnp.sum(flat * logits - jax.nn.softplus(logits), axis=1)
    kl = jnp.sum(0.5 * (jnp.exp(2 * log_scale) + mean**2 - 1) - log_scale, axis=1)
    return jnp.mean(kl - log_likelihood)


def gan_losses(r1: float) -> dict[str, Loss]:
    """The non-saturating game over vectors, with a gradient penalty on real ones."""

    def generate(p: Any, h: Array) -> Array:
        for i in sorted(p["layers"]):
            h = jax.nn.relu(dense(p["layers"][i], h))
        return dense(p["last"], h)

    def logit(p: Any, h: Array) -> Array:
        for i in sorted(p["features"]["layers"]):
            h = jax.nn.leaky_relu(dense(p["features"]["layers"][i]["layer"], h), 0.2)
        return dense(p["logit"]["layer"], h)[:, 0]

    def discriminator(params: Any, x: Array, noise: Any) -> Array:
        own = params["discriminator"]
        fake = generate(params["generator"], noise.z)
        slope = jax.grad(lambda x: jnp.sum(logit(own, x)))(x)
        penalty = 0.5 * r1 * jnp.sum(slope**2, axis=1)
        return jnp.mean(
            jax.nn.softplus(-logit(own, x)) + jax.nn.softplus(logit(own, fake)) + penalty
        )

    def generator(params: Any, x: Array, noise: Any) -> Array:
        fake = generate(params["generator"], noise.z)
        return jnp.mean(jax.nn.softplus(-logit(params["discriminator"], fake)))

    return {"discriminator": discriminator, "generator": generator}


def denoiser(p: Any, x: Array, level: Array) -> Array:
    """Hidden layers that know of the noise level [B, 1]."""
    angles = level * jnp.geomspace(0.25, 8.0, 16)
    e = jnp.concatenate([jnp.cos(angles), jnp.sin(angles)], axis=1)
    e = jax.nn.silu(dense(p["embed"]["last"], jax.nn.silu(dense(p["embed"]["noise"], e))))
    h = x
    for i in sorted(p["layers"]):
        scale, shift = jnp.split(dense(p["modulations"][i], e), 2, axis=1)
        y = jax.nn.silu((1 + scale) * dense(p["layers"][i], h) + shift)
        h = h + y if h.shape == y.shape else y
    return dense(p["last"], h)


def diffusion_loss(params: Any, x: Array, noise: Any) -> Array:
    """Diffusion of vectors with the cosine schedule and v-prediction."""
    angle, epsilon = jnp.pi / 2 * noise.t[:, None], noise.epsilon
    alpha, sigma = jnp.cos(angle), jnp.sin(angle)
    level = (jnp.log(alpha) - jnp.log(sigma)) / 2
    found = denoiser(params["diffusion"]["net"], alpha * x + sigma * epsilon, level)
    return jnp.mean(jnp.sum((found - (alpha * epsilon - sigma * x)) ** 2, axis=1))


def flow_matching_loss(params: Any, x: Array, noise: Any) -> Array:
    """The velocity of straight lines between vectors and noise."""
    t, epsilon = noise.t[:, None], noise.epsilon
    level = 0.5 * (jnp.log(1 - t + SOFTENING) - jnp.log(t + SOFTENING))
    found = denoiser(params["flow"], (1 - t) * x + t * epsilon, level)
    return jnp.mean(jnp.sum((found - (epsilon - x)) ** 2, axis=1))


# --- sequences ------------------------------------------------------------------------------------


def vanilla(p: Any, a: Array, carry: Any) -> Any:
    """tanh(a + h U)."""
    return (jnp.tanh(a + carry[0] @ p["kernel"]),)


def lstm(p: Any, a: Array, carry: Any) -> Any:
    """Input, forget and output gates around a cell."""
    i, f, g, o = jnp.split(a + carry[0] @ p["kernel"], 4, axis=1)
    c = jax.nn.sigmoid(f) * carry[1] + jax.nn.sigmoid(i) * jnp.tanh(g)
    return jax.nn.sigmoid(o) * jnp.tanh(c), c


def gru(p: Any, a: Array, carry: Any) -> Any:
    """Reset and update gates; the reset comes after the product."""
    a_r, a_z, a_n = jnp.split(a, 3, axis=1)
    u_r, u_z, u_n = jnp.split(carry[0] @ p["kernel"], 3, axis=1)
    r, z = jax.nn.sigmoid(a_r + u_r), jax.nn.sigmoid(a_z + u_z)
    n = jnp.tanh(a_n + r * (u_n + p["bias"]))
    return ((1 - z) * n + z * carry[0],)


def shifted(p: Any, x: Array) -> Array:
    """Tokens [B, T] -> a learned start and the vectors of all tokens but the last, [B, T, d]."""
    start = jnp.broadcast_to(p["start"], (x.shape[0], 1, p["start"].shape[0]))
    return jnp.concatenate([start, p["table"][x[:, :-1]]], axis=1)


def recurrent_loss(cell: Callable[[Any, Array, Any], Any], n_carry: int) -> Loss:
    """One recurrent layer over tokens."""

    def loss(params: Any, x: Array, noise: Any) -> Array:
        p = params["rnn"]
        layer = p["layers"]["layers"][0]
        a = dense(layer["inputs"], shifted(p["embed"], x).swapaxes(0, 1))

        def step(carry: Any, a: Array) -> Any:
            carry = cell(layer, a, carry)
            return carry, carry[0]

        zeros = jnp.zeros((x.shape[0], layer["kernel"].shape[0]))
        h = jax.lax.scan(step, (zeros,) * n_carry, a)[1]
        return -jnp.mean(jnp.sum(categorical(x.T, dense(p["readout"], h)), axis=0))

    return loss


def transformer_loss(n_heads: int) -> Loss:
    """Blocks of causal attention with turned positions and of two dense layers, over tokens."""

    def norm(p: Any, h: Array) -> Array:
        h = h - jnp.mean(h, axis=-1, keepdims=True)
        return h / jnp.sqrt(jnp.mean(h**2, axis=-1, keepdims=True) + 1e-5) * p["scale"]

    def turned(x: Array) -> Array:  # [B, T, heads, h]
        half = x.shape[-1] // 2
        angles = jnp.arange(x.shape[1], dtype=x.dtype)[:, None] * 10000.0 ** (
            -jnp.arange(half) / half
        )
        cos, sin, a, b = (
            jnp.cos(angles)[:, None],
            jnp.sin(angles)[:, None],
            x[..., :half],
            x[..., half:],
        )
        return jnp.concatenate([a * cos - b * sin, a * sin + b * cos], axis=-1)

    def attention(p: Any, h: Array) -> Array:
        n, t, d = h.shape
        q, k, v = (
            y.reshape(n, t, n_heads, -1)
            for y in jnp.split(dense(p["qkv"], norm(p["norm"], h)), 3, axis=-1)
        )
        scores = jnp.einsum("nihd,njhd->nhij", turned(q), turned(k)) * (d // n_heads) ** -0.5
        weights = jax.nn.softmax(jnp.where(jnp.tril(jnp.ones((t, t), bool)), scores, -jnp.inf))
        return dense(p["out"], jnp.einsum("nhij,njhd->nihd", weights, v).reshape(n, t, d))

    def loss(params: Any, x: Array, noise: Any) -> Array:
        p = params["transformer"]
        h = shifted(p["inputs"]["events"], x)
        for i in sorted(p["blocks"]):
            block = p["blocks"][i]
            h = h + attention(block["attention"], h)
            feed = block["feed_forward"]
            h = h + dense(feed["down"], jax.nn.gelu(dense(feed["up"], norm(feed["norm"], h))))
        logits = dense(p["readout"]["dense"], norm(p["readout"]["norm"], h))
        return -jnp.mean(jnp.sum(categorical(x, logits), axis=1))

    return loss


def vrnn_loss(levels: int) -> Loss:
    """The ELBO of a VRNN with a GRU and one hidden layer everywhere, over rows of whole numbers [B,
    T, n].
    """
    relu = jax.nn.relu

    def normal(outputs: Array) -> tuple[Array, Array]:
        mean, raw = jnp.split(outputs, 2, axis=-1)
        return mean, jnp.log(jax.nn.softplus(raw) + 1e-3)

    def joint(p: Any, first: Array, h: Array) -> Array:
        return mlp(p["rest"], relu(first + dense(p["second"], h)), relu)

    def loss(params: Any, x: Array, noise: Any) -> Array:
        p, (n, n_steps, size) = params["vrnn"], x.shape
        layer, rows = p["layer"], x.swapaxes(0, 1)
        features = relu(dense(p["embed"]["dense"], rows * (2 / (levels - 1)) - 1))
        zeros = jnp.zeros((n, layer["kernel"].shape[0]))
        start = dense(
            layer["inputs"], relu(jnp.broadcast_to(p["embed"]["start"], (n, features.shape[-1])))
        )
        keys = jax.vmap(lambda t: jax.random.fold_in(noise.paths, t))(jnp.arange(n_steps))

        def step(carry: Any, at: Any) -> Any:
            first, a, key = at
            mean, log_scale = normal(joint(p["encoder"], first, carry[0]))
            z = mean + jnp.exp(log_scale) * jax.random.normal(key, mean.shape)
            of_z = relu(mlp(p["z_features"], z, relu))
            return gru(layer, a + dense(p["z_inputs"], of_z), carry), (
                carry[0],
                of_z,
                mean,
                log_scale,
            )

        seen = (dense(p["encoder"]["first"], features), dense(layer["inputs"], features), keys)
        h, of_z, mean, log_scale = jax.lax.scan(step, gru(layer, start, (zeros,)), seen)[1]
        logits = joint(p["decoder"], dense(p["decoder"]["first"], of_z), h).reshape(
            n_steps, n, size, levels
        )
        prior_mean, prior_log_scale = normal(mlp(p["prior"], h, relu))
        ratio = (
            jnp.exp(2 * (log_scale - prior_log_scale))
            + ((mean - prior_mean) * jnp.exp(-prior_log_scale)) ** 2
        )
        kl = jnp.sum(0.5 * (ratio - 1) - (log_scale - prior_log_scale), axis=(0, 2))
        return jnp.mean(kl - jnp.sum(categorical(rows, logits), axis=(0, 2)))

    return loss
