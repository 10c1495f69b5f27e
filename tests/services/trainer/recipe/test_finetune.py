"""The recipe end to end on a tiny model: what it leaves behind, what it says, and what it refuses."""

import json
from typing import Any

import numpy as np
import pytest
import torch
from peft import PeftModel, get_peft_model_state_dict
from safetensors.torch import load_file

from services.trainer.contract import Finished
from services.trainer.data.dataset import Rows, prepare_data
from services.trainer.model.bases import WarmBases
from services.trainer.model.fingerprint import fingerprint
from services.trainer.model.forward import pack, supervised_logits, training_forward
from services.trainer.recipe.evaluate import evaluation_loss
from shared.bases.base_model import load_base
from shared.errors import JobFailed, LeaseLost, Unavailable
from shared.jobs.spec import BasePrecision, Hyperparameters, JobSpec, LoraSpec, Phase, Progress
from shared.storage.artifacts import sha256_of
from tests.rounding import close, llama_sums, rounding
from tests.services.trainer.harness import CPU, RecordingSession, TinyJob, ignore, instruction_rows, weights_of

HELD_OUT = instruction_rows(5, start=40)


def test_an_int8_job_ends_with_one_checked_adapter_that_plain_peft_loads(tiny: TinyJob) -> None:
    session = RecordingSession()
    spec = tiny.spec(validation=HELD_OUT)
    outcome = tiny.finish(spec, session)

    manifest = tiny.store.verify(tiny.store.adapter(outcome.adapter_id), "adapter")
    assert manifest == outcome.adapter
    assert (manifest.job, manifest.step, manifest.precision) == ("ftjob-one", 6, "int8")
    assert (manifest.template, manifest.data_sha256) == ("instruction-v1", spec.training_sha256)
    assert manifest.base_revision == tiny.base.revision
    assert set(manifest.files) == {"adapter_model.safetensors", "adapter_config.json"}

    folder = tiny.store.adapter(outcome.adapter_id)
    weights = load_file(folder / "adapter_model.safetensors")
    assert {t.dtype for t in weights.values()} == {torch.float32}
    assert all(t.any() for t in weights.values())
    packed = pack([(np.arange(3, 20), np.arange(17) > 4)], CPU)
    base = load_base(tiny.base, tiny.store, "fp32", CPU).model
    with torch.no_grad():
        before = supervised_logits(base, packed)
        peft_model = PeftModel.from_pretrained(base, folder)
        assert not torch.equal(supervised_logits(peft_model, packed), before)
        # What LoRA is: W + (alpha / r) B A, whoever applies it.
        layer = base.model.layers[0].self_attn.q_proj
        key = "base_model.model.model.layers.0.self_attn.q_proj.lora_{}.weight"
        x = torch.randn(2, 32)
        delta = x @ weights[key.format("A")].T @ weights[key.format("B")].T * 4
        assert close(layer(x), layer.base_layer(x) + delta, rounding(torch.float32, [32, 8, 32]))


def test_the_configuration_names_the_base_and_holds_no_defaults(tiny: TinyJob) -> None:
    outcome = tiny.finish(tiny.spec(lora=LoraSpec(r=4, alpha=8, use_rslora=True)))
    config = json.loads((tiny.store.adapter(outcome.adapter_id) / "adapter_config.json").read_text())
    expected = {
        "peft_type": "LORA",
        "base_model_name_or_path": "tiny",
        "revision": tiny.base.revision,
        "r": 4,
        "lora_alpha": 8,
        "target_modules": ["q_proj", "v_proj"],
        "use_rslora": True,
        "inference_mode": True,
    }
    assert config.items() >= expected.items()
    assert len(config) <= 14


def test_it_reports_what_was_trained(tiny: TinyJob) -> None:
    session = RecordingSession()
    hopeless = {"instruction": "too long " * 99, "output": "never"}
    cut = {"instruction": "long", "output": "too long " * 99}
    rows = [*instruction_rows(10), cut, hopeless]
    outcome = tiny.finish(tiny.spec(rows, validation=HELD_OUT), session)
    report = outcome.report
    assert (report.rows, report.truncated_rows, report.dropped_rows, report.steps) == (11, 1, 1, 6)
    assert report.trainable_params == 2 * 2 * (8 * 32 + 8 * 32) - 2 * 8 * 16
    assert report.quantized_layers == 14
    assert report.eval_loss_before is not None
    assert report.eval_loss_after is not None
    assert report.eval_loss_after < report.eval_loss_before
    assert report.train_loss < report.eval_loss_before
    assert report.tokens_per_second > 0
    assert report.device == "cpu"
    assert report.peak_memory_mb > 50
    assert report.mfu is None
    base_event = next(data for _, message, data in session.events if "Linear8bitLt" in message)
    assert base_event["quantized_layers"] == 14
    assert base_event["base_loaded"] is True
    assert session.base_loaded is True


@pytest.mark.parametrize(("rate", "epochs", "few"), [(2e-4, 3, True), (8e-3, 3, False), (2e-4, 40, False)])
def test_steps_too_few_to_change_much_are_told(tiny: TinyJob, rate: float, epochs: int, few: bool) -> None:
    """The tutorial's three rows in steps of eight; more by the rate, or by the epochs."""
    session = RecordingSession()
    hyper = {"learning_rate": rate, "n_epochs": epochs, "batch_size": 8}
    tiny.finish(tiny.spec(instruction_rows(3), hyper=hyper), session)
    told = [message for _, message, _ in session.events if "changed little" in message]
    assert len(told) == few
    assert all(message.startswith("3 optimizer steps changed little") for message in told)


def test_the_series_has_a_point_every_metrics_steps_and_per_checkpoint(tiny: TinyJob) -> None:
    session = RecordingSession()
    spec = tiny.spec(instruction_rows(20), validation=HELD_OUT, hyper={"metrics_steps": 2, "n_epochs": 1})
    tiny.finish(spec, session)
    series = session.series()
    assert [point["step"] for point in series] == [2, 4, 5]
    assert [point["step"] for point in series if "valid_loss" in point] == [5]
    for point in series:
        assert point["grad_norm"] > 0
        assert point["tokens_per_second"] > 0
        assert point["total_steps"] == 5
    assert [point["learning_rate"] for point in series] == pytest.approx([8e-3, 4e-3, 2e-3])
    assert [p.step for p in session.steps] == [1, 2, 3, 4, 5]
    assert session.steps[-1].eta_seconds == 0
    assert session.phases[0] == Phase.PREPARING
    assert session.phases[-1] == Phase.SAVING


def test_a_checkpoint_per_epoch_and_every_checkpoint_steps_each_servable(tiny: TinyJob) -> None:
    session = RecordingSession()
    tiny.finish(tiny.spec(validation=HELD_OUT, hyper={"checkpoint_steps": 2}), session)
    assert [commit.step for commit in session.commits] == [2, 3, 4, 6]
    for commit in session.commits:
        manifest = tiny.store.verify(tiny.store.adapter(commit.adapter_id), "adapter")
        assert manifest.step == commit.step
        assert commit.metrics.keys() == {"train_loss", "valid_loss"}
    # Only the two newest can be resumed from.
    states = sorted(folder.name for folder in (tiny.store.checkpoints("ftjob-one") / "1").iterdir())
    assert states == ["step-00000004", "step-00000006"]
    assert all(
        {f.suffix for f in folder.iterdir()} == {".json", ".safetensors"}
        for folder in (tiny.store.checkpoints("ftjob-one") / "1").iterdir()
    )


def test_the_tutorials_three_rows_in_one_json_array_train(tiny: TinyJob) -> None:
    spec = tiny.spec()
    data = tiny.store.file(spec.training_file) / "data"
    data.write_text(json.dumps([*instruction_rows(2), {**instruction_rows(1)[0], "input": "It is 7."}], indent=2))
    spec = spec.model_copy(update={"training_sha256": sha256_of(data), "hyperparameters": Hyperparameters()})
    outcome = tiny.finish(spec)
    report = outcome.report
    assert (report.rows, report.dropped_rows, report.steps) == (3, 0, 3)
    tiny.store.verify(tiny.store.adapter(outcome.adapter_id), "adapter")


@pytest.mark.parametrize("precision", ["int8", "nf4", "bf16", "fp16", "fp32"])
def test_every_precision_trains_warm_as_cold_and_leaves_the_base_alone(tiny: TinyJob, precision: BasePrecision) -> None:
    spec = tiny.spec(base_precision=precision, validation=HELD_OUT)
    first = tiny.finish(spec)
    session = RecordingSession()
    # Another shape of job in between, on the same base.
    other = spec.model_copy(update={"lora": LoraSpec(r=2, target_modules=("up_proj",)), "seed": 1})
    tiny.finish(other, job="ftjob-other")
    second = tiny.finish(spec, session, job="ftjob-two", token=7)
    assert session.base_loaded is False
    cold = tiny.finish(spec, job="ftjob-three", bases=tiny.fresh_bases())
    assert weights_of(first) == weights_of(second) == weights_of(cold)
    assert first.report.eval_loss_after == second.report.eval_loss_after == cold.report.eval_loss_after
    assert first.report.eval_loss_before == second.report.eval_loss_before == cold.report.eval_loss_before
    base, seconds = tiny.bases.load(spec, torch.float32)
    assert seconds is None
    assert fingerprint(base.loaded.model) == base.fingerprint


def test_a_warm_bases_own_loss_is_computed_once_for_the_same_rows(
    tiny: TinyJob, monkeypatch: pytest.MonkeyPatch
) -> None:
    evaluations: list[str] = []

    def counted(model: Any, rows: Rows, *rest: Any) -> float:
        evaluations.append(rows.key)
        return evaluation_loss(model, rows, *rest)

    monkeypatch.setattr("services.trainer.recipe.finetune.evaluation_loss", counted)
    spec = tiny.spec(validation=HELD_OUT, hyper={"max_steps": 1})

    def before(spec: JobSpec, job: str, bases: WarmBases | None = None) -> tuple[float | None, int]:
        """The loss before training, and how many evaluations the whole job took."""
        evaluations.clear()
        return tiny.finish(spec, job=job, bases=bases).report.eval_loss_before, len(evaluations)

    loss, _ = before(spec, "ftjob-one")
    shape = spec.model_copy(update={"lora": LoraSpec(r=3, dropout=0, target_modules=("o_proj", "up_proj"))})
    assert before(shape, "ftjob-two") == (loss, 1)
    # Computed again, with that shape attached, it is the same to the last bit.
    assert before(shape, "ftjob-three", tiny.fresh_bases()) == (loss, 2)
    shorter = spec.model_copy(update={"hyperparameters": Hyperparameters(max_length=40, max_steps=1)})
    other, taken = before(shorter, "ftjob-four")
    assert (other != loss, taken) == (True, 2)
    fp32 = spec.model_copy(update={"base_precision": "fp32"})
    assert before(fp32, "ftjob-five")[1] == 2


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("precision", ["int8", "nf4", "bf16"])
def test_bf16_products_train_too(tiny: TinyJob, precision: BasePrecision, fused: bool) -> None:
    spec = tiny.spec(base_precision=precision, compute_dtype="bf16", validation=HELD_OUT)
    if not fused:
        base, _ = tiny.bases.load(spec, torch.bfloat16)
        base.loaded.model.fused = None
    outcome = tiny.finish(spec)
    report = outcome.report
    assert report.eval_loss_before is not None
    assert report.eval_loss_after is not None
    assert report.eval_loss_after < report.eval_loss_before


def test_evaluation_equals_the_loss_of_each_row_alone(tiny: TinyJob) -> None:
    session = RecordingSession()
    tiny.finish(tiny.spec(validation=HELD_OUT, hyper={"max_steps": 1}), session)
    (before,) = [data["valid_loss"] for _, message, data in session.events if "before training" in message]
    spec = tiny.spec(HELD_OUT)
    base, _ = tiny.bases.load(spec, torch.float32)
    rows = prepare_data(spec, tiny.store, base.loaded.tokenizer, ignore).training
    total = 0.0
    with torch.no_grad(), training_forward(base.loaded.model, dropout=False):
        for row in range(len(rows)):
            packed = pack([rows[row]], CPU)
            logits = supervised_logits(base.loaded.model, packed)
            total += float(torch.nn.functional.cross_entropy(logits, packed.labels, reduction="sum"))
    bound = rounding(torch.float32, llama_sums(base.loaded.model.config, int(rows.lengths.max())))
    assert before == pytest.approx(total / rows.supervised.sum(), rel=bound)


def test_a_lost_lease_ends_the_run_at_once_and_leaves_the_base_clean(tiny: TinyJob) -> None:
    session = RecordingSession()

    def lose(step: int) -> None:
        session.lost = True
        session.should_stop()

    session.on_commit = lose
    spec = tiny.spec()
    with pytest.raises(LeaseLost):
        tiny.run(spec, session)
    assert session.commits == []
    assert len(session.steps) == 3
    outcome = tiny.finish(spec, RecordingSession(), token=2)
    assert weights_of(outcome) == weights_of(tiny.finish(spec, job="ftjob-two", bases=tiny.fresh_bases()))
    assert not list((tiny.store.root / "staging").iterdir())


def test_a_base_that_changed_is_thrown_away_and_the_job_fails(tiny: TinyJob) -> None:
    spec = tiny.spec()
    session = RecordingSession()

    def corrupt(step: int) -> None:
        base, _ = tiny.bases.load(spec, torch.float32)
        base.loaded.model.model.norm.weight.data[0] += 1e-3

    session.on_commit = corrupt
    with pytest.raises(JobFailed, match="weights changed") as failure:
        tiny.run(spec, session)
    assert failure.value.code == "base_changed"
    again = RecordingSession()
    tiny.finish(spec, again, token=2)
    assert again.base_loaded is True


def test_a_catalogue_that_changed_is_noticed(tiny: TinyJob) -> None:
    with pytest.raises(Unavailable, match="create a new job") as failure:
        tiny.run(tiny.spec().model_copy(update={"base_revision": "0" * 40}))
    assert failure.value.code == "base_unavailable"


def test_an_adapter_that_loses_something_on_its_way_to_disk_is_not_published(
    tiny: TinyJob, monkeypatch: pytest.MonkeyPatch
) -> None:
    def lossy(*args: Any, **kwargs: Any) -> dict[str, torch.Tensor]:
        tensors = dict(get_peft_model_state_dict(*args, **kwargs))
        tensors.pop(sorted(tensors)[-1])
        return tensors

    monkeypatch.setattr("services.trainer.recipe.adapter.get_peft_model_state_dict", lossy)
    monkeypatch.setattr("services.trainer.recipe.context.RunContext.checkpoint_due", lambda _self, _steps: False)
    session = RecordingSession()
    with pytest.raises(JobFailed, match="does not compute"), pytest.warns(UserWarning, match="missing adapter keys"):
        tiny.run(tiny.spec(), session)
    assert not (tiny.store.root / "adapters").exists()


def test_divergence_fails_with_a_sentence_and_the_next_job_works(
    tiny: TinyJob, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "services.trainer.recipe.step.loss_sum", lambda *_: torch.tensor(float("nan"), requires_grad=True)
    )
    with pytest.raises(JobFailed, match="lower the learning rate"):
        tiny.run(tiny.spec())
    monkeypatch.undo()
    assert isinstance(tiny.run(tiny.spec(), token=2), Finished)


def test_out_of_memory_fails_with_advice_and_the_next_job_gets_a_fresh_base(
    tiny: TinyJob, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = weights_of(tiny.finish(tiny.spec(), job="ftjob-before"))
    monkeypatch.setattr("services.trainer.recipe.step.loss_sum", lambda *_: torch.empty(2**60))
    with pytest.raises(JobFailed, match="lower max_length") as failure:
        tiny.run(tiny.spec())
    assert failure.value.code == "out_of_memory"
    monkeypatch.undo()
    session = RecordingSession()
    assert weights_of(tiny.finish(tiny.spec(), session, token=2)) == expected
    assert session.base_loaded is True


def test_bases_keep_one_model_at_a_time(tiny: TinyJob) -> None:
    bases: WarmBases = tiny.bases
    int8, nf4 = tiny.spec(), tiny.spec(base_precision="nf4")
    assert bases.load(int8, torch.float32)[1] is not None
    assert bases.load(int8, torch.float32)[1] is None
    assert bases.load(nf4, torch.float32)[1] is not None
    assert bases.load(int8, torch.float32)[1] is not None
    bases.discard()
    assert bases.load(int8, torch.float32)[1] is not None


def test_a_run_stages_nothing_until_it_writes(tiny: TinyJob) -> None:
    """A training that takes hours holds no folder meanwhile that could be taken for abandoned."""
    staging = tiny.store.root / "staging"
    seen: list[int] = []

    class Watching(RecordingSession):
        def progress(self, progress: Progress) -> None:
            seen.append(len(list(staging.glob("*"))) if staging.is_dir() else 0)
            super().progress(progress)

    tiny.finish(tiny.spec(), Watching())
    assert len(seen) > 1
    assert set(seen) == {0}
