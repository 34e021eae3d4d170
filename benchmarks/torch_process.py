"""A program in an interpreter that has PyTorch: it says one line when it is ready, and answers every line with one."""

import subprocess
from pathlib import Path
from typing import Any


class TorchProcess:
    """The program as a process; `greeting` is its first line."""

    def __init__(self, python: str, script: str, *args: str, env: dict[str, str] | None = None) -> None:
        command = [python, str(Path(__file__).with_name(script)), *args]
        pipes: Any = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        self.process = subprocess.Popen(command, env=env, **pipes)
        self.greeting = self._answer()

    def _answer(self) -> str:
        line = self.process.stdout.readline().strip() if self.process.stdout else ""
        if not line:
            raise RuntimeError("The PyTorch twin ended without an answer; its message is above.")
        return line

    def ask(self, line: str) -> str:
        """The answer to a line."""
        assert self.process.stdin
        self.process.stdin.write(line + "\n")
        self.process.stdin.flush()
        return self._answer()

    def close(self) -> None:
        """End the process."""
        self.process.communicate(timeout=60)
