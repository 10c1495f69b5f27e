import pytest

from shared.adapters.names import adapter_name, checkpoint_name, is_checkpoint_name, may_be_adapter_name


def test_names_are_openais() -> None:
    """Clients keep them: a change here breaks what they have written down."""
    final = adapter_name(base="tiny", project="default", suffix="docs", job_id="ftjob-0123456789abcdef01234567")
    assert final == "ft:tiny:default:docs:0123456789ab"
    assert adapter_name(base="b", project="p", suffix=None, job_id="ftjob-0123456789abcdef") == "ft:b:p::0123456789ab"
    assert checkpoint_name(final, 120) == "ft:tiny:default:docs:0123456789ab:ckpt-step-120"


@pytest.mark.parametrize("suffix", [None, "docs", "ckpt-step-1"])
def test_checkpoints_are_recognised(suffix: str | None) -> None:
    final = adapter_name(base="ckpt", project="step", suffix=suffix, job_id="ftjob-0123456789abcdef")
    assert not is_checkpoint_name(final)
    assert is_checkpoint_name(checkpoint_name(final, 1))


@pytest.mark.parametrize("text", ["a\x00b", "ü", "x" * 256, "a\nb"])
def test_what_cannot_be_a_name(text: str) -> None:
    assert not may_be_adapter_name(text)


def test_every_name_we_make_may_be_one() -> None:
    longest = adapter_name(base="b" * 64, project="p" * 64, suffix="s" * 64, job_id="ftjob-" + "0" * 24)
    assert may_be_adapter_name(checkpoint_name(longest, 10_000_000))
