"""`python -m genjax` is the `genjax` program."""

from genjax.cli import main

if __name__ == "__main__":
    main()
