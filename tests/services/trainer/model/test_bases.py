import gc
import weakref

import pytest
import torch

from services.trainer.recipe.adapter import canonical_name
from shared.bases.catalogue import Base
from shared.jobs.spec import BasePrecision
from tests.services.trainer.harness import TinyJob


def test_a_fresh_load_has_the_same_fingerprint(tiny: TinyJob) -> None:
    spec = tiny.spec()
    first, _ = tiny.bases.load(spec, torch.float32)
    second, _ = tiny.fresh_bases().load(spec, torch.float32)
    assert first.fingerprint == second.fingerprint


@pytest.mark.parametrize("precision", ["int8", "fp32"])
def test_a_base_that_is_discarded_is_gone_at_once(tiny: TinyJob, precision: BasePrecision) -> None:
    """The next one is loaded then, and both may not fit: no reference cycle may keep it."""
    gc.disable()
    try:
        tiny.finish(tiny.spec(base_precision=precision))
        base, _ = tiny.bases.load(tiny.spec(base_precision=precision), torch.float32)
        model, weights = (
            weakref.ref(base.loaded.model),
            [weakref.ref(weight) for weight in base.loaded.model.parameters()],
        )
        del base
        tiny.bases.discard()
        assert model() is None
        assert [weight() for weight in weights if weight() is not None] == []
    finally:
        gc.enable()


def test_a_job_leaves_no_tensor_behind(tiny: TinyJob) -> None:
    left = []
    for number in range(3):
        tiny.finish(tiny.spec(), job=f"ftjob-{number}")
        gc.collect()
        left.append(sum(issubclass(type(thing), torch.Tensor) for thing in gc.get_objects()))
    assert left[0] == left[1] == left[2]


def test_the_canonical_name_is_the_hubs_where_the_base_comes_from_there() -> None:
    commit = "a" * 40
    assert canonical_name(Base(id="tiny", source=f"hub:org/Model-1B@{commit}")) == "org/Model-1B"
    assert canonical_name(Base(id="tiny", source="folder:/models/tiny")) == "tiny"
