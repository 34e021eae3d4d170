"""A run for other programs: its weights as safetensors, its sampler and score as StableHLO.

    genjax export runs/vae            # runs/vae/export/weights.safetensors, sample.stablehlo, ...

Weights are the averaged ones where the recipe averages, under flat names such as
"vae/encoder/layers/0/kernel"; spec and settings are the file's metadata. Complex numbers are pairs
of real ones on a last axis, and named in the metadata. The programs hold the weights, take and give
events as a spec has them (classes by their number, binary data as 0 and 1), and are read with jax
alone:

    import jax
    sample = jax.export.deserialize(open("sample.stablehlo", "rb").read())
    x = sample.call(jax.random.key_data(jax.random.split(jax.random.key(0), 16)))
"""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from genjax.checks import leaves_by_name
from genjax.errors import ConfigError, DataError, regular_file, replacing
from genjax.nets.platforms import platform, traced_for
from genjax.protocol import Batch, DataSpec, PyTree
from genjax.runs.load import Loaded
from genjax.zoo.recipe import to_dict

PLATFORMS = ("cpu", "cuda", "tpu")


# --- weights --------------------------------------------------------------------------------------


def flat_weights(tree: PyTree) -> tuple[dict[str, np.ndarray], list[str]]:
    """The leaves of a tree by their names, and the names of those that are complex, as pairs."""
    found, pairs = {}, []
    for name, leaf in leaves_by_name(tree).items():
        array = np.asarray(leaf)
        if np.iscomplexobj(array):
            array = np.stack([np.real(array), np.imag(array)], axis=-1)
            pairs.append(name)
        found[name] = np.array(array, order="C")
    return found, pairs


def save_weights(run: Loaded, path: Path) -> None:
    """Write the parameters of a run as safetensors.

    Raises:
        ConfigError: without the package safetensors.
        CheckpointError: if the disk does not take it.
    """
    numpy = _safetensors()
    arrays, pairs = flat_weights(run.params)
    about = {
        "recipe": run.recipe.name,
        "step": str(run.step),
        "spec": json.dumps(dataclasses.asdict(run.model.spec)),
        "config": json.dumps(to_dict(run.recipe)),
        "complex": json.dumps(pairs),
    }
    with replacing(path) as temporary:
        temporary.write_bytes(numpy.save(arrays, metadata=about))


def read_weights(path: Path | str, like: PyTree) -> PyTree:
    """The weights of a file in the structure of `like`, matched by name.

    Args:
        like: parameters, or their shapes, of the model that is to have them.

    Raises:
        DataError: for a file that is missing, damaged, or lacks a name or has another shape.
    """
    numpy = _safetensors()
    regular_file(path)
    try:
        found = numpy.load(Path(path).read_bytes())
    except FileNotFoundError:
        raise DataError(f"{path}: there is no such file.") from None
    except Exception as error:  # of the package's own kind
        raise DataError(f"{path}: not a safetensors file, or damaged ({error}).") from error
    wanted, lines, leaves = leaves_by_name(like), [], []
    for name, leaf in wanted.items():
        array = found.get(name)
        is_complex = jnp.issubdtype(leaf.dtype, jnp.complexfloating)
        if array is not None and is_complex and array.shape[-1:] == (2,):
            array = array[..., 0] + 1j * array[..., 1]
        if array is None:
            lines.append(f"{name}: missing")
        elif array.shape != leaf.shape:
            lines.append(f"{name}: expected {list(leaf.shape)}; found {list(array.shape)}")
        else:
            leaves.append(jnp.asarray(array, leaf.dtype))
    lines += [f"{name}: not of this model" for name in found if name not in wanted]
    if lines:
        more = [] if len(lines) <= 8 else [f"... and {len(lines) - 8} more"]
        raise DataError(f"{path} does not fit this model:\n  " + "\n  ".join(lines[:8] + more))
    return jax.tree.unflatten(jax.tree.structure(like), leaves)


def _safetensors() -> Any:
    try:
        from safetensors import numpy
    except ModuleNotFoundError:
        raise ConfigError(
            "Weights are written and read by safetensors, which is not installed: pip install "
            "'genjax-zoo[export]'."
        ) from None
    return numpy


# --- programs -------------------------------------------------------------------------------------


def sampler_program(run: Loaded) -> bytes:
    """StableHLO of the sampler: (key data uint32 [b, 2] [, cond [b] or [b, cond_dim]]) -> x [b,
    *shape], for any b.
    """
    model, params, state = run.model, run.params, run.state

    def one(data: Any, cond: Any = None) -> Any:
        key = jax.random.wrap_key_data(data)
        given = None if cond is None else cond[None]
        return model.sample(params, state, key, 1, given)[0]

    return _exported(one, [((2,), jnp.uint32), *_condition(model.spec)])


def score_program(run: Loaded) -> bytes:
    """StableHLO of the log-probability or bound: (x [b, *shape], key data uint32 [b, 2] [, cond])
    -> nats [b], for any b.

    Raises:
        ConfigError: for a model that has neither.
    """
    model, params, state = run.model, run.params, run.state
    score, spec = model.score, model.spec
    if score is None or spec.lengths:
        raise ConfigError(f"This model of {spec.name} has no score of single events to export.")

    def one(x: Any, data: Any, cond: Any = None) -> Any:
        given = None if cond is None else cond[None]
        key = jax.random.wrap_key_data(data)
        return score(params, state, Batch(x[None], given), key)[0]

    return _exported(one, [(spec.shape, spec.dtype), ((2,), jnp.uint32), *_condition(spec)])


def _condition(spec: DataSpec) -> list[tuple[tuple[int, ...], Any]]:
    if not spec.conditional:
        return []
    return [((), jnp.int32)] if spec.n_classes else [((spec.cond_dim or 1,), jnp.float32)]


def _exported(one: Callable[..., Any], arguments: list[tuple[tuple[int, ...], Any]]) -> bytes:
    """A function of one example for any number of them."""
    (b,) = jax.export.symbolic_shape("b")
    shapes = [jax.ShapeDtypeStruct((b, *shape), dtype) for shape, dtype in arguments]
    with traced_for(platform()):  # without kernels that only a card here has
        program = jax.export.export(jax.jit(jax.vmap(one)), platforms=PLATFORMS)(*shapes)
    try:
        return bytes(program.serialize())
    except ImportError:
        raise ConfigError(
            "Programs are written by flatbuffers, which is not installed: pip install "
            "'genjax-zoo[export]'."
        ) from None


def export(run: Loaded, folder: Path) -> list[Path]:
    """Write weights.safetensors, sample.stablehlo and, where there is a score, score.stablehlo.

    Raises:
        ConfigError: without the package safetensors.
        CheckpointError: if the disk does not take them.
    """
    weights = folder / "weights.safetensors"
    save_weights(run, weights)
    programs = {"sample": sampler_program}
    if run.model.score is not None and not run.model.spec.lengths:
        programs["score"] = score_program
    written = [weights]
    for name, make in programs.items():
        path = folder / f"{name}.stablehlo"
        with replacing(path) as temporary:
            temporary.write_bytes(make(run))
        written.append(path)
    return written
