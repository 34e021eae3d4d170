"""Steps compiled for machines that are not here. What needs libtpu is skipped, and said to be,
where it is not installed.
"""

import dataclasses
import importlib.util
import math

import jax
import pytest
from program import refused

from benchmarks import common, tpus
from genjax.errors import ConfigError
from genjax.profiling import ahead
from genjax.protocol import Trained
from genjax.zoo import ZOO

libtpu = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed (the extra tpu)"
)
# A program for a chip that is not here cannot be read back from the kept ones.
pytestmark = pytest.mark.bits


def tiny(name, batch_size=8):
    row = ZOO[name]
    parts = min(row.schedule.microbatches, 2)
    schedule = dataclasses.replace(row.schedule, batch_size=batch_size, microbatches=parts)
    return dataclasses.replace(row, model={**row.model, **row.tiny}, schedule=schedule)


def first_stage(name):
    """What a row stands on, untrained; None for a row that stands on data."""
    if ZOO[name].first is None:
        return None
    recipe = tiny(ZOO[name].first)
    model = recipe.build(recipe.source().spec)
    return Trained(model, *model.init(jax.random.key(0)))


@libtpu
@pytest.mark.slow
@pytest.mark.parametrize("name", ZOO)
def test_every_recipe_compiles_for_a_tpu(name):
    axes = {"data": 2, "fsdp": 2}
    found = ahead.compile_for(tiny(name), "v5e:2x2", axes, on=first_stage(name))
    assert found.device == "TPU v5 lite"
    assert 0 < found.memory < found.capacity == 16 * 2**30
    assert found.flops > 0
    assert 0 < found.optimal_seconds < 1
    assert 0 < found.share_of_peak < 1


@libtpu
@pytest.mark.slow
def test_devices_share_the_work_and_a_split_state_takes_less_memory():
    row = tiny("vae", 512)
    row = dataclasses.replace(row, model={**row.model, "hidden": (256, 256)})
    one, four = (ahead.compile_for(row, "v5e:2x2", axes) for axes in ({"data": 1}, {"data": 4}))
    assert one.flops / four.flops == pytest.approx(4, rel=0.2)
    split = ahead.compile_for(row, "v5e:2x2", {"fsdp": 4})
    assert split.memory < 0.6 * four.memory


@libtpu
@pytest.mark.slow
def test_a_loop_over_layers_counts_as_often_as_it_runs():
    row = tiny("transformer")
    plain, looped = (
        ahead.compile_for(
            dataclasses.replace(row, model={**row.model, "n_layers": 4, "scan_layers": scanned}),
            "v5e:2x2",
        )
        for scanned in (False, True)
    )
    assert plain.flops > 0
    assert looped.flops == pytest.approx(plain.flops, rel=0.05)


@libtpu
def test_every_topology_that_is_listed_exists_and_its_chip_is_known():
    for version, sizes in ahead.TOPOLOGIES.items():
        for size in sizes:
            assert ahead.devices_of(f"{version}:{size}")[0].device_kind in ahead.CHIPS


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", ["vae", "vae-flow-prior", pytest.param("transformer", marks=pytest.mark.slow)]
)
def test_a_step_is_lowered_for_cuda(name):
    assert ahead.lowered_for_cuda(tiny(name), on=first_stage(name)) > 1000


def test_without_libtpu_the_error_says_what_to_install(monkeypatch, capsys):
    monkeypatch.setattr(ahead.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(
        ConfigError,
        match=r"needs libtpu, which no TPU is needed for: pip install 'genjax-zoo\[tpu\]'",
    ):
        ahead.devices_of("v5e:2x2")
    assert "needs libtpu" in refused(["compile", "vae"], capsys)


@pytest.mark.parametrize("installed", [True, None])  # a typing error shows before an install
@pytest.mark.parametrize("topology", ["v9:2x2", "v5e", "v5e:3x3", "", "v5e:2x2x1"])
def test_a_topology_that_is_not_known(topology, installed, monkeypatch):
    monkeypatch.setattr(ahead.importlib.util, "find_spec", lambda name: installed)
    with pytest.raises(
        ConfigError,
        match=rf"knows no topology '{topology}'. It knows: v4:2x2x1, .*v6e:16x16, and cuda",
    ):
        ahead.devices_of(topology)


@pytest.mark.parametrize(
    ("count", "advice"),
    [
        (8, "such as data=4, or --topology v5e:2x4."),
        (9, "such as data=4, or --topology v5e:4x4."),
        (512, "such as data=4."),
    ],
)
def test_a_mesh_of_more_devices_than_the_topology_has(count, advice, monkeypatch):
    def devices(topology):
        return [None] * math.prod(map(int, topology.partition(":")[2].split("x")))

    monkeypatch.setattr(ahead, "devices_of", devices)
    with pytest.raises(ConfigError, match=f"takes {count} devices; v5e:2x2 has 4. .*{advice}$"):
        ahead.compile_for(tiny("vae"), "v5e:2x2", {"data": count})


def test_the_report_has_a_line_for_every_step_that_was_compiled(monkeypatch, tmp_path):
    monkeypatch.setattr(common, "RESULTS", tmp_path)
    figures = ahead.Compiled("TPU v5 lite", {"data": 4}, 9.0, 1e12, 1e9, 2**34, 2**33, 0.01, 0.5)

    def found(case, topology, seconds):
        if case.recipe == "vae":
            return {"error": "not compiled in 600 s"}
        return {"batch_size": 8, **figures._asdict()}

    monkeypatch.setattr(tpus, "in_child", found)
    tpus.main(("vae", "dit-b2"))
    figures = figures._replace(optimal_seconds=None, share_of_peak=None)
    tpus.main(("gpt2-124m",))
    text = "\n".join(tpus.parts(common.read("tpus")))
    assert "| `vae` | not compiled in 600 s |" in text
    assert "| `dit-b2` | 16,384 MiB, does not fit | 10 ms | 50.0 % | 16,384 MiB" in text
    assert "| `gpt2-124m` | 16,384 MiB, does not fit | no estimate | - |" in text
    assert len(common.read("tpus")["rows"]) == 3 * len(tpus.TOPOLOGIES)


@pytest.mark.parametrize(
    ("estimate", "at_peak", "wanted"),
    [
        (0.3, 0.1, 0.3),
        (1.3, 0.1, 1.3),
        (-3.9998, 1e-5, 0.0002),  # four marks
        (0.00873, 0.00944, 0.00873),  # seen on v5p: a little less than its datasheet has
        (-2.99, 0.1, None),  # 0.01 s, or 1.01
        (0.01, 0.1, None),
    ],
)
def test_marks_for_what_has_no_time_are_taken_out_of_a_least_time(estimate, at_peak, wanted):
    found = ahead.least_seconds(estimate, at_peak)
    assert found == (None if wanted is None else pytest.approx(wanted))


@libtpu
@pytest.mark.slow
def test_a_step_is_compiled_in_a_process_of_its_own():
    small = tpus.Case("vae", {"hidden": [8], "latent_dim": 2})
    assert tpus.in_child(small, "v5e:2x2", 300)["device"] == "TPU v5 lite"
    wrong = tpus.in_child(small._replace(recipe="vea"), "v5e:2x2", 300)
    assert wrong["error"] == "KeyError: 'vea'"
