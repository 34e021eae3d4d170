"""A functional zoo of generative models in JAX: pure functions, proved against known answers,
measured.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

# Public names and where they live. They are imported when first used, so that `genjax --help` does
# not import jax.
_HOME = {
    "Aux": "protocol",
    "Batch": "protocol",
    "DataSpec": "protocol",
    "Model": "protocol",
    "TrainState": "protocol",
    "Trained": "protocol",
    "Training": "protocol",
    "compiled": "learning.transforms",
    "ensemble": "learning.members",
    "eval_params": "learning.step",
    "feed": "learning.transforms",
    "grid": "learning.members",
    "microbatch": "learning.transforms",
    "repeat_steps": "learning.transforms",
    "scan_steps": "learning.transforms",
    "TENSOR_RULES": "learning.sharding",
    "make_mesh": "learning.sharding",
    "shard": "learning.sharding",
    "skip_nonfinite": "learning.transforms",
    "sweep": "learning.members",
    "training": "learning.step",
    "batch_at": "data",
    "example_batch": "data",
    "open_source": "data",
    "cnf": "families.cnf",
    "diffusion": "families.diffusion",
    "fit": "learning.loop",
    "flow_matching": "families.flow_matching",
    "gan": "families.gan",
    "glow": "families.glow",
    "latent_spec": "families.compose",
    "maf": "families.flows",
    "nsf": "families.flows",
    "realnvp": "families.flows",
    "reflow": "families.compose",
    "made": "families.made",
    "nade": "families.nade",
    "pixelcnn": "families.pixelcnn",
    "rnn": "families.rnn",
    "ssm": "families.ssm",
    "transformer": "families.transformer",
    "two_stage": "families.compose",
    "vrnn": "families.vrnn",
    "vae": "families.vae",
    "Prior": "parts.priors",
    "prior_of": "parts.priors",
    "from_arrays": "data",
    "load": "runs.api",
    "train": "runs.api",
    "save": "runs.states",
    "restore": "runs.states",
    "Run": "runs.api",
    "Hook": "learning.loop",
    "choose_feed": "learning.loop",
    "Checkpoints": "learning.checkpoint",
    "add_loss": "learning.losses",
    "import_weights": "learning.weights",
    "parameter_names": "learning.weights",
    "ZOO": "zoo",
}

__all__ = list(_HOME)  # pyright: ignore[reportUnsupportedDunderAll]

if TYPE_CHECKING:
    from genjax.data import batch_at, example_batch, from_arrays, open_source
    from genjax.families.cnf import cnf
    from genjax.families.compose import latent_spec, reflow, two_stage
    from genjax.families.diffusion import diffusion
    from genjax.families.flow_matching import flow_matching
    from genjax.families.flows import maf, nsf, realnvp
    from genjax.families.gan import gan
    from genjax.families.glow import glow
    from genjax.families.made import made
    from genjax.families.nade import nade
    from genjax.families.pixelcnn import pixelcnn
    from genjax.families.rnn import rnn
    from genjax.families.ssm import ssm
    from genjax.families.transformer import transformer
    from genjax.families.vae import vae
    from genjax.families.vrnn import vrnn
    from genjax.learning.checkpoint import Checkpoints
    from genjax.learning.loop import Hook, choose_feed, fit
    from genjax.learning.losses import add_loss
    from genjax.learning.members import ensemble, grid, sweep
    from genjax.learning.sharding import TENSOR_RULES, make_mesh, shard
    from genjax.learning.step import eval_params, training
    from genjax.learning.transforms import (
        compiled,
        feed,
        microbatch,
        repeat_steps,
        scan_steps,
        skip_nonfinite,
    )
    from genjax.learning.weights import import_weights, parameter_names
    from genjax.parts.priors import Prior, prior_of
    from genjax.protocol import Aux, Batch, DataSpec, Model, Trained, Training, TrainState
    from genjax.runs.api import Run, load, train
    from genjax.runs.states import restore, save
    from genjax.zoo import ZOO


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(
            f"module 'genjax' has no attribute {name!r}; it has: {', '.join(sorted(_HOME))}."
        )
    return getattr(import_module(f"genjax.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return sorted(_HOME)
