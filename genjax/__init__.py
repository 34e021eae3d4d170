"""A functional zoo of generative models in JAX: pure functions, proved against known answers, measured."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

# Public names and where they live. They are imported when first used, so that `genjax --help` does not import jax.
_HOME = {
    "Aux": "protocol",
    "Batch": "protocol",
    "DataSpec": "protocol",
    "Model": "protocol",
    "TrainState": "protocol",
    "Training": "protocol",
    "compiled": "train",
    "ensemble": "train",
    "eval_params": "train",
    "feed": "train",
    "grid": "train",
    "microbatch": "train",
    "scan_steps": "train",
    "TENSOR_RULES": "sharding",
    "make_mesh": "sharding",
    "shard": "sharding",
    "skip_nonfinite": "train",
    "sweep": "train",
    "training": "train",
    "batch_at": "data",
    "example_batch": "data",
    "open_source": "data",
    "diffusion": "families.denoising",
    "fit": "loop",
    "flow_matching": "families.transport",
    "gan": "families.adversarial",
    "reflow": "families.transport",
    "rnn": "families.recurrent",
    "transformer": "families.attention",
    "vrnn": "families.variational_recurrent",
    "vae": "families.variational",
    "Prior": "families.variational",
    "ZOO": "zoo",
}

__all__ = list(_HOME)  # pyright: ignore[reportUnsupportedDunderAll]

if TYPE_CHECKING:
    from genjax.data import batch_at, example_batch, open_source
    from genjax.families.adversarial import gan
    from genjax.families.attention import transformer
    from genjax.families.denoising import diffusion
    from genjax.families.recurrent import rnn
    from genjax.families.transport import flow_matching, reflow
    from genjax.families.variational import Prior, vae
    from genjax.families.variational_recurrent import vrnn
    from genjax.loop import fit
    from genjax.protocol import Aux, Batch, DataSpec, Model, Training, TrainState
    from genjax.sharding import TENSOR_RULES, make_mesh, shard
    from genjax.train import (
        compiled,
        ensemble,
        eval_params,
        feed,
        grid,
        microbatch,
        scan_steps,
        skip_nonfinite,
        sweep,
        training,
    )
    from genjax.zoo import ZOO


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'genjax' has no attribute {name!r}; it has: {', '.join(sorted(_HOME))}.")
    return getattr(import_module(f"genjax.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return sorted(_HOME)
