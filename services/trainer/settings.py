"""A training worker's settings, beside those all services share."""

import os
import socket

from pydantic import Field

from shared.settings import Settings


class TrainerSettings(Settings):
    """Settings of one worker.

    Attributes:
        worker_name: what events and logs call it.
        threads: torch threads; fixed, because a resumed job must compute as it did before. 0 takes every core.
        nice: how far the worker stands back for other processes on its cores (0 to 19): serving goes before training.
        renew_seconds: how often the worker shows life while it holds a job; the reaper waits 15 s.
    """

    worker_name: str = Field(default_factory=socket.gethostname)
    threads: int = Field(0, ge=0, le=1024)
    nice: int = Field(10, ge=0, le=19)
    renew_seconds: float = Field(5.0, gt=0, le=10)

    @property
    def torch_threads(self) -> int:
        return self.threads or os.cpu_count() or 1
