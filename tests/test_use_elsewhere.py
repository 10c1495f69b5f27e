"""The programs of docs/use-elsewhere.md, run as they stand there: the adapter says elsewhere what it says here."""

import json
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest

from tests.stack_processes import clean_environment
from tests.tiny import write_catalogue, write_tiny_model
from tunesmith.local_stack import stack
from tunesmith.wait import Exit

pytestmark = [pytest.mark.servers, pytest.mark.slow]
ROOT = Path(__file__).resolve().parents[1]
PAGE = (ROOT / "docs/use-elsewhere.md").read_text()
QUESTION = "Say 7 twice."


def program(heading: str) -> str:
    """The Python program below a heading of the page."""
    return re.split(r"^```python\n|^```$", PAGE.partition(f"## {heading}\n")[2], flags=re.M)[1]


@dataclass
class Trained:
    """An adapter's folder, that of its base, and what the stack answers."""

    adapter: Path
    base: Path
    said: str
    environ: dict[str, str]

    def run(self, folder: Path, heading: str, *arguments: str | Path) -> str:
        script = folder / "program.py"
        script.write_text(program(heading))
        argv = [sys.executable, "-W", "ignore", str(script), *map(str, arguments)]
        # Nothing here may be looked for on the hub.
        environ = self.environ | {"HF_HUB_OFFLINE": "1"}
        done = subprocess.run(argv, env=environ, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr[-3000:]
        return done.stdout


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Trained]:
    folder = tmp_path_factory.mktemp("elsewhere")
    catalogue = write_catalogue(folder / "catalogue.toml", write_tiny_model(folder / "model"))
    environ = clean_environment() | {"TUNESMITH_CATALOGUE": str(catalogue), "OMP_NUM_THREADS": "1"}
    home = folder / "home"
    connection = stack.up(
        home, port=0, base="tiny", environ=environ | {"TUNESMITH_INFERENCE_PRECISION": "fp32"}
    ).connection
    try:
        rows = folder / "rows.jsonl"
        texts = [{"instruction": f"Say {n} twice.", "output": f"{n} {n}"} for n in range(16)]
        rows.write_text("".join(json.dumps(row) + "\n" for row in texts))
        argv = [sys.executable, "-m", "tunesmith.cli", "train", str(rows), "--model", "tiny", "--precision", "fp32"]
        more = ["--epochs", "2", "--learning-rate", "0.02", "--wait", "--json"]
        own = environ | {"TUNESMITH_HOME": str(home)}
        done = subprocess.run(argv + more, env=own, capture_output=True, text=True, timeout=300)
        assert done.returncode == Exit.SUCCEEDED, done.stderr
        model = json.loads(done.stdout)["fine_tuned_model"]
        headers = {"authorization": f"Bearer {connection.api_key}"}
        with httpx.Client(base_url=connection.url, headers=headers, timeout=60, trust_env=False) as http:
            parameters = {"adapter_id": model, "max_new_tokens": 40, "stop": ["\n\n### Instruction:"]}
            answer = http.post("/generate", json={"instruction": QUESTION, "parameters": parameters})
            assert answer.status_code == 200, answer.text
            adapter = http.get(f"/v1/models/{model}").json()["adapter"]
        artifacts = home / "artifacts"
        said = answer.json()["generated_text"].partition("\n\n### Instruction:")[0]
        yield Trained(artifacts / "adapters" / adapter, artifacts / "bases" / "base-tiny", said, environ)
    finally:
        stack.down(home)


def test_peft_says_what_the_stack_says(trained: Trained, tmp_path: Path) -> None:
    assert trained.said.strip()
    assert trained.run(tmp_path, "peft", trained.adapter, trained.base, QUESTION) == trained.said + "\n"


def test_the_merged_model_says_it_without_peft(trained: Trained, tmp_path: Path) -> None:
    merged = tmp_path / "merged"
    trained.run(tmp_path, "Merged into the base", trained.adapter, trained.base, merged)
    assert not list(merged.glob("adapter*"))
    asked = """
import sys
from transformers import AutoModelForCausalLM, AutoTokenizer
tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype="float32")
inputs = tokenizer(f"### Instruction:\\n{sys.argv[2]}\\n\\n### Response:\\n", return_tensors="pt")
tokens = model.generate(**inputs, max_new_tokens=40, do_sample=False, pad_token_id=tokenizer.eos_token_id)
text = tokenizer.decode(tokens[0, inputs["input_ids"].shape[1]:], skip_special_tokens=True)
print(text.partition("\\n\\n### Instruction:")[0])
"""
    argv = [sys.executable, "-W", "ignore", "-c", asked, str(merged), QUESTION]
    done = subprocess.run(argv, env=trained.environ, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout == trained.said + "\n"


def test_what_is_not_run_says_so() -> None:
    for section in PAGE.split("\n## ")[1:]:
        heading = section.partition("\n")[0]
        if heading not in ("What there is", "peft", "Merged into the base"):
            assert "Not verified here" in section, heading
