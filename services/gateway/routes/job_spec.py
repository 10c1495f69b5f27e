"""Which specification a project's request comes to; `model` may be one of its adapters, which is then continued."""

from services.gateway.jobs.request_schema import JobRequest
from services.gateway.jobs.resolution import Parent, Resolved
from services.gateway.services import Services
from shared.errors import InvalidRequest, NotFound


def resolve(services: Services, project: str, body: JobRequest) -> Resolved:
    """Raises InvalidRequest: the field at fault is named."""

    def parent_of(model: str) -> Parent | None:
        if not (model.startswith("ft:") and model.isascii() and model.isprintable()):
            return None
        try:
            adapter = services.models.adapter(project, model)
        except NotFound as error:
            raise InvalidRequest(error.message, param="model", code="model_not_found") from None
        return Parent(adapter.id, adapter.base, services.jobs.get(project, adapter.job).spec.lora)

    return services.resolver.resolve(body, lambda file_id: services.files.get(project, file_id), parent_of)
