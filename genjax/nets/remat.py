"""What a backward pass keeps of a forward one, and what it computes again, by name.

Chen 2016: memory for arithmetic. A step of training keeps every result that its way back needs;
under `rematerialised` only those stay that the policy names, and the rest is computed once more.
On a CPU the compiler joins what is computed twice into one again, unless it is in a loop.
"""

from collections.abc import Callable
from typing import Any

import jax

from genjax.nets.correlation import correlate_p


def _with_ours(policy: Callable[..., Any]) -> Callable[..., Any]:
    """A policy of jax's, which knows its own products and convolutions. Ours has no batch axis: of
    several kernels at once it is products.
    """
    return lambda primitive, *given, **params: (
        primitive is correlate_p or policy(primitive, *given, **params)
    )


# What stays of a part that is computed again, beside what goes into it; "none" computes none again.
POLICIES: dict[str, Callable[..., Any] | None] = {
    "full": jax.checkpoint_policies.nothing_saveable,
    "dots": _with_ours(jax.checkpoint_policies.dots_saveable),
    "dots_no_batch": _with_ours(jax.checkpoint_policies.dots_with_no_batch_dims_saveable),
}


def rematerialised(f: Callable[..., Any], remat: str, loop: bool = False) -> Callable[..., Any]:
    """`f`, whose insides are computed again on the way back as far as `settings.Remat` says.

    Args:
        f: a block of a network, or a step of a loop.
        remat: "none", "full", "dots" or "dots_no_batch".
        loop: whether it is the body of a `scan`, which needs no guard against the compiler's
            joining the two computations.
    """
    if remat == "none":
        return f
    return jax.checkpoint(f, prevent_cse=not loop, policy=POLICIES[remat])
