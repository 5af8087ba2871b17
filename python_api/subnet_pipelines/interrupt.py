"""SIGTERM and SIGINT set a flag that is read between batches."""

from __future__ import annotations

import signal
import threading


class Interrupted(Exception):
    """A signal stopped the run; `signum` says which."""

    def __init__(self, signum: int, where: str):
        super().__init__(f"stopped {where}; the same command with --resume goes on from there")
        self.signum = signum


class Stop:
    """Within its block, SIGTERM and SIGINT only set `signum`; a second one acts as it did before."""

    signum: int | None = None

    def __enter__(self) -> Stop:
        self.before = {}
        if threading.current_thread() is threading.main_thread():
            self.before = {s: signal.signal(s, self.note) for s in (signal.SIGTERM, signal.SIGINT)}
        return self

    def __exit__(self, *_: object) -> None:
        for signum, handler in self.before.items():
            signal.signal(signum, handler)
        self.before = {}

    def note(self, signum: int, _frame: object) -> None:
        self.signum = signum
        self.__exit__()

    def obey(self, where: str) -> None:
        """Raise Interrupted if a signal came."""
        if self.signum is not None:
            raise Interrupted(self.signum, where)
