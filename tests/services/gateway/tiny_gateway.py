"""A gateway on the tiny model: for what depends on a base's tokenizer, template and context."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from unittest.mock import patch

from services.gateway.jobs.length_check import LengthCheck
from services.gateway.routes import file_preview
from services.gateway.settings import GatewaySettings
from shared.bases.base_model import prepare_base
from shared.storage.artifacts import LocalArtifactStore
from tests.services.gateway.conftest import Gateway, running_gateway
from tests.tiny import tiny_catalogue, write_catalogue, write_tiny_model


@contextmanager
def running_on_tiny(home: Path, redis_url: str) -> Iterator[Gateway]:
    """One whose only base, `tiny`, is prepared.

    It looks at a file's rows for as long as it takes: how far it comes in a second says how busy the machine is.
    """
    model = write_tiny_model(home / "model")
    catalogue = write_catalogue(home / "catalogue.toml", model)
    settings = GatewaySettings.model_validate({"home": home, "redis_url": redis_url, "catalogue": catalogue})
    prepare_base(tiny_catalogue(model).get("tiny"), LocalArtifactStore(settings.artifacts_root))
    with (
        patch.dict(LengthCheck.__init__.__kwdefaults__, seconds=600.0),
        patch.object(file_preview, "SECONDS", 600.0),
        running_gateway(settings) as running,
    ):
        yield running
