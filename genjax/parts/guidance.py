"""Guidance: predictions put together. For arrays such as logits, `classifier_free`; the rest are
wrappers, denoise -> denoise.

A `Denoise` is a plain callable, (x_t [n, *event], t []) -> an estimate of E[x0 | x_t] (`paths.py`),
so all of these serve diffusion and flow matching alike, with every solver, and compose with each
other. The score is (alpha x0 - x_t) / sigma²: where weights sum to 1, mixing estimates of x0 is
mixing scores, that is multiplying powers of the densities of x_t.

What they say of densities holds at each t for the noisy densities p_t. The solver's samples follow
those of the product of powers at t = 0 only approximately, because adding noise to a product is not
the product of noisy densities (Du 2023).
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp

from genjax.errors import ConfigError
from genjax.parts.paths import Denoise, Path, coefficients
from genjax.protocol import Array


def classifier_free(conditional: Array, unconditional: Array, scale: Array | float) -> Array:
    """(1 - s) u + s c: the conditional prediction c moved away from the unconditional one u, or
    towards it for s < 1.

    For logits it is the distribution proportional to p(x)^(1-s) p(x|c)^s; for predictions of noise
    or scores it is the score of that density. Scale 1 is c and scale 0 is u, bit for bit. Ho &
    Salimans 2022, equation 6, where s is written 1 + w.

    Args:
        conditional: c, any shape; the result has its shape and dtype.
        unconditional: u, the same shape.
        scale: s, one number (it may be traced) or an array of the same rank that broadcasts.

    Raises:
        ConfigError: for an array of another rank: one number for each example would be taken for
            one of each entry of the last axis where there are as many.
    """
    s = jnp.asarray(scale, conditional.dtype)
    if s.size > 1 and s.ndim != conditional.ndim:
        raise ConfigError(
            f"A scale of guidance is one number, or has as many axes as what it scales, of shape "
            f"{list(conditional.shape)}; got shape {list(s.shape)}. One for each example is "
            f"scale.reshape({', '.join(['-1'] + ['1'] * (conditional.ndim - 1))})."
        )
    mixed = (1 - s) * unconditional + s * conditional
    # At the ends the other prediction must not come in at all, be it infinite (a logit of -inf) or
    # of another zero's sign.
    return jnp.where(s == 1, conditional, jnp.where(s == 0, unconditional, mixed))


def guided(conditional: Denoise, unconditional: Denoise, scale: Array | float) -> Denoise:
    """(1 - s) u + s c of two estimates of x0: `classifier_free` for a denoiser, which is called
    twice.

    Its score is that of p_t(x)^(1-s) p_t(x|c)^s. Scale 1 is the conditional, 0 the unconditional,
    bit for bit. Ho & Salimans 2022, equation 6, where s is written 1 + w.
    """
    return lambda x, t: classifier_free(conditional(x, t), unconditional(x, t), scale)


def autoguidance(good: Denoise, bad: Denoise, scale: Array | float) -> Denoise:
    """(1 - s) b + s g: away from a worse model of the same data and the same condition, smaller or
    less trained. Scale 1 is the good model. Karras 2024 (guiding with a bad version of itself).
    """
    return guided(good, bad, scale)


def negative(conditional: Denoise, unwanted: Denoise, scale: Array | float) -> Denoise:
    """(1 - s) n + s c: away from an unwanted condition n instead of from the unconditional model;
    scale 1 ignores it.

    Its score is that of p_t(x|c)^s p_t(x|n)^(1-s).
    """
    return guided(conditional, unwanted, scale)


def interval(
    path: Path, inside: Denoise, outside: Denoise, low: Array | float, high: Array | float
) -> Denoise:
    """`inside`, such as a guided denoiser, where low <= sigma / alpha <= high, and `outside`
    elsewhere; only one is called.

    Kynkäänniemi 2024, who guide at medium noise only; their sigma is that of a path with alpha = 1.
    """

    def denoise(x: Array, t: Array) -> Array:
        ratio = path.sigma(t) / path.alpha(t)
        within = (jnp.asarray(low, ratio.dtype) <= ratio) & (
            ratio <= jnp.asarray(high, ratio.dtype)
        )
        return jax.lax.cond(within, inside, outside, x, t)

    return denoise


def _inverse(alpha: Array) -> Array:
    """1 / alpha, and 0 for alpha = 0, where x_t is noise alone and says nothing of x0."""
    some = alpha > 0
    return jnp.where(some, 1 / jnp.where(some, alpha, 1), 0)


def classifier(
    denoise: Denoise, path: Path, log_classifier: Denoise, scale: Array | float
) -> Denoise:
    """x0 + s sigma² / alpha grad_x ln p(c | x_t): towards what a classifier of noisy events takes
    for c.

    With the classifier that Bayes' rule gives and scale 1 it is the conditional denoiser. Where
    alpha = 0 nothing is added. Dhariwal & Nichol 2021, section 4, whose classifier gradient is
    scaled by s in the same way.

    Args:
        denoise: the unconditional model.
        path: of the model.
        log_classifier: (x_t [n, *event], t []) -> ln p(c | x_t) in nats, [n], the wanted class c
            bound in.
        scale: s.
    """

    def guided_denoise(x: Array, t: Array) -> Array:
        alpha, sigma = coefficients(path, t, x)
        gradient = jax.grad(lambda x: log_classifier(x, t).sum())(x)
        return (
            denoise(x, t)
            + jnp.asarray(scale, x.dtype) * jnp.square(sigma) * _inverse(alpha) * gradient
        )

    return guided_denoise


def product(
    path: Path,
    experts: Sequence[Denoise],
    weights: Sequence[Array | float] | Array,
    base: Denoise | None = None,
) -> Denoise:
    """b + Σ_i w_i (x0_i - b): the product of experts Π_i p_i,t(x)^(w_i) p_b,t(x)^(1 - Σ_i w_i),
    whose scores are summed.

    With the unconditional model as base b and weights 1 it asks for all conditions at once, as if
    they were independent given x (Liu 2022). With no base b is x_t / alpha, whose score is 0: the
    plain product of the experts. One expert with a base is `guided`.

    Raises:
        ConfigError: for no expert, or not as many weights as experts.
    """
    if not experts or len(experts) != len(weights):
        raise ConfigError(
            f"A product needs one weight for each of its experts; got {len(experts)} and "
            f"{len(weights)}."
        )

    def denoise(x: Array, t: Array) -> Array:
        start = x * _inverse(coefficients(path, t, x)[0]) if base is None else base(x, t)
        terms = [
            jnp.asarray(w, x.dtype) * (expert(x, t) - start)
            for w, expert in zip(weights, experts, strict=True)
        ]
        return start + sum(terms[1:], start=terms[0])

    return denoise


def inpaint(denoise: Denoise, known: Array, mask: Array) -> Denoise:
    """The known values where the mask is true, and the denoiser's estimate of x0 elsewhere.

    A solver then carries known pixels along alpha known + sigma epsilon, to the known values at
    sigma = 0: DDIM and the ancestral solver exactly, as any does on straight paths, others to their
    accuracy. This is the replacement method of Song 2021 (section 5), where the noise of the known
    pixels is that which the sample began with, or an ancestral step draws.

    The rest is drawn approximately from p(x | known). At every t the model sees the known pixels
    through noise, and what the unknown ones miss of them at high noise they do not make up for
    later: they are right where they are independent of the known ones, and too little pulled
    towards them where they are not. For two standard normals with correlation 1/2 the ODE moves the
    mean by 0.36 of what it should, and leaves a variance of 0.89 instead of 0.75. Langevin steps at
    each t (`solvers.corrected`) take that away as they grow in number.

    Args:
        denoise: the model.
        known: [*event] or [n, *event], in the model's units; its values outside of the mask do not
            matter.
        mask: bool, true where known, [*event] or [n, *event].

    Raises:
        ConfigError: for a mask that is of another shape than the events, or known values that are;
            it names both.
    """
    known, mask = jnp.asarray(known), jnp.asarray(mask)
    if mask.dtype != bool:
        raise ConfigError(
            f"An inpainting mask is bool, true where the values are known; got {mask.dtype}."
        )

    def replaced(x: Array, t: Array) -> Array:
        for what, array in (("mask", mask), ("known values", known)):
            if array.shape not in (x.shape, x.shape[1:]):
                raise ConfigError(
                    f"The {what} of inpainting must have the shape of an event, "
                    f"{list(x.shape[1:])}, or of all, "
                    f"{list(x.shape)}; got {list(array.shape)}."
                )
        everywhere, given = (
            jnp.broadcast_to(array.reshape(-1, *x.shape[1:]), x.shape) for array in (mask, known)
        )
        return jnp.where(everywhere, given.astype(x.dtype), denoise(x, t))

    return replaced


def rescale(inside: Denoise, conditional: Denoise, phi: Array | float = 0.7) -> Denoise:
    """g (phi std(c) / std(g) + 1 - phi): a guided estimate g with the standard deviation of the
    conditional one, c, or between.

    The standard deviation is over all numbers of an event; large scales make it grow, which shows
    as too much contrast. Lin 2024, section 3.4, who scale what the network predicts instead of x0.
    An event with one number stays as it is.
    """

    def denoise(x: Array, t: Array) -> Array:
        g, c = inside(x, t), conditional(x, t)
        axes = tuple(range(1, x.ndim))
        std_g, std_c = (jnp.std(y, axis=axes, keepdims=True) for y in (g, c))
        some = std_g > 0
        ratio = jnp.where(some, std_c / jnp.where(some, std_g, 1), 1)
        share = jnp.asarray(phi, x.dtype)
        return g * (share * ratio + 1 - share)

    return denoise
