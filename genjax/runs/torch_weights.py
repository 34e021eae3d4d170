"""The weights of PyTorch's GPT-2 and of its recurrent layers under the names that they have here,
for `genjax.import_weights`. PyTorch itself is not needed.

A network of PyTorch's sees tokens 0 to t and predicts token t + 1; one here begins without any, and
has a learned vector in the place of a token before the first. So one token is said to be `start`:
ln p(x) is then PyTorch's ln p(x | start).
"""

import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from genjax.errors import ConfigError

Arrays = dict[str, np.ndarray]
# Parts of a block by nanoGPT's and Hugging Face's names, and by those of `families.transformer`.
_BLOCK = {
    "ln_1": "attention/norm",
    "attn.c_attn": "attention/qkv",
    "attn.c_proj": "attention/out",
    "ln_2": "feed_forward/norm",
    "mlp.c_fc": "feed_forward/up",
    "mlp.c_proj": "feed_forward/down",
}
_OF_NORM = {"weight": "scale", "bias": "shift"}
_OF_DENSE = {"weight": "kernel", "bias": "bias"}
_IN_BLOCK = re.compile(r"h\.(\d+)\.(.+)\.(weight|bias)")
# Masks that older versions keep among the weights.
_MASK = re.compile(r"h\.\d+\.attn\.(bias|masked_bias)")
_RECURRENT = re.compile(r"(.*?)(weight|bias)_(ih|hh)_l(\d+)")
GATES = {4: "lstm", 3: "gru", 1: "vanilla"}


def from_gpt2(state_dict: Mapping[str, Any], start: int, context: int | None = None) -> Arrays:
    """Parameters of a `transformer` from a state dict of nanoGPT's GPT or Hugging Face's GPT2.

    The model must be `transformer(spec, position="learned", bias=True, tie_weights=True,
    activation=..., d_model=..., n_layers=..., n_heads=...)` of tokens with as many levels as the
    vocabulary has, where activation is "gelu_exact" for nanoGPT and "gelu" for Hugging Face's
    "gelu_new"; bias=False for nanoGPT's bias=False; tie_weights=False if the last layer has a
    matrix of its own. LayerNorm's epsilon is 1e-5 in both, as it is here.

    Args:
        state_dict: name -> array, or tensor of PyTorch: `model.state_dict()`.
        start: the token that stands before the first: 50256 for OpenAI's GPT-2, the new line for
            nanoGPT's Shakespeare.
        context: how many steps the model has, if less than there are positions.

    Returns:
        Name -> array, for `import_weights(params, ...)`.

    Raises:
        ConfigError: for names that no GPT-2 has, and a start that is no token.

    Example:
        >>> import jax, numpy as np
        >>> from genjax import DataSpec, import_weights, transformer
        >>> from genjax.runs.torch_weights import from_gpt2
        >>> spec = DataSpec((3,), "tokens", levels=5, step="token")
        >>> model = transformer(spec, d_model=2, n_layers=1, n_heads=1, position="learned",
        ...                     activation="gelu_exact", tie_weights=True)  # of bias=False
        >>> shapes = {"wte": (5, 2), "wpe": (3, 2), "ln_f": (2,), "h.0.ln_1": (2,),
        ...           "h.0.ln_2": (2,), "h.0.attn.c_attn": (6, 2), "h.0.attn.c_proj": (2, 2),
        ...           "h.0.mlp.c_fc": (8, 2), "h.0.mlp.c_proj": (2, 8)}
        >>> state = {f"transformer.{n}.weight": np.ones(shape) for n, shape in shapes.items()}
        >>> params, _ = model.init(jax.random.key(0))
        >>> params = import_weights(params, from_gpt2(state, start=0))
    """
    given = {_bare(name): value for name, value in _arrays(state_dict).items()}
    given = {name: value for name, value in given.items() if not _MASK.fullmatch(name)}
    table, positions = _wanted(given, "wte.weight"), _wanted(given, "wpe.weight")
    turned = _has_conv1d(given, table.shape[-1])
    found = {
        "inputs/events/table": table,
        "inputs/events/start": _row(table, start),
        "inputs/positions": positions[:context],
    }
    last, unknown = given.pop("lm_head.weight", table), []
    if last.shape != table.shape or (last != table).any():
        found["readout/dense/kernel"] = _kernel(last)
        found["readout/dense/bias"] = np.zeros(len(last), last.dtype)
    for name, value in given.items():
        here = _name_in_gpt2(name)
        if here is None:
            unknown.append(name)
            continue
        if here.endswith("/kernel"):
            value = _kernel(value.T if turned else value)
        found[here] = value
    _refuse_unknown(unknown, "of GPT-2")
    return {f"transformer/{name}": value for name, value in found.items()}


def from_torch_rnn(
    state_dict: Mapping[str, Any],
    start: int,
    embedding: str = "embedding",
    readout: str = "linear",
) -> Arrays:
    """Parameters of an `rnn` from those of torch.nn's Embedding, LSTM (or GRU, or RNN) and Linear.

    The model must be `rnn(spec, cell="lstm", d_embed=..., d_hidden=..., n_layers=...)` of tokens,
    with "gru" for a GRU and "vanilla" for an RNN by tanh. PyTorch has two biases where the sum
    counts, which is what is taken.

    Args:
        state_dict: name -> array, or tensor of PyTorch: `model.state_dict()`.
        start: the token that stands before the first; see the module.
        embedding, readout: what the module calls its Embedding and its Linear: "embed" for weights
            of the name "embed.weight".

    Returns:
        Name -> array, for `import_weights(params, ...)`.

    Raises:
        ConfigError: for names that such a module has not, such as those of layers of both
            directions, and a start that is no token.

    Example:
        >>> import jax, numpy as np
        >>> from genjax import DataSpec, import_weights, rnn
        >>> from genjax.runs.torch_weights import from_torch_rnn
        >>> model = rnn(DataSpec((3,), "tokens", levels=5, step="token"), d_embed=2, d_hidden=4)
        >>> shapes = {"embedding.weight": (5, 2), "lstm.weight_ih_l0": (16, 2),
        ...           "lstm.weight_hh_l0": (16, 4), "lstm.bias_ih_l0": (16,),
        ...           "lstm.bias_hh_l0": (16,), "linear.weight": (5, 4), "linear.bias": (5,)}
        >>> state = {name: np.ones(shape) for name, shape in shapes.items()}
        >>> params, _ = model.init(jax.random.key(0))
        >>> params = import_weights(params, from_torch_rnn(state, start=0))
        >>> params["rnn"]["layers"]["layers"][0]["inputs"]["bias"][0].item()
        2.0
    """
    given = _arrays(state_dict)
    table = _wanted(given, f"{embedding}.weight", "embedding=")
    last = _wanted(given, f"{readout}.weight", "readout=")
    found = {
        "embed/table": table,
        "embed/start": _row(table, start),
        "readout/kernel": last.T,
        "readout/bias": given.pop(f"{readout}.bias", np.zeros(len(last), last.dtype)),
    }
    layers: dict[tuple[str, int], Arrays] = {}
    unknown = []
    for name, value in given.items():
        match = _RECURRENT.fullmatch(name)
        if match is None:
            unknown.append(name)
            continue
        prefix, kind, of, index = match.groups()
        layers.setdefault((prefix, int(index)), {})[f"{kind}_{of}"] = value
    if len({prefix for prefix, _ in layers}) > 1:
        unknown += [f"{prefix}*" for prefix, _ in layers]
    _refuse_unknown(unknown, "of an Embedding, one LSTM, GRU or RNN, and a Linear")
    for (_, index), layer in layers.items():
        for name, value in _recurrent_layer(layer, index).items():
            found[f"layers/layers/{index}/{name}"] = value
    return {f"rnn/{name}": value for name, value in found.items()}


def _recurrent_layer(layer: Arrays, index: int) -> Arrays:
    """One layer: PyTorch's gates are i, f, g, o and r, z, n, as they are here."""
    if not {"weight_ih", "weight_hh"} <= set(layer):
        raise ConfigError(f"Layer {index} has no weight_ih_l{index} or no weight_hh_l{index}.")
    of_input, of_past = layer["weight_ih"], layer["weight_hh"]
    width = of_past.shape[-1]
    cell = GATES.get(len(of_past) // width)
    if cell is None or len(of_past) % width or len(of_input) != len(of_past):
        raise ConfigError(
            f"weight_hh_l{index} must be [4 H, H] (LSTM), [3 H, H] (GRU) or [H, H] (RNN), and "
            f"weight_ih_l{index} have as many rows; got {list(of_past.shape)} and "
            f"{list(of_input.shape)}."
        )
    zero = np.zeros(len(of_past), of_past.dtype)
    one, other = layer.get("bias_ih", zero), layer.get("bias_hh", zero)
    found = {"inputs/kernel": of_input.T, "kernel": of_past.T, "inputs/bias": one + other}
    if cell == "gru":  # which multiplies what the past gives n, bias included, by r
        found["bias"] = other[2 * width :]
        found["inputs/bias"] = np.concatenate([(one + other)[: 2 * width], one[2 * width :]])
    return found


# --- names and layouts ----------------------------------------------------------------------------


def _arrays(state_dict: Mapping[str, Any]) -> Arrays:
    try:
        return {name: np.asarray(value) for name, value in state_dict.items()}
    except (TypeError, RuntimeError) as error:
        raise ConfigError(
            f"A tensor cannot be made an array of numpy ({error}). Give {{name: "
            "value.detach().cpu().float().numpy() for name, value in model.state_dict().items()}."
        ) from error


def _bare(name: str) -> str:
    """The name without what torch.compile and the outermost module put before it."""
    return name.removeprefix("_orig_mod.").removeprefix("transformer.")


def _wanted(given: Arrays, name: str, how: str = "") -> np.ndarray:
    if name not in given:
        instead = f"; give {how} the name that it has" if how else ""
        shown = ", ".join(sorted(given)[:8])
        raise ConfigError(f"There is no {name!r} among the weights{instead}. There are: {shown}.")
    value = given.pop(name)
    if value.ndim != 2:
        raise ConfigError(f"{name} must be a matrix; got shape {list(value.shape)}.")
    return value


def _has_conv1d(given: Arrays, width: int) -> bool:
    """Whether dense layers have their matrices as [in, out], as Hugging Face's Conv1D has, and not
    as torch.nn.Linear.
    """
    qkv = given.get("h.0.attn.c_attn.weight")
    return qkv is not None and qkv.shape == (width, 3 * width)


def _row(table: np.ndarray, start: int) -> np.ndarray:
    if not isinstance(start, int | np.integer) or not 0 <= start < len(table):
        raise ConfigError(f"start must be a token, from 0 to {len(table) - 1}; got {start!r}.")
    return table[start]


def _kernel(matrix: np.ndarray) -> np.ndarray:
    """A matrix [out, in] as `nets.layers.Dense` keeps it: with its longer axis last."""
    return matrix if matrix.shape[1] > matrix.shape[0] else matrix.T


def _name_in_gpt2(name: str) -> str | None:
    """The name here of an array of GPT-2's; None for what belongs to none."""
    if name in ("ln_f.weight", "ln_f.bias"):
        return f"readout/norm/{_OF_NORM[name.removeprefix('ln_f.')]}"
    match = _IN_BLOCK.fullmatch(name)
    if match is None or match[2] not in _BLOCK:
        return None
    part = _BLOCK[match[2]]
    leaves = _OF_NORM if part.endswith("/norm") else _OF_DENSE
    return f"blocks/{match[1]}/{part}/{leaves[match[3]]}"


def _refuse_unknown(names: list[str], what: str) -> None:
    if names:
        more = f" and {len(names) - 8} more" if len(names) > 8 else ""
        raise ConfigError(
            f"These are not among the weights {what}: {', '.join(names[:8])}{more}. Leave them "
            "out, or map the names yourself: see genjax.import_weights."
        )
