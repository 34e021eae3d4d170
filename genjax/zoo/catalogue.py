"""The zoo with what is known of each row: its size, and the results that the benchmarks measured.

Both are files beside this one, so that a list of the rows needs neither jax nor the rows. The
results are written by `python -m benchmarks results`. What there is to say of a row and its model
is in models.json, which is written again by

    python -m genjax.zoo.catalogue

after a row was added or a model has changed. `tests/test_catalogue.py` holds it to the models.
"""

import hashlib
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from genjax.errors import replacing

if TYPE_CHECKING:
    from genjax.zoo.recipe import Recipe

FOLDER = Path(__file__).parent
PATH = FOLDER / "models.json"
COUNTED = ("score", "conditional", "parameters")  # what a model is needed for


def measured() -> dict[str, Any]:
    """Results by recipe, as `python -m benchmarks results` wrote them into
    genjax/zoo/results.json.
    """
    return json.loads((FOLDER / "results.json").read_text("utf-8"))


def known() -> dict[str, dict[str, Any]]:
    """What models.json says of each row of the zoo; the models of rows that are not in it yet are
    "not counted".
    """
    written = json.loads(PATH.read_text("utf-8"))
    if written["rows_sha256"] == _fingerprint():
        return written["rows"]
    # The rows were edited since. They say what there is, and take longer to import.
    from genjax.zoo import ZOO

    uncounted = dict.fromkeys(COUNTED, "not counted")
    counted = {name: {key: row[key] for key in COUNTED} for name, row in written["rows"].items()}
    return {name: about(recipe) | counted.get(name, uncounted) for name, recipe in ZOO.items()}


def about(recipe: "Recipe") -> dict[str, str]:
    """What a row says of itself."""
    return {
        "family": recipe.family.__name__,
        "summary": recipe.summary,
        "data": recipe.data,
    }


def counted(recipe: "Recipe") -> dict[str, Any]:
    """What only the model of a row knows: how it is scored, on what it is conditional, and how many
    parameters it learns. No array is made, but for the parameters of a first stage.
    """
    import jax

    model = recipe.build(_stood_on(recipe))
    params, _ = jax.eval_shape(model.init, jax.random.key(0))
    learned = {player: params[player] for player in model.losses}
    spec = model.spec
    if spec.n_classes:
        conditional = f"{spec.n_classes} classes"
    else:
        conditional = f"vector [{spec.cond_dim}]" if spec.conditional else "no"
    return {
        "score": {"log_prob": "exact", "bound": "bound", None: "samples"}[model.score_name],
        "conditional": conditional,
        "parameters": sum(leaf.size for leaf in jax.tree.leaves(learned)),
    }


def _stood_on(recipe: "Recipe") -> Any:
    """What the model of a row is built on: a spec, or a first stage that is not trained."""
    if recipe.first is None:
        return recipe.source().spec
    import jax

    from genjax.protocol import Trained
    from genjax.zoo import ZOO

    row = ZOO[recipe.first]
    first = row.build(_stood_on(row))
    return Trained(first, *first.init(jax.random.key(0)))


def write() -> None:
    """Build every model of the zoo and write models.json."""
    from genjax.zoo import ZOO

    rows = {name: about(recipe) | counted(recipe) for name, recipe in ZOO.items()}
    values = {"rows_sha256": _fingerprint(), "rows": rows}
    with replacing(PATH) as temporary:
        temporary.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")


def rows() -> list[dict[str, Any]]:
    """Every row of the zoo as `genjax list` shows it; one that nobody has measured says so."""
    results = measured()
    return [_described(name, row, results.get(name)) for name, row in known().items()]


def _described(name: str, row: dict[str, Any], result: dict[str, Any] | None) -> dict[str, Any]:
    size = row["parameters"]
    return {
        "name": name,
        **row,
        "parameters": f"{size:,}" if isinstance(size, int) else size,
        "expected": "not measured" if result is None else expected(result),
        "time": "not measured" if result is None else f"{result['train_seconds']['mean']:.0f} s",
    }


def expected(result: dict[str, Any]) -> str:
    """A result in words: mean and sd over seeds, unit, estimator, split and n."""
    spread = f" ± {result['sd']:.2f}" if result["sd"] is not None else ""
    seeds = f"{len(result['seeds'])} seed{'s' if len(result['seeds']) != 1 else ''}"
    where = f"{result['estimator']}; {result['split']}, n={result['n']:,}, {seeds}"
    if "per_step" in result:
        per = result["per_step"]
        spread = f" ± {per['sd']:.3f}" if per["sd"] is not None else ""
        return f"{per['nats']:.3f}{spread} nats per {per['step']} ({where})"
    if "figures" not in result:
        return f"{result['mean']:.2f}{spread} nats ({where})"
    return f"{result['kind']} {result['mean']:.3f}{spread} ({where})"


def _fingerprint() -> str:
    """Of the files that hold rows."""
    texts = (
        path.name + path.read_text("utf-8")
        for path in sorted(FOLDER.glob("*.py"))
        if path.name not in ("catalogue.py", "recipe.py", "sections.py")
    )
    return hashlib.sha256("".join(texts).encode()).hexdigest()


if __name__ == "__main__":
    write()
    print(f"written: {PATH}")
