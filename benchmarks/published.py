"""What rows with a published reference reach when counted as the reference counts: without the
first step of a sequence.

nanoGPT predicts each character from the 1 to 64 before it, and Bai (2018) each frame of a chorale
from those before it, so the first of a sequence, of which nothing is known, counts for neither. Our
rows predict it as well, and the README's table counts it; here it is left out. Nats are summed over
all steps of the test split and divided by their number.
"""

from pathlib import Path
from typing import Any

import jax
import numpy as np

from benchmarks.common import over_seeds, write
from genjax.errors import ConfigError
from genjax.evaluation.estimates import padded, per_step
from genjax.protocol import step_mask
from genjax.runs.load import load

# row -> (nats per step, where from)
REFERENCES = {
    "transformer-shakespeare": (1.88, "nanoGPT's README"),
    "rnn-jsb": (8.91, "Bai 2018, table 1"),
    "gru-jsb": (8.43, "Bai 2018, table 1"),
    "lstm-jsb": (8.45, "Bai 2018, table 1"),
}


def value(folder: Path, batch_size: int = 100) -> dict[str, Any]:
    """Nats per step of one run on its test split without first steps, with the standard error over
    sequences.
    """
    loaded = load(folder)
    spec, arrays = loaded.model.spec, loaded.recipe.source().load().test

    sequences = loaded.model.autoregressive
    assert sequences is not None
    assert sequences.step_log_prob is not None
    step_log_prob = sequences.step_log_prob

    @jax.jit
    def sums(batch: Any) -> Any:
        nats = step_log_prob(loaded.params, loaded.state, batch)  # 0 where padded
        return nats[:, 1:].sum(1), step_mask(spec, batch)[:, 1:].sum(1)

    parts = []
    for start in range(0, len(arrays.x), batch_size):
        batch = padded(arrays, start, batch_size)
        kept = np.asarray(batch.weight) > 0
        batch = batch._replace(x=batch.x.astype(spec.dtype))
        parts.append([np.asarray(part)[kept] for part in sums(batch)])
    nats, steps = (np.concatenate(part) for part in zip(*parts, strict=True))
    found = per_step(-nats, steps)
    return {"nats": found.mean, "standard_error": found.standard_error, "steps": found.n}


def values(name: str, keep: Path) -> dict[str, Any] | None:
    """`value` of each seed whose run folder `python -m benchmarks results --keep` left, mean and
    sd; None without any.
    """
    found = [value(folder) for folder in sorted(keep.glob(f"{name}_seed?"))]
    if not found:
        return None
    nats = [one["nats"] for one in found]
    reference, source = REFERENCES[name]
    return {
        "recipe": name,
        **over_seeds(nats),
        "standard_error": max(one["standard_error"] for one in found),
        "steps": found[0]["steps"],
        "reference": reference,
        "source": source,
    }


def main(keep: Path | None = None) -> None:
    """Measure the rows whose run folders are in `keep`, and write results/published.json."""
    rows = (
        []
        if keep is None
        else [row for row in (values(name, keep) for name in REFERENCES) if row is not None]
    )
    if not rows:
        raise ConfigError(
            "Give a folder with runs: `python -m benchmarks results --names gru-jsb --keep "
            "FOLDER`, then "
            "`python -m benchmarks published --keep FOLDER`."
        )
    for row in rows:
        print(
            f"{row['recipe']}: {row['mean']:.4f} nats per step, by seed {row['by_seed']}, "
            f"{row['source']}: {row['reference']}"
        )
    write("published", {"rows": rows})


if __name__ == "__main__":
    main()
