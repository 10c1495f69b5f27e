"""What must hold on a CUDA device (`make test-gpu`); skipped, and said to be, where there is none."""

from typing import Any

import pytest
import torch

from services.trainer.model.bases import WarmBases
from services.trainer.model.forward import pack, supervised_logits
from services.trainer.model.llama import fused_form
from shared.bases.catalogue import Catalogue
from shared.jobs.spec import BasePrecision
from tests.services.trainer.harness import RecordingSession, TinyJob, instruction_rows, weights_of
from tests.services.trainer.model.test_forward import LENGTHS, ragged, random_llama

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]
CUDA = torch.device("cuda")


def on_cuda(tiny: TinyJob) -> WarmBases:
    return WarmBases(Catalogue((tiny.base,)), tiny.store, CUDA)


@pytest.mark.parametrize("precision", ["int8", "nf4", "bf16", "fp32"])
def test_every_precision_trains_and_its_adapter_is_checked(tiny: TinyJob, precision: BasePrecision) -> None:
    spec = tiny.spec(base_precision=precision, validation=instruction_rows(5, start=40))
    report = tiny.finish(spec, bases=on_cuda(tiny)).report
    assert report.eval_loss_before is not None
    assert report.eval_loss_after is not None
    assert report.eval_loss_after < report.eval_loss_before
    assert report.peak_memory_mb > 0


def test_a_packed_samples_logits_are_its_own_alone() -> None:
    model: Any = random_llama().to(CUDA)
    assert fused_form(model) is None
    samples = ragged(LENGTHS)
    with torch.no_grad():
        together = supervised_logits(model, pack(samples, CUDA))
        alone = torch.cat([supervised_logits(model, pack([sample], CUDA)) for sample in samples])
    torch.testing.assert_close(together, alone, rtol=0, atol=1e-3)


def test_a_stopped_job_goes_on_from_its_checkpoint(tiny: TinyJob) -> None:
    """Bytes are promised on CPUs only: atomics in CUDA's backward passes may differ in the last bit."""
    spec, bases = tiny.spec(base_precision="fp32"), on_cuda(tiny)
    whole = tiny.finish(spec, job="ftjob-whole", bases=bases)
    first = RecordingSession(stop=lambda steps: steps == 4)
    tiny.run(spec, first, bases=bases)
    found = [tiny.store.checkpoint("ftjob-one", 1, commit.step) for commit in reversed(first.commits)]
    resumed = tiny.finish(spec, token=2, candidates=found, bases=bases)
    assert resumed.report.steps == whole.report.steps
    assert resumed.report.train_loss == pytest.approx(whole.report.train_loss, rel=1e-3)
    assert weights_of(resumed)


def test_the_loss_and_gradient_are_the_cpus(tiny: TinyJob) -> None:
    spec = tiny.spec(base_precision="fp32", compute_dtype="fp32", hyper={"max_steps": 3})
    losses = [tiny.finish(spec, job=f"ftjob-{i}", bases=b).report for i, b in enumerate((tiny.bases, on_cuda(tiny)))]
    assert losses[1].train_loss == pytest.approx(losses[0].train_loss, rel=1e-2)
