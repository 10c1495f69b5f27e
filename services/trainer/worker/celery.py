"""The Celery edge: `celery -A services.trainer.worker worker -P prefork -c 1 …`. A notification starts it.

Owns the life of processes only. torch is imported in the child, at the first notification: the parent never touches a
device, and a replacement child is up before its supervisor times out.
"""

import mmap
import os
import subprocess
import sys
from typing import Any

from celery.signals import (
    celeryd_init,
    setup_logging,
    worker_process_init,
    worker_process_shutdown,
    worker_shutting_down,
)

from services.trainer.settings import TrainerSettings
from shared.file_modes import keep_files_private
from shared.jobs.notification import NOTIFY, celery_app
from shared.logs import configure_logging
from shared.settings import read_settings
from shared.torch_environment import prepare_for_torch

settings = read_settings(TrainerSettings)
app = celery_app(settings.redis_url)

# One byte each of memory that forked children share with their parent. The first is set on shutdown and read between
# micro-batches; the second counts faults of this machine. A lock would be held for ever by a child that is killed.
_handover = mmap.mmap(-1, 1)
_faults = mmap.mmap(-1, 1)
_worker: Any = None
_presence: Any = None


@setup_logging.connect
def _setup_logging(**_: object) -> None:
    # A connected receiver keeps Celery from installing handlers of its own.
    configure_logging("trainer", settings.log_level)


@celeryd_init.connect
def _keep_files_private(**_: object) -> None:
    keep_files_private(settings.umask)


@celeryd_init.connect
def _refuse_to_start_without_the_gpu(**_: object) -> None:
    """In a process of its own, for torch stays out of this one."""
    if settings.device == "cuda":
        command = [sys.executable, "-m", "shared.installation", "device"]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode != 0:
            sys.exit(done.stderr.strip()[-1000:])


@worker_shutting_down.connect
def _hand_over(**_: object) -> None:
    _handover[0] = 1


@worker_process_init.connect
def _be_present(**_: object) -> None:
    """In the child: what the parent opened, a fork would share."""
    global _presence
    from services.trainer.worker.presence import Presence
    from shared.jobs.workers import Workers
    from shared.storage.database import Database

    _presence = Presence(Workers(Database(settings.sql_url)), settings.worker_name, os.getpid())
    _presence.start()


@worker_process_shutdown.connect
def _be_gone(**_: object) -> None:
    if _presence is not None:
        _presence.stop()


@app.task(name=NOTIFY, ignore_result=True)
def notify() -> None:
    """Train every queued job, then wait for the next notification."""
    global _worker
    if _worker is None:
        prepare_for_torch(os.environ)
        os.nice(settings.nice)
        from services.trainer.worker.build import make_worker
        from services.trainer.worker.out_of_service import FaultCount

        _worker = make_worker(settings, handover=lambda: bool(_handover[0]), faults=FaultCount(_faults))
    from services.trainer.worker.loop import DeviceLost

    try:
        _worker.drain_queue()
    except DeviceLost:
        # Not even destructors are reliable now; billiard replaces this child with a fresh one.
        os._exit(1)
