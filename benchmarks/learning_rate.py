"""held-out loss after one epoch by learning rate, which is how the `recommended` preset's was chosen

`python -m benchmarks.learning_rate` trains the preset's shape on the standard library's docstrings once for each rate,
everything else equal, and writes `benchmarks/results/learning_rate.json`.
"""

import argparse
import json
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from benchmarks.train import docstrings
from benchmarks.train_peers import CPU, SilentSession
from services.trainer.contract import Finished, JobRun
from services.trainer.model.bases import WarmBases
from services.trainer.recipe.finetune import finetune
from shared.bases.base_model import library_versions, prepare_base, quiet_libraries
from shared.bases.catalogue import Catalogue, load_catalogue
from shared.jobs.spec import PRESETS, JobSpec
from shared.logs import configure_logging
from shared.storage.artifacts import LocalArtifactStore, new_id

RESULT = Path(__file__).parent / "results" / "learning_rate.json"
RATES = (1e-4, 2e-4, 4e-4, 8e-4, 1.6e-3)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rates", nargs="*", type=float, default=list(RATES))
    parser.add_argument("--preset", default="recommended", choices=PRESETS)
    parser.add_argument("--precision", default="int8")
    arguments = parser.parse_args()
    quiet_libraries()
    configure_logging("bench", "WARNING")
    known: dict[str, Any] = json.loads(RESULT.read_text()) if RESULT.is_file() else {}
    with TemporaryDirectory(prefix="bench-rate-") as folder:
        found = losses_by_rate(Path(folder), arguments.preset, arguments.precision, arguments.rates)
    losses = known.get("held_out_loss", {}) | found.pop("held_out_loss")
    known |= found | {
        "held_out_loss": dict(sorted(losses.items(), key=lambda found: float(found[0].split(", ")[-1]))),
        "versions": library_versions(),
    }
    RESULT.parent.mkdir(exist_ok=True)
    RESULT.write_text(json.dumps(known, indent=2) + "\n")
    print(json.dumps(known["held_out_loss"], indent=2))


def losses_by_rate(root: Path, preset: str, precision: str, rates: list[float]) -> dict[str, Any]:
    """Held-out loss before and after one epoch, by preset, precision and rate."""
    store, base = LocalArtifactStore(root / "artifacts"), load_catalogue().get("smollm2-135m-instruct")
    prepare_base(base, store)
    files = docstrings(store)
    bases, chosen = WarmBases(Catalogue((base,)), store, CPU), PRESETS[preset]
    losses: dict[str, float] = {}
    before = None
    for rate in rates:
        hyper = chosen.hyperparameters.model_copy(update={"n_epochs": 1, "learning_rate": rate})
        spec = JobSpec(
            base=base.id,
            base_revision=base.revision,
            hyperparameters=hyper,
            lora=chosen.lora,
            preset=preset,
            base_precision=precision,
            **files,
        )
        outcome = finetune(JobRun(new_id("ftjob"), 1, spec), bases, store, SilentSession())
        assert isinstance(outcome, Finished)
        before, after = outcome.report.eval_loss_before, outcome.report.eval_loss_after
        assert after is not None
        losses[f"{preset}, {precision}, {rate:.1e}"] = round(after, 4)
        print(f"{preset}, {precision}, {rate:.1e}: {before:.4f} -> {after:.4f}", flush=True)
    return {"rows": 300, "held_out": 40, "held_out_loss_before": before, "held_out_loss": losses}


if __name__ == "__main__":
    main()
