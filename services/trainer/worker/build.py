"""The worker's composition root: builds one from its settings, and alone chooses implementations."""

from collections.abc import Callable
from typing import get_args

import torch

from services.trainer.model.bases import WarmBases
from services.trainer.recipe.metrics import measure_peak_flops
from services.trainer.settings import TrainerSettings
from services.trainer.worker.loop import Worker
from services.trainer.worker.out_of_service import FaultCount
from shared.bases.base_model import compute_dtype, quiet_libraries
from shared.bases.catalogue import load_catalogue
from shared.bases.device import choose_device, take_share
from shared.jobs.leases import Leases
from shared.jobs.spec import BasePrecision
from shared.jobs.worker_outages import WorkerOutages
from shared.storage.artifacts import LocalArtifactStore
from shared.storage.database import Database
from shared.storage.installation_id import require_own_folder


def make_worker(settings: TrainerSettings, *, handover: Callable[[], bool], faults: FaultCount) -> Worker:
    """A worker on this process's device. Fixes torch's thread count: resumed jobs should compute as before.

    Raises:
        TunesmithError: the settings want a GPU, and there is none.
    """
    quiet_libraries()
    torch.set_num_threads(settings.torch_threads)
    store = LocalArtifactStore(settings.artifacts_root, settings.reserve_bytes)
    device = choose_device(settings.device)
    take_share(device, settings.gpu_share)
    database = Database(settings.sql_url)

    def check_folder() -> None:
        with database.read() as tx:
            require_own_folder(tx, store)

    return Worker(
        Leases(database),
        store,
        WarmBases(load_catalogue(settings.catalogue), store, device, lambda: load_catalogue(settings.catalogue)),
        name=settings.worker_name,
        outages=WorkerOutages(database),
        handover=handover,
        faults=faults,
        check_folder=check_folder,
        renew_seconds=settings.renew_seconds,
        strict_resume=settings.strict_resume,
        peak_flops={dtype: measure_peak_flops(device, dtype) for dtype in _dtypes(device)},
    )


def _dtypes(device: torch.device) -> set[torch.dtype]:
    """What jobs with `compute_dtype` auto multiply in here."""
    return {compute_dtype("auto", device, precision) for precision in get_args(BasePrecision)}
