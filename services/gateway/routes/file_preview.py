"""`/v1/files/{id}/preview`: rows as a model will be given them, with the supervised tokens marked."""

import time
from itertools import groupby, islice
from pathlib import Path
from typing import Annotated, Literal

from fastapi import APIRouter, Query, Request, Response
from pydantic import BaseModel, Field

from services.gateway.bases.tokenised import TokenisedRow, tokenised_rows
from services.gateway.files.schemas import LengthBin
from services.gateway.http.auth import AuthenticatedRoute
from services.gateway.http.small_pool import Check
from services.gateway.jobs.length_check import SECONDS, look_at
from services.gateway.routes.dependencies import (
    ArtifactsDep,
    CatalogueDep,
    DatabaseDep,
    FileId,
    FilesDep,
    Project,
    SmallPoolDep,
    TokenizersDep,
)
from services.gateway.routes.responses import NEEDS_KEY, OPENAI_ERRORS, json_response
from shared.datasets.checker import HISTOGRAM_EDGES
from shared.datasets.loss_mask import MaskedTokens
from shared.datasets.tokens import Tokenizer
from shared.jobs.spec import Hyperparameters

router = APIRouter(route_class=AuthenticatedRoute, tags=["files"], responses=OPENAI_ERRORS, dependencies=[NEEDS_KEY])


class Piece(BaseModel):
    text: str
    supervised: Annotated[bool, Field(description="whether these tokens are supervised, that is, count in the loss")]


class PreviewRow(BaseModel):
    row: Annotated[int, Field(description="counted from 1")]
    template: str
    tokens: int
    supervised_tokens: int
    dropped: Annotated[bool, Field(description="nothing of the response is left within max_length")]
    last_turn_only: Annotated[
        bool, Field(description="the chat template lets only the last of several replies be learnt")
    ]
    control_as_text: Annotated[
        int, Field(description="control tokens in people's texts of this row, which are encoded as text")
    ]
    control_as_tokens: Annotated[int, Field(description="those in the assistant's texts that stay tokens")]
    pieces: list[Piece]


class TokenLengths(BaseModel):
    """Lengths in tokens of this base, by a look at the first rows that takes a second at most."""

    rows: Annotated[int, Field(description="how many were looked at")]
    longest: int
    cut: Annotated[int, Field(description="of them, have a part cut at max_length; texts are divided, not cut")]
    dropped: Annotated[int, Field(description="of them, have nothing left to learn within max_length")]
    histogram: Annotated[list[LengthBin], Field(description="up_to in tokens")]


class PreviewJson(BaseModel):
    object: Literal["list"] = "list"
    model: str
    data: list[PreviewRow]
    lengths: TokenLengths


@router.get("/v1/files/{file_id}/preview", response_model=PreviewJson)
async def preview_file(
    request: Request,
    pool: SmallPoolDep,
    database: DatabaseDep,
    artifacts: ArtifactsDep,
    catalogue: CatalogueDep,
    tokenizers: TokenizersDep,
    files: FilesDep,
    project: Project,
    file_id: FileId,
    model: Annotated[str, Query(min_length=1, max_length=256, description="base whose template and tokens are meant")],
    limit: Annotated[int, Query(ge=1, le=100)] = 5,
    max_length: Annotated[int, Query(ge=8, le=32_768)] = 512,
    train_on_prompt: bool = False,
) -> Response:
    """The first rows of a file as the trainer will see them: template, special tokens and end of text included."""

    def preview(check: Check) -> Response:
        with database.read() as tx:
            file = files.get(tx, project, file_id)
        base = catalogue.get_for_job(model).id
        tokenizer = tokenizers.get(base)
        hyper = Hyperparameters(max_length=max_length, train_on_prompt=train_on_prompt)
        path = artifacts.file_rows(file.id)
        rows = [_row(row, tokenizer) for row in islice(tokenised_rows(path, tokenizer, hyper, check), limit)]
        lengths = _lengths(path, tokenizer, hyper, check, divided=file.dataset["format"] == "text")
        return json_response(PreviewJson(model=base, data=rows, lengths=lengths))

    return await pool.run(request, preview)


def _lengths(path: Path, tokenizer: Tokenizer, hyper: Hyperparameters, check: Check, *, divided: bool) -> TokenLengths:
    deadline = time.monotonic() + SECONDS

    def over() -> bool:
        check()
        return time.monotonic() > deadline

    look = look_at(path, tokenizer, hyper, over)
    return TokenLengths(
        rows=look.rows,
        longest=look.longest,
        cut=0 if divided else look.cut,
        dropped=0 if divided else look.dropped,
        histogram=[
            LengthBin(up_to=edge, rows=rows)
            for edge, rows in zip([*HISTOGRAM_EDGES, None], look.counts, strict=True)
            if rows
        ],
    )


def _row(row: TokenisedRow, tokenizer: Tokenizer) -> PreviewRow:
    tokens = row.tokens
    return PreviewRow(
        row=row.number,
        template=row.template,
        tokens=len(tokens.ids) if tokens else 0,
        supervised_tokens=tokens.supervised_count if tokens else 0,
        dropped=tokens is None,
        last_turn_only=tokens is not None and tokens.last_turn_only,
        control_as_text=tokens.control_as_text if tokens else 0,
        control_as_tokens=tokens.control_as_tokens if tokens else 0,
        pieces=pieces(tokens, tokenizer) if tokens else [],
    )


def pieces(tokens: MaskedTokens, tokenizer: Tokenizer) -> list[Piece]:
    """Runs of tokens that are all supervised or all not, as text."""
    marked = zip(tokens.ids, tokens.supervised, strict=True)
    return [
        Piece(text=tokenizer.decode([i for i, _ in run], skip_special_tokens=False), supervised=supervised)
        for supervised, run in groupby(marked, key=lambda token: token[1])
    ]
