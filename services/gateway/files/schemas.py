"""A file as clients see it: OpenAI's FileObject, with the dataset's report as an extra key."""

from typing import Annotated, Literal

from pydantic import BaseModel, Field

from services.gateway.files.store import StoredFile
from shared.datasets.examples import Format
from shared.paging import Page


class LengthBin(BaseModel):
    """Rows that have at most `up_to` characters and more than the bin before; null is the last bin."""

    up_to: int | None
    rows: int


class SkippedRow(BaseModel):
    line: Annotated[int, Field(description="1-based; of a Parquet file, the row's number")]
    path: str
    code: str
    message: str


class DerivedJson(BaseModel):
    """Rows as JSON Lines that are kept beside the file's own bytes, and learnt from in their stead."""

    made_from: Literal["json", "csv", "tsv", "parquet"]
    how: str
    bytes: int
    sha256: str


class DatasetJson(BaseModel):
    format: Format
    rows: int
    duplicates: int
    length_histogram: list[LengthBin]
    warnings: list[str]
    skipped_rows: Annotated[int, Field(description="bad rows left out, with on_bad_rows=skip")] = 0
    skipped: Annotated[list[SkippedRow], Field(description="the first hundred of them")] = []
    derived: DerivedJson | None = None


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
