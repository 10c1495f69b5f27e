"""A file as clients see it: OpenAI's FileObject, with the dataset's report as an extra key."""

from typing import Literal

from pydantic import BaseModel

from services.gateway.files.store import StoredFile
from shared.datasets.examples import Format
from shared.paging import Page


class LengthBin(BaseModel):
    """Rows whose texts have at most `up_to` characters and more than the bin before; null is the last bin."""

    up_to: int | None
    rows: int


class DatasetJson(BaseModel):
    format: Format
    rows: int
    duplicates: int
    length_histogram: list[LengthBin]
    warnings: list[str]


class FileJson(BaseModel):
    id: str
    object: Literal["file"] = "file"
    bytes: int
    created_at: int
    expires_at: int | None = None
    filename: str
    purpose: Literal["fine-tune"]
    status: Literal["processed"] = "processed"
    status_details: str | None = None
    sha256: str
    dataset: DatasetJson


class FileListJson(BaseModel):
    object: Literal["list"] = "list"
    data: list[FileJson]
    first_id: str | None
    last_id: str | None
    has_more: bool


class FileDeletedJson(BaseModel):
    id: str
    object: Literal["file"] = "file"
    deleted: Literal[True] = True


def file_json(file: StoredFile) -> FileJson:
    return FileJson(
        id=file.id,
        bytes=file.bytes,
        created_at=file.created_at,
        filename=file.filename,
        purpose="fine-tune",
        sha256=file.sha256,
        dataset=DatasetJson.model_validate(file.dataset),
    )


def file_list_json(page: Page[StoredFile]) -> FileListJson:
    data = [file_json(file) for file in page.items]
    return FileListJson(
        data=data,
        first_id=data[0].id if data else None,
        last_id=data[-1].id if data else None,
        has_more=page.has_more,
    )
