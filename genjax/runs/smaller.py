"""What makes a run smaller, where there is not enough memory for it."""

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from genjax.errors import GenjaxError, MemoryExhausted, out_of_memory
from genjax.zoo.recipe import Recipe
from genjax.zoo.sections import settings_of

# Settings that arrays grow with, by their plain names.
SIZES = (
    "hidden",
    "d_hidden",
    "d_model",
    "channels",
    "n_layers",
    "latent_dim",
    "context",
    "max_length",
)


@contextmanager
def fitting(recipe: Recipe, folder: Path, also: str = "") -> Iterator[None]:
    """Say which settings make the arrays smaller, where they do not fit.

    Args:
        also: what else does.

    Raises:
        MemoryExhausted: with the array that asked for it, and these.
    """
    try:
        yield
    except Exception as error:
        found = out_of_memory(error)
        if found is None:
            raise
        text = str(error) if isinstance(error, MemoryExhausted) else f"Out of memory: {found}."
        text += f" {smaller(recipe)}{also}."
        if folder.exists():
            text += f" Other settings need another folder than {folder}, which stays as it is."
        raise MemoryExhausted(text) from error


def smaller(recipe: Recipe) -> str:
    """The flags of a recipe that make its arrays smaller, with what they are now."""
    schedule, settings, flags = recipe.schedule, {}, []
    with suppress(GenjaxError):  # of data in memory, which have no loader
        settings = settings_of(recipe)
    if schedule.batch_size > 1:
        flags.append(f"--batch-size {schedule.batch_size // 2} (now {schedule.batch_size})")
        parts = 2 * schedule.microbatches
        if schedule.batch_size % parts == 0:
            flags.append(f"--microbatches {parts}")
    if schedule.place != "host":
        flags.append("--place host, for large data")
    if "remat" in settings and settings["remat"].value == "none":
        flags.append("--remat full")
    lines = "layout" in settings and settings["layout"].value == "lines"
    for name, setting in settings.items():
        # Of a text's two settings of length one is for lines and one for windows.
        if setting.name in SIZES and setting.name != ("context" if lines else "max_length"):
            now = " ".join(map(str, setting.value)) if _several(setting.value) else setting.value
            flags.append(f"--{name.replace('_', '-')}" + (f" (now {now})" if now else " N"))
    return f"What makes it smaller: {'; '.join(flags)}"


def _several(value: object) -> bool:
    return isinstance(value, (tuple, list))


def widest(recipe: Recipe) -> int:
    """The largest whole number among the settings of a recipe's model that were given."""
    values = [value if _several(value) else (value,) for value in recipe.model.values()]
    return max((one for some in values for one in some if isinstance(one, int)), default=1)
