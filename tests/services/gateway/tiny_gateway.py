"""A gateway on the tiny model: for what depends on a base's tokenizer, template and context."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from services.gateway.settings import GatewaySettings
from shared.bases.base_model import prepare_base
from shared.storage.artifacts import LocalArtifactStore
from tests.services.gateway.conftest import Gateway, running_gateway
from tests.tiny import tiny_catalogue, write_catalogue, write_tiny_model


@contextmanager
def running_on_tiny(home: Path, redis_url: str) -> Iterator[Gateway]:
    """One whose only base, `tiny`, is prepared."""
    model = write_tiny_model(home / "model")
    catalogue = write_catalogue(home / "catalogue.toml", model)
    settings = GatewaySettings.model_validate({"home": home, "redis_url": redis_url, "catalogue": catalogue})
    prepare_base(tiny_catalogue(model).get("tiny"), LocalArtifactStore(settings.artifacts_root))
    with running_gateway(settings) as running:
        yield running
