"""Programs that are timed in processes of their own: they say one line when they are ready, and
answer every line with one.
"""

import subprocess
from typing import Any


class AskedProcess:
    """The program as a process; `greeting` is its first line."""

    def __init__(self, command: list[str], env: dict[str, str] | None = None) -> None:
        self.command = command
        pipes: Any = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        self.process = subprocess.Popen(command, env=env, **pipes)
        self.greeting = self._answer()

    def _answer(self) -> str:
        line = self.process.stdout.readline().strip() if self.process.stdout else ""
        if not line:
            raise RuntimeError(
                f"`{' '.join(self.command)}` ended without an answer; its message is above."
            )
        return line

    def ask(self, line: str) -> str:
        """The answer to a line."""
        assert self.process.stdin
        self.process.stdin.write(line + "\n")
        self.process.stdin.flush()
        return self._answer()

    def close(self) -> None:
        """End the process."""
        self.process.communicate(timeout=300)
