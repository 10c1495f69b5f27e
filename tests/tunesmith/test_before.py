"""What `preview` and `estimate` print, against a fake gateway."""

import json
from typing import Any

from tests.tunesmith.fake_gateway import FakeGateway
from tests.tunesmith.test_cli import run

PREVIEW = {
    "object": "list",
    "model": "tiny",
    "data": [
        {
            "row": 1,
            "template": "instruction-v1",
            "tokens": 9,
            "supervised_tokens": 3,
            "dropped": False,
            "pieces": [
                {"text": "### Instruction:\nHi\x1b[31m\n", "supervised": False},
                {"text": "Hello<eos>", "supervised": True},
            ],
        },
        {"row": 2, "template": "instruction-v1", "tokens": 0, "supervised_tokens": 0, "dropped": True, "pieces": []},
    ],
    "lengths": {"rows": 60, "longest": 900, "cut": 7, "dropped": 1, "histogram": [{"up_to": 1024, "rows": 60}]},
}


def test_preview_marks_supervised_text_and_prints_no_foreign_escape() -> None:
    with FakeGateway({"GET /v1/files/file-1/preview": (200, PREVIEW)}) as gateway:
        code, out, err = run(gateway, "preview", "file-1", "--model", "tiny")
        assert (code, out) == (0, "### Instruction:\nHi [31m\n»Hello<eos>«\n\n")
        assert err.splitlines() == [
            "row 1: 9 tokens, 3 supervised",
            "row 2: 0 tokens, dropped: no supervised token is left",
            "of 60 rows looked at, 7 would be cut and 1 dropped at max_length 512; the longest has 900 tokens",
        ]
        code, out, _ = run(gateway, "preview", "file-1", "--model", "tiny", "--json")
        assert (code, json.loads(out)) == (0, PREVIEW)


def test_estimate_says_what_is_known() -> None:
    known: dict[str, Any] = {"total_steps": 12, "tokens": 900, "supervised_tokens": 600}
    known |= {"minutes": 1.25, "peak_memory_mb": 1700.4, "warnings": []}
    unknown = {"peak_memory_mb": None, "warnings": ["nobody knows"]}
    answers = [known, known | unknown | {"minutes": None}, known | unknown]
    with FakeGateway({}) as gateway:
        gateway.answers["POST /v1/fine_tuning/estimates"] = lambda _body: (200, answers.pop(0))
        code, out, _ = run(gateway, "estimate", "file-1", "--epochs", "2", "--precision", "fp32")
        assert code == 0
        assert out == "12 steps, 900 tokens, 600 of them supervised\nabout 1.2 minutes, 1700 MB at the peak\n"
        assert gateway.bodies[-1][1]["hyperparameters"] == {"n_epochs": 2}
        assert gateway.bodies[-1][1]["base_precision"] == "fp32"
        _, out, err = run(gateway, "estimate", "file-1")
        assert "not calibrated" in out
        assert err == "warning: nobody knows\n"
        assert run(gateway, "estimate", "file-1")[1].endswith("about 1.2 minutes, memory not known\n")
