"""The rows that a job's request names: its files, and the adapter that it continues if `model` is one of the project's.

Everything here happens in the caller's transaction.
"""

from sqlalchemy import Connection

from services.gateway.files.store import FileStore, StoredFile
from services.gateway.jobs.request_schema import JobRequest, training_field
from services.gateway.jobs.resolution import Parent, Sources
from shared.adapters.names import PREFIX, may_be_adapter_name
from shared.adapters.store import AdapterStore
from shared.errors import InvalidRequest, NotFound
from shared.jobs.spec import JobSpec
from shared.jobs.store import JobStore


class JobSources:
    """Finds what requests name, among what the caller's project owns."""

    def __init__(self, files: FileStore, jobs: JobStore, adapters: AdapterStore) -> None:
        self._files = files
        self._jobs = jobs
        self._adapters = adapters

    def load(self, tx: Connection, project: str, request: JobRequest) -> Sources:
        """Raises InvalidRequest: the field that names something unknown is named."""
        parent = self._parent(tx, project, request.model)
        if request.training_files:
            named = [(file, f"training_files.{place}") for place, file in enumerate(request.training_files)]
        else:
            named = [(request.training_file, "training_file")]
        training = tuple(self._file(tx, project, *each) for each in named)
        if request.validation_file is None:
            return Sources(training, None, parent)
        return Sources(training, self._file(tx, project, request.validation_file, "validation_file"), parent)

    def lock(self, tx: Connection, project: str, spec: JobSpec) -> None:
        """Make sure that what a job needs still exists, and stays until the transaction ends.

        Raises:
            InvalidRequest: a file, or the adapter to continue, is gone; the field that names it is named.
        """
        files = spec.training_files
        named = {file.id: training_field(place, len(files)) for place, file in enumerate(files)}
        if spec.validation_file is not None:
            named.setdefault(spec.validation_file, "validation_file")
        # In one order, so that two transactions never wait for one another.
        for file_id in sorted(named):
            self._file(tx, project, file_id, named[file_id], lock=True)
        if spec.initial_adapter is None:
            return
        try:
            self._adapters.get(tx, project, spec.initial_adapter, lock=True)
        except NotFound as error:
            raise InvalidRequest(error.message, param="model", code="model_not_found") from None

    def _parent(self, tx: Connection, project: str, model: str) -> Parent | None:
        if not (model.startswith(PREFIX) and may_be_adapter_name(model)):
            return None
        try:
            adapter = self._adapters.get(tx, project, model)
        except NotFound as error:
            raise InvalidRequest(error.message, param="model", code="model_not_found") from None
        return Parent(adapter.id, adapter.base, self._jobs.get(tx, project, adapter.job).spec.lora)

    def _file(self, tx: Connection, project: str, file_id: str, param: str, *, lock: bool = False) -> StoredFile:
        try:
            return self._files.get(tx, project, file_id, lock=lock)
        except NotFound as error:
            raise InvalidRequest(error.message, param=param, code="file_not_found") from None
