"""Weights of PyTorch's GPT-2 and recurrent layers: the same logits here.

The oracles are numpy, after PyTorch's documentation of LayerNorm, GELU, Linear, Embedding,
scaled_dot_product_attention, LSTM, GRU and RNN; where there is a PyTorch, its own modules too.
"""

import os
import subprocess
from pathlib import Path

import jax
import numpy as np
import pytest
import scipy.special
from gates import quick
from rows import widen

from benchmarks import peers
from genjax import DataSpec, import_weights, rnn, transformer
from genjax.errors import ConfigError
from genjax.runs.torch_weights import from_gpt2, from_torch_rnn

TORCH = os.environ.get("GENJAX_TORCH_PYTHON", "")
V, T, C, LAYERS, HEADS, E, H = 7, 6, 8, 2, 2, 5, 4
SPEC = DataSpec((T,), "tokens", levels=V, step="token")
START = 3
CELLS = {"lstm": 4, "gru": 3, "vanilla": 1}


def drawn(shapes, seed=0):
    rng = np.random.default_rng(seed)
    return {name: 0.5 * rng.normal(size=shape) for name, shape in shapes.items()}


def tokens():
    return np.random.default_rng(9).integers(0, V, (3, T)).astype(np.int32)


# --- GPT-2 ----------------------------------------------------------------------------------------


def gpt_state(bias=True, tied=True):
    shapes = {"wte.weight": (V, C), "wpe.weight": (T, C), "ln_f.weight": (C,), "ln_f.bias": (C,)}
    dense = {
        "attn.c_attn": (3 * C, C),
        "attn.c_proj": (C, C),
        "mlp.c_fc": (4 * C, C),
        "mlp.c_proj": (C, 4 * C),
    }
    for i in range(LAYERS):
        for norm in ("ln_1", "ln_2"):
            shapes |= {f"h.{i}.{norm}.weight": (C,), f"h.{i}.{norm}.bias": (C,)}
        for name, shape in dense.items():
            shapes |= {f"h.{i}.{name}.weight": shape, f"h.{i}.{name}.bias": shape[:1]}
    state = {f"transformer.{name}": one for name, one in drawn(shapes).items()}
    if not bias:
        state = {name: one for name, one in state.items() if not name.endswith("bias")}
    table = state["transformer.wte.weight"]
    return state | {"lm_head.weight": table if tied else table[::-1] + 1}


def gelu(x):
    return 0.5 * x * (1 + scipy.special.erf(x / np.sqrt(2)))


def gelu_new(x):
    return 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))


def gpt_logits(state, ids, activation=gelu):
    """The logits [N, T, V] after each of ids [N, T]."""

    def w(name):
        return state.get(f"transformer.{name}", 0.0)

    def linear(x, name):
        return x @ w(f"{name}.weight").T + w(f"{name}.bias")

    def norm(x, name):
        y = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-5)
        return y * w(f"{name}.weight") + w(f"{name}.bias")

    def attention(x, name):
        n, t, _ = x.shape
        parts = np.split(linear(x, f"{name}.c_attn"), 3, axis=-1)
        q, k, v = (y.reshape(n, t, HEADS, C // HEADS).swapaxes(1, 2) for y in parts)
        scores = q @ k.swapaxes(2, 3) / np.sqrt(C // HEADS)
        scores = np.where(np.tril(np.ones((t, t), bool)), scores, -np.inf)
        y = scipy.special.softmax(scores, axis=-1) @ v
        return linear(y.swapaxes(1, 2).reshape(n, t, C), f"{name}.c_proj")

    h = w("wte.weight")[ids] + w("wpe.weight")[: ids.shape[1]]
    for i in range(LAYERS):
        h = h + attention(norm(h, f"h.{i}.ln_1"), f"h.{i}.attn")
        inner = activation(linear(norm(h, f"h.{i}.ln_2"), f"h.{i}.mlp.c_fc"))
        h = h + linear(inner, f"h.{i}.mlp.c_proj")
    return norm(h, "ln_f") @ state["lm_head.weight"].T


def gpt(**options):
    shape = {"d_model": C, "n_layers": LAYERS, "n_heads": HEADS, "position": "learned"}
    usual = {"activation": "gelu_exact", "bias": True, "tie_weights": True}
    return transformer(SPEC, **shape, **usual | options)


def outputs(model, arrays, x):
    """The logits of a model with these parameters, in float64."""
    params = import_weights(widen(model.init(jax.random.key(0))[0]), arrays)
    return np.asarray(quick(model.autoregressive.outputs)(params, {}, x))


def begun(x):
    """What PyTorch's network sees where x is what it is to predict."""
    return np.concatenate([np.full((len(x), 1), START), x[:, :-1]], axis=1)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("bias", "tied", "activation"),
    [(True, True, gelu), (False, True, gelu), (True, False, gelu_new)],
)
def test_a_gpt_has_the_logits_that_it_has_in_pytorch(x64, bias, tied, activation):
    state, x = gpt_state(bias, tied), tokens()
    name = {gelu: "gelu_exact", gelu_new: "gelu"}[activation]
    model = gpt(bias=bias, tie_weights=tied, activation=name)
    wanted = gpt_logits(state, begun(x), activation)
    np.testing.assert_allclose(outputs(model, from_gpt2(state, START), x), wanted, atol=1e-9)
    # The two forms of GELU are not one, and neither are two starts.
    other = from_gpt2(state, START + 1)
    assert np.abs(outputs(model, other, x) - wanted).max() > 1e-3
    swapped = gpt(bias=bias, tie_weights=tied, activation={"gelu": "gelu_exact"}.get(name, "gelu"))
    assert np.abs(outputs(swapped, from_gpt2(state, START), x) - wanted).max() > 1e-5


def test_names_of_hugging_face_and_of_torch_compile_are_understood():
    """Conv1D keeps [in, out]; masks are among the weights; the last layer's may be missing."""
    plain, wanted = gpt_state(), from_gpt2(gpt_state(), START)
    turned = ("c_attn.weight", "c_proj.weight", "c_fc.weight")
    conv = {n: one.T if n.endswith(turned) else one for n, one in plain.items()}
    bare = {n.removeprefix("transformer."): one for n, one in conv.items() if n[:2] != "lm"}
    masks = {f"h.{i}.attn.{n}": np.ones(1) for i in range(LAYERS) for n in ("bias", "masked_bias")}
    compiled = {f"_orig_mod.{name}": one for name, one in plain.items()}
    for given in (conv, bare | masks, compiled):
        found = from_gpt2(given, START)
        assert found.keys() == wanted.keys()
        for name, one in wanted.items():
            np.testing.assert_array_equal(found[name], one)
    short = from_gpt2(plain, START, context=4)["transformer/inputs/positions"]
    np.testing.assert_array_equal(short, plain["transformer.wpe.weight"][:4])


# --- recurrent layers -----------------------------------------------------------------------------


def rnn_state(cell):
    gates, shapes = CELLS[cell], {"embedding.weight": (V, E)}
    shapes |= {"linear.weight": (V, H), "linear.bias": (V,)}
    for i in range(LAYERS):
        shapes |= {f"cell.weight_ih_l{i}": (gates * H, H if i else E)}
        shapes |= {f"cell.weight_hh_l{i}": (gates * H, H)}
        shapes |= {f"cell.bias_{of}_l{i}": (gates * H,) for of in ("ih", "hh")}
    return drawn(shapes, 1)


def rnn_logits(state, ids, cell):
    """The logits [N, T, V] after each of ids [N, T]."""
    sigmoid, x = scipy.special.expit, state["embedding.weight"][ids]
    for i in range(LAYERS):
        w = {k: state[f"cell.{k}_l{i}"] for k in ("weight_ih", "weight_hh", "bias_ih", "bias_hh")}
        h, c, found = np.zeros((len(ids), H)), np.zeros((len(ids), H)), []
        for t in range(ids.shape[1]):
            a = x[:, t] @ w["weight_ih"].T + w["bias_ih"]
            u = h @ w["weight_hh"].T + w["bias_hh"]
            if cell == "lstm":
                i_, f, g, o = np.split(a + u, 4, axis=1)
                c = sigmoid(f) * c + sigmoid(i_) * np.tanh(g)
                h = sigmoid(o) * np.tanh(c)
            elif cell == "gru":
                r, z = np.split(sigmoid(a + u)[:, : 2 * H], 2, axis=1)
                n = np.tanh(a[:, 2 * H :] + r * u[:, 2 * H :])
                h = (1 - z) * n + z * h
            else:
                h = np.tanh(a + u)
            found.append(h)
        x = np.stack(found, axis=1)
    return x @ state["linear.weight"].T + state["linear.bias"]


def recurrent(cell):
    return rnn(SPEC, cell=cell, d_embed=E, d_hidden=H, n_layers=LAYERS)


@pytest.mark.slow
@pytest.mark.parametrize("cell", CELLS)
def test_recurrent_layers_have_the_logits_that_they_have_in_pytorch(x64, cell):
    state, x = rnn_state(cell), tokens()
    found = outputs(recurrent(cell), from_torch_rnn(state, START), x)
    np.testing.assert_allclose(found, rnn_logits(state, begun(x), cell), atol=1e-9)


def test_biases_that_are_not_there_are_zero_and_names_may_differ():
    state = rnn_state("gru")
    without = {n: one for n, one in state.items() if "bias" not in n}
    zero = {n: np.zeros_like(one) if "bias" in n else one for n, one in state.items()}
    rename = {"embedding.weight": "embed.weight", "linear.weight": "head.weight"}
    named = {rename.get(n, n): one for n, one in without.items()}
    wanted = from_torch_rnn(zero, START)
    found = from_torch_rnn(named, START, embedding="embed", readout="head")
    for name, one in wanted.items():
        np.testing.assert_array_equal(found[name], one)


# --- what does not fit ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "start", "message"),
    [
        ({}, 7, "start must be a token, from 0 to 6; got 7"),
        ({}, "a", "start must be a token"),
        ({"transformer.wte.weight": None}, 0, r"no 'wte\.weight' among the weights"),
        ({"transformer.h.0.mlp.gate.weight": np.ones(1)}, 0, r"of GPT-2: h\.0\.mlp\.gate\.weight"),
        ({"transformer.wpe.weight": np.ones(3)}, 0, r"must be a matrix; got shape \[3\]"),
    ],
)
def test_what_is_no_gpt_2_is_told(change, start, message):
    state = {name: one for name, one in (gpt_state() | change).items() if one is not None}
    with pytest.raises(ConfigError, match=message):
        from_gpt2(state, start)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"embedding.weight": None}, r"no 'embedding\.weight'.*give embedding= the name"),
        ({"cell.weight_hr_l0": np.ones((2, 2))}, r"cell\.weight_hr_l0"),
        ({"cell.weight_ih_l0_reverse": np.ones((2, 2))}, r"weight_ih_l0_reverse"),
        ({"other.weight_ih_l0": np.ones((2, 2))}, r"cell\.\*, .*other\.\*"),
        ({"cell.weight_hh_l0": None}, "Layer 0 has no"),
        ({"cell.weight_hh_l0": np.ones((8, 4))}, r"\[4 H, H\] \(LSTM\)"),
    ],
)
def test_what_is_no_recurrent_network_is_told(change, message):
    state = rnn_state("lstm") | change
    with pytest.raises(ConfigError, match=message):
        from_torch_rnn({name: one for name, one in state.items() if one is not None}, 0)


class Stubborn:
    def __array__(self, *args, **how):
        raise TypeError("Got unsupported ScalarType BFloat16")


def test_tensors_that_numpy_cannot_have_are_told():
    with pytest.raises(ConfigError, match=r"BFloat16.*\.detach\(\)\.cpu\(\)\.float\(\)\.numpy"):
        from_gpt2({"wte.weight": Stubborn()}, 0)


# --- PyTorch itself -------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.skipif(not TORCH, reason=peers.NO_TORCH)
def test_pytorchs_own_modules_have_these_logits(x64, tmp_path):
    twin = Path(__file__).with_name("torch_weights_twin.py")
    subprocess.run([TORCH, str(twin), str(tmp_path / "twin.npz")], check=True, timeout=300)
    saved = np.load(tmp_path / "twin.npz")
    ids = saved["x"]

    def state_of(name):
        prefix = f"{name}/state/"
        return {n.removeprefix(prefix): saved[n] for n in saved.files if n.startswith(prefix)}

    def check(name, model, convert):
        # It predicts what comes after each token, and begins here with the first.
        for row in range(len(ids)):
            arrays = convert(state_of(name), int(ids[row, 0]))
            x = np.append(ids[row, 1:], 0)[None].astype(np.int32)
            found = outputs(model, arrays, x)
            np.testing.assert_allclose(found, saved[f"{name}/logits"][row : row + 1], atol=1e-9)

    check("gpt", gpt(), from_gpt2)
    check("gpt_no_bias", gpt(bias=False), from_gpt2)
    for cell in CELLS:
        check(cell, recurrent(cell), from_torch_rnn)
