"""A training worker's settings, beside those all services share."""

import os
import socket

from pydantic import Field

from shared.settings import LeaseSettings


class TrainerSettings(LeaseSettings):
    """Settings of one worker.

    Attributes:
        worker_name: the name in events and logs.
        threads: torch threads; fixed, because a resumed job computes the same bits only with the same number. 0 takes
            every core.
        nice: the worker's niceness (0 to 19): on shared cores, serving goes before training.
        strict_resume: fail a job that was begun on a machine that computes otherwise (cores, instruction set, device),
            instead of going on with it and saying so.
    """

    worker_name: str = Field(default_factory=socket.gethostname)
    threads: int = Field(0, ge=0, le=1024)
    nice: int = Field(10, ge=0, le=19)
    strict_resume: bool = False

    @property
    def torch_threads(self) -> int:
        return self.threads or os.cpu_count() or 1
