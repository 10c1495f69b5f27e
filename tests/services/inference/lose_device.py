"""`python -m tests.services.inference.lose_device FOLDER`: an engine on a GPU whose context breaks in mid-decode.

A process of its own: nothing on the device works in it afterwards. Exit status 0 if all went as it should.
"""

import os
import sys
import threading
from pathlib import Path

import torch

from services.inference.engine.admission import Admission
from services.inference.engine.batch_engine import BatchEngine
from services.inference.engine.interface import Failed, GenerationRequest
from services.inference.engine.llama import LlamaRunner
from shared.bases.base_model import device_answers, load_base
from shared.logs import configure_logging
from tests.services.inference.harness import Heard
from tests.tiny import prepared_tiny

CUDA = torch.device("cuda")


def main() -> None:
    configure_logging("inference")
    store, base, _ = prepared_tiny(Path(sys.argv[1]))
    loaded = load_base(base, store, "bf16", CUDA)
    runner = LlamaRunner(loaded.model, precision="plain", rows=1, context=256, adapter_slots=1)
    told = threading.Event()
    engine = BatchEngine(
        runner,
        loaded.tokenizer,
        Admission(requests=10, tokens=10_000),
        prefill_chunk=64,
        on_device_lost=told.set,
    )
    running, waiting = Heard(), Heard()
    engine.submit(GenerationRequest([3, 4, 5], max_new_tokens=200, ignore_eos=True), running)
    engine.submit(GenerationRequest([3, 4, 5], max_new_tokens=3), waiting)
    assert running.begun.wait(60)

    def beyond_the_table(*_: object) -> torch.Tensor:
        return torch.nn.functional.embedding(torch.tensor([1 << 20], device=CUDA), torch.zeros(4, 4, device=CUDA))

    assert device_answers(CUDA)
    setattr(runner, "decode", beyond_the_table)  # noqa: B010 -- mypy minds the plain way
    for heard in (running, waiting):
        assert isinstance(heard.last, Failed), heard.last
    assert told.wait(60)
    assert not device_answers(CUDA)


if __name__ == "__main__":
    main()
    # Destructors would ask the device.
    os._exit(0)
