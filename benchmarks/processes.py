"""Programs that are timed in processes of their own: they say one line when they are ready, and
answer every line with one.
"""

import subprocess
import threading
from typing import Any


class AskedProcess:
    """The program as a process; `greeting` is its first line. One that takes longer than `seconds`
    for an answer is ended.
    """

    def __init__(
        self, command: list[str], env: dict[str, str] | None = None, seconds: float = 3600
    ) -> None:
        self.command, self.seconds = command, seconds
        pipes: Any = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        self.process = subprocess.Popen(command, env=env, **pipes)
        self.greeting = self._answer()

    def _answer(self) -> str:
        timer = threading.Timer(self.seconds, self.process.kill)
        timer.daemon = True
        timer.start()
        line = self.process.stdout.readline().strip() if self.process.stdout else ""
        timer.cancel()
        if not line:
            self.kill()
            raise RuntimeError(
                f"`{' '.join(self.command)}` ended without an answer, or had none after "
                f"{self.seconds:g} s; its message is above."
            )
        return line

    def ask(self, line: str) -> str:
        """The answer to a line."""
        assert self.process.stdin
        self.process.stdin.write(line + "\n")
        self.process.stdin.flush()
        return self._answer()

    def kill(self) -> None:
        """End the process at once."""
        self.process.kill()
        self.process.communicate()

    def close(self) -> None:
        """End the process when it has done what it was asked."""
        self.process.communicate(timeout=300)
