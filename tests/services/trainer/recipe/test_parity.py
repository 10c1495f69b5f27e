"""The same order of the same rows through transformers' own Trainer: what it learns is what ours learns."""

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import get_peft_model, get_peft_model_state_dict
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments, set_seed

from services.trainer.data.dataset import Rows, prepare_data
from services.trainer.data.layout import plan_layout
from services.trainer.model.lora import lora_config
from shared.jobs.spec import LoraSpec, Scheduler
from tests.rounding import llama_sums, rounding
from tests.services.trainer.harness import TinyJob, ignore, instruction_rows

pytestmark = pytest.mark.slow

ALL = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def padded(samples: list[dict[str, list[int]]]) -> dict[str, torch.Tensor]:
    """A batch as trainers make it: padded on the right, only the response labelled."""
    width = max(len(sample["input_ids"]) for sample in samples)
    fill = {"input_ids": 0, "attention_mask": 0, "labels": -100}
    return {
        key: torch.tensor([sample[key] + [pad] * (width - len(sample[key])) for sample in samples])
        for key, pad in fill.items()
    }


def as_sample(rows: Rows, row: int) -> dict[str, list[int]]:
    ids, supervised = rows[row]
    labels = [int(i) if s else -100 for i, s in zip(ids, supervised, strict=True)]
    return {"input_ids": ids.tolist(), "attention_mask": [1] * len(ids), "labels": labels}


@pytest.mark.parametrize(("targets", "scheduler"), [(("q_proj", "v_proj"), "linear"), (ALL, "cosine")])
def test_it_learns_what_transformers_trainer_learns(
    tiny: TinyJob, tmp_path: Path, targets: tuple[str, ...], scheduler: Scheduler
) -> None:
    """Six steps, the last of them partial; gradients are clipped, and the learning rate falls.

    Adam divides by the gradient's size plus epsilon. With an epsilon near the rounding error of a gradient, the update
    of a weight whose gradient is almost zero would be noise, so a larger one is taken.
    """
    lora = LoraSpec(dropout=0, target_modules=targets)
    hyper: dict[str, Any] = {"n_epochs": 1, "scheduler": scheduler, "max_grad_norm": 0.5, "weight_decay": 0.1}
    hyper["adam_epsilon"] = 1e-2
    spec = tiny.spec(instruction_rows(23), lora=lora, hyper=hyper, base_precision="fp32")
    outcome = tiny.finish(spec)
    ours = load_file(tiny.store.adapter(outcome.adapter_id) / "adapter_model.safetensors")

    rows = prepare_data(spec, tiny.store, tiny.bases.tokenizer(spec), ignore).training
    layout = plan_layout(rows.lengths, spec.hyperparameters, spec.seed, "cpu")
    order = [row for step in range(layout.total_steps) for row in layout.rows(step)]
    base = AutoModelForCausalLM.from_pretrained(tiny.store.base("tiny"), dtype=torch.float32)
    set_seed(spec.seed)
    model = get_peft_model(base, lora_config(lora))
    arguments = TrainingArguments(
        output_dir=str(tmp_path / "trainer"),
        per_device_train_batch_size=spec.hyperparameters.batch_size,
        num_train_epochs=1,
        learning_rate=spec.hyperparameters.learning_rate,
        lr_scheduler_type=scheduler,
        weight_decay=spec.hyperparameters.weight_decay,
        max_grad_norm=spec.hyperparameters.max_grad_norm,
        adam_epsilon=spec.hyperparameters.adam_epsilon,
        seed=spec.seed,
        train_sampling_strategy="sequential",
        use_cpu=True,
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
        dataloader_pin_memory=False,
        remove_unused_columns=False,
    )
    dataset: Any = [as_sample(rows, row) for row in order]
    result = Trainer(model=model, args=arguments, train_dataset=dataset, data_collator=padded).train()
    theirs = get_peft_model_state_dict(model)

    assert result.global_step == outcome.report.steps == 6
    longest, used = int(rows.lengths.max()), spec.hyperparameters
    forward, backward = (
        rounding(torch.float32, llama_sums(base.config, longest, backward=back)) for back in (False, True)
    )
    assert result.training_loss == pytest.approx(outcome.report.train_loss, rel=forward)
    assert ours.keys() == theirs.keys()
    # The first and the second moment carry the gradient's error, each step adds to it.
    bound = result.global_step * used.learning_rate * 2 * backward * used.max_grad_norm / used.adam_epsilon
    apart = torch.cat([(ours[name] - tensor).flatten() for name, tensor in theirs.items()])
    assert float(apart.norm()) <= bound
    moved = torch.cat([tensor.flatten() for name, tensor in theirs.items() if ".lora_B." in name])
    assert bound < 1e-2 * float(moved.norm())
