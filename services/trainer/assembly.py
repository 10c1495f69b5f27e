"""Puts one worker together from its settings; the only place that chooses implementations."""

from collections.abc import Callable

import torch

from services.trainer.bases import WarmBases
from services.trainer.metrics import measure_peak_flops
from services.trainer.settings import TrainerSettings
from services.trainer.work import Worker
from shared.artifacts import LocalArtifactStore
from shared.base_model import choose_device, compute_dtype, quiet_libraries
from shared.catalogue import load_catalogue
from shared.database import Database
from shared.leases import Leases


def make_worker(settings: TrainerSettings, *, handover: Callable[[], bool]) -> Worker:
    """A worker on this process's device. Fixes torch's thread count: resumed jobs must compute as before."""
    quiet_libraries()
    torch.set_num_threads(settings.torch_threads)
    store = LocalArtifactStore(settings.artifacts_root)
    device = choose_device()
    return Worker(
        Leases(Database(settings.sql_url)),
        store,
        WarmBases(load_catalogue(settings.catalogue), store, device),
        name=settings.worker_name,
        handover=handover,
        renew_seconds=settings.renew_seconds,
        peak_flops=measure_peak_flops(device, compute_dtype("auto", device)),
    )
