"""What the commands share on the terminal: tables, counters, and numbers in flags. Nothing heavy is
imported here.
"""

import math
import sys
import unicodedata
from collections.abc import Callable
from typing import Any

from genjax.errors import ConfigError


def plain(text: str) -> str:
    """A text without what a terminal would obey or turn around: control characters but for line
    ends and tabs, and marks of writing direction, are shown as escapes.
    """
    return "".join(map(_shown, text))


def _shown(character: str) -> str:
    if character in "\n\t":
        return character
    obeyed = unicodedata.category(character) == "Cc" or character in _DIRECTIONS
    return character.encode("unicode_escape").decode() if obeyed else character


_DIRECTIONS = "\u061c\u200e\u200f\u2028\u2029\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069"


def say(text: str, file: Any = None) -> None:
    """Print what may hold names and texts of somebody else's."""
    print(plain(text), file=file, flush=True)


def print_table(title: str, columns: list[str], rows: list[list[str]]) -> None:
    """A table on standard output; wide where nobody sees it, because folded lines cannot be
    searched.
    """
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    # Into a file or a pipe rich would fold at 80 columns, which nobody can grep.
    console = Console() if sys.stdout.isatty() else Console(width=200)
    console.print(
        plain(title), style="bold", markup=False, highlight=False
    )  # a table's own title is folded to the table's width
    table = Table()
    for column in columns:
        table.add_column(column, overflow="fold")
    for row in rows:
        table.add_row(*(escape(plain(cell)) for cell in row))  # brackets are text, not markup
    console.print(table)


def counter(name: str) -> Callable[[int, int], None]:
    """A plain count on standard error, rewritten in place on a terminal and silent elsewhere."""

    def show(done: int, total: int) -> None:
        if sys.stderr.isatty():
            print(
                f"\r{name} {done}/{total}",
                end="\n" if done == total else "",
                file=sys.stderr,
                flush=True,
            )

    return show


def numbers(flag: str, value: str) -> list[float]:
    """The numbers of a flag, which are separated by commas.

    Raises:
        ConfigError: if it has none, or anything else.
    """
    try:
        found = [float(text) for text in value.split(",") if text]
    except ValueError:
        found = []
    if not found or not all(map(math.isfinite, found)):
        raise ConfigError(f"{flag} takes finite numbers separated by commas; got {value!r}.")
    return found


def are_numbers(value: str) -> bool:
    """Whether a flag's value is a list between commas that has a number, such as 0.1,0.2, so that
    it is the axis of a sweep; "flip,crop1" is not.
    """
    from genjax.settings import is_number  # late: it imports jax

    return "," in value and any(map(is_number, value.split(",")))


def check_count(name: str, count: int | None) -> None:
    """Refuse a size that is none; None was not given.

    Raises:
        ConfigError: for one outside 1 .. 2**31 - 1.
    """
    if count is None or 1 <= count < 2**31:
        return
    wanted = "at least 1" if count < 1 else "at most 2**31 - 1"
    raise ConfigError(f"--{name.replace('_', '-')} must be {wanted}; got {count}.")


def check_seed(seed: int) -> None:
    """Refuse a seed that is none.

    Raises:
        ConfigError: for one outside 0 .. 2**32 - 1.
    """
    if not 0 <= seed < 2**32:
        raise ConfigError(f"--seed must be from 0 to 2**32 - 1; got {seed}.")
