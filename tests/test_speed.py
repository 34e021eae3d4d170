"""The speed that a log shows: of training alone, in examples, tokens and shares of a peak."""

import jax
import optax
import pytest

from genjax import DataSpec
from genjax.families.transformer import transformer
from genjax.families.vae import vae
from genjax.learning import pace
from genjax.learning.pace import Pace
from genjax.learning.step import training
from genjax.profiling.devices import product_flops
from genjax.profiling.measure import step_shapes
from genjax.runs import pictures, speed

PLANE = DataSpec((2,), "continuous")
TOKENS = DataSpec((16,), "tokens", levels=5, step="token")


class Clock:
    now = 0.0

    def perf_counter(self):
        return self.now


@pytest.fixture
def clock(monkeypatch):
    found = Clock()
    monkeypatch.setattr(pace, "time", found)
    return found


def as_is(steps_per_second):
    return {"speed": steps_per_second}


def test_only_steps_count_and_only_the_seconds_that_they_took(clock):
    own = Pace()
    with own.dispatch(5, compiled=True):
        clock.now += 100  # compiling
    with own.dispatch(5, compiled=False):
        clock.now += 1
    clock.now += 1  # the device still works
    with own.paused():
        clock.now += 50  # an evaluation
    with own.dispatch(5, compiled=False):
        clock.now += 3
    assert own.line(as_is) == {"speed": 10 / 5}
    assert own.line(as_is) == {}  # nothing since
    clock.now += 7

    def failing():
        with own.paused():
            clock.now += 50
            raise ValueError("no")

    with pytest.raises(ValueError, match="no"):  # a hook that fails is a pause as well
        failing()
    with own.dispatch(14, compiled=False):
        pass
    assert own.line(as_is) == {"speed": 2.0}


def test_a_line_has_examples_and_tokens_a_second_and_the_share_of_a_known_peak(monkeypatch):
    t = training(transformer(TOKENS, d_model=4, n_layers=1, n_heads=1), optax.sgd(0.1))
    said = []
    assert speed.speed_of(t, TOKENS, 8, say=said.append)(2.0) == {
        "speed/examples_per_second": 16.0,
        "speed/tokens_per_second": 256.0,
    }
    assert said == []  # of a CPU there is no data sheet
    monkeypatch.setattr(speed, "datasheet_peak", lambda kind: 1e9)
    found = speed.speed_of(t, TOKENS, 8, {"data": 2, "fsdp": 2}, said.append)(2.0)
    flops = product_flops(t.step, *step_shapes(t, TOKENS, 8))
    assert found["speed/share_of_peak"] == pytest.approx(2 * flops / 4e9)
    assert "by its jaxpr, of 4 x 0 TFLOP/s" in said[0]
    assert "data sheet" in said[0]
    assert not any(map(pictures.is_metric, found))


def test_sequences_of_unequal_length_have_no_rate_of_their_padded_steps():
    spec = DataSpec((16, 3), "binary", step="frame", lengths=True)
    t = training(vae(PLANE, hidden=(4,)), optax.sgd(0.1))
    assert list(speed.speed_of(t, spec, 8)(1.0)) == ["speed/examples_per_second"]
    assert jax.devices()[0].platform == "cpu"
