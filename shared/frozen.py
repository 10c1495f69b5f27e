"""Values that cross a process boundary: their base class, and field types that several of them use."""

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field


class Frozen(BaseModel):
    """A value that crosses a process boundary: immutable, closed, and free of NaN."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


# The last part of a torch module's name, as LoRA's targets are given.
ModuleName = Annotated[str, Field(pattern=r"^[A-Za-z_][A-Za-z0-9_]{0,63}$")]
