"""A model as clients see it: OpenAI's Model, and where it comes from."""

from typing import Annotated, Literal

from pydantic import BaseModel, Field

from shared.adapters.state import AdapterState
from shared.adapters.store import Adapter
from shared.bases.catalogue import Base


class ModelJson(BaseModel):
    """`parent` is the base an adapter was trained on; `state` of a base says whether inference serves it now.

    `prepared` says of a base whether its weights lie on this installation; else the first job on it brings them.
    """

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str
    kind: Literal["base", "adapter", "checkpoint"]
    parent: str | None
    state: Literal["served", "not_served", "published"]
    prepared: bool | None = None
    job: str | None = None
    step: int | None = None
    adapter: str | None = None


class ModelListJson(BaseModel):
    object: Literal["list"] = "list"
    data: list[ModelJson]


class ModelDeletedJson(BaseModel):
    id: str
    object: Literal["model"] = "model"
    deleted: Literal[True] = True
    freed_bytes: Annotated[int, Field(description="of the disk; files that another adapter shares are not freed")]


def base_json(base: Base, *, served: bool, prepared: bool) -> ModelJson:
    return ModelJson(
        id=base.id,
        created=0,
        owned_by="tunesmith",
        kind="base",
        parent=None,
        state="served" if served else "not_served",
        prepared=prepared,
    )


def adapter_json(adapter: Adapter, project: str) -> ModelJson:
    return ModelJson(
        id=adapter.name,
        created=adapter.created_at,
        owned_by=project,
        kind="checkpoint" if adapter.is_checkpoint else "adapter",
        parent=adapter.base,
        state=AdapterState.PUBLISHED.value,
        job=adapter.job,
        step=adapter.step,
        adapter=adapter.id,
    )
