"""Settings that contradict each other end a process at its start, with a sentence that names both."""

import pytest

from services.gateway.settings import GatewaySettings
from services.inference.settings import InferenceSettings
from services.trainer.settings import TrainerSettings
from shared.settings import LeaseSettings, Settings, read_settings


@pytest.mark.parametrize("settings", [GatewaySettings, TrainerSettings])
@pytest.mark.parametrize(
    ("environment", "fits"),
    [
        ({}, True),
        ({"LEASE_SECONDS": "3"}, False),
        ({"RENEW_SECONDS": "6"}, False),
        ({"RENEW_SECONDS": "20", "LEASE_SECONDS": "60"}, True),
        ({"RENEW_SECONDS": "1", "LEASE_SECONDS": "3"}, True),
    ],
)
def test_a_lease_outlasts_three_renewals(
    monkeypatch: pytest.MonkeyPatch, settings: type[LeaseSettings], environment: dict[str, str], fits: bool
) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(f"TUNESMITH_{name}", value)
    if fits:
        read_settings(settings)
        return
    with pytest.raises(SystemExit, match=r"settings: TUNESMITH_LEASE_SECONDS .* TUNESMITH_RENEW_SECONDS"):
        read_settings(settings)


@pytest.mark.parametrize(
    ("settings", "name", "value"),
    [
        (GatewaySettings, "TUNESMITH_PORT", "80000"),
        (GatewaySettings, "TUNESMITH_UMASK", "rw"),
        (TrainerSettings, "TUNESMITH_THREADS", "-1"),
        (InferenceSettings, "TUNESMITH_INFERENCE_SLOTS", "none"),
    ],
)
def test_a_wrong_setting_is_named(
    monkeypatch: pytest.MonkeyPatch, settings: type[Settings], name: str, value: str
) -> None:
    monkeypatch.setenv(name, value)
    with pytest.raises(SystemExit, match=rf"^settings: {name}: [^\n]*, not '{value}'$"):
        read_settings(settings)


def test_a_secret_is_not_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TUNESMITH_INFERENCE_HOST", "0.0.0.0")
    monkeypatch.setenv("TUNESMITH_DATABASE_URL", "postgresql://u:hidden@h/d")
    with pytest.raises(SystemExit) as stopped:
        read_settings(InferenceSettings)
    assert "hidden" not in str(stopped.value)
    assert "TUNESMITH_INTERNAL_TOKEN" in str(stopped.value)
