"""A base that its operator adds by commands, whose turns end otherwise than its tokenizer says texts do."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from openai import OpenAI

from shared.storage.artifacts import LocalArtifactStore
from tests.tunesmith.local_stack.test_stack import Machine

pytestmark = pytest.mark.servers

TALK = ("What is {n}?", "It is {n}.", "And twice?", "Then {m}.")
END = "<|im_end|>"


@pytest.fixture(scope="module")
def added(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Machine]:
    """What many repositories are: the template writes its own end of a turn, and EOS is another token."""
    machine = Machine(tmp_path_factory.mktemp("machine"))
    ran(machine, "models", "prepare", "tiny")
    prepared = LocalArtifactStore(machine.folder / ".tunesmith" / "artifacts").base("tiny")
    copy = Path(shutil.copytree(prepared, machine.folder / "copy"))
    (copy / "manifest.json").unlink()
    config = json.loads((copy / "tokenizer_config.json").read_text())
    assert config["eos_token"] == END
    (copy / "tokenizer_config.json").write_text(json.dumps(config | {"eos_token": "<|endoftext|>"}))
    ran(machine, "models", "add", "eot", "--source", "folder:copy")
    ran(machine, "models", "prepare", "eot")
    ran(machine, "up", "--port", "0", "--base", "eot")
    try:
        yield machine
    finally:
        ran(machine, "down")


def ran(machine: Machine, *arguments: str) -> str:
    done = machine.run(*arguments)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_both_replies_and_their_ends_are_learnt_and_asked(added: Machine) -> None:
    def row(n: int) -> dict[str, Any]:
        said = [text.format(n=n, m=2 * n) for text in TALK]
        roles = ("user", "assistant", "user", "assistant")
        return {"messages": [{"role": role, "content": text} for role, text in zip(roles, said, strict=True)]}

    data = added.folder / "talks.jsonl"
    data.write_text("".join(json.dumps(row(n)) + "\n" for n in range(40)))
    file = ran(added, "upload", str(data)).strip()
    [shown, *_] = json.loads(ran(added, "preview", file, "--model", "eot", "--json"))["data"]
    learnt = "".join(part["text"] for part in shown["pieces"] if part["supervised"])
    assert learnt.replace("\n", "") == f"It is 0.{END}Then 0.{END}"

    started = ran(added, "train", file, "--model", "eot", "--epochs", "2", "--precision", "fp32", "--wait", "--json")
    model = json.loads(started)["fine_tuned_model"]
    chat = added.run("chat", "--adapter", model, "--max-new-tokens", "6", "--json", said="What is 7?\nAnd twice?\n")
    assert (chat.returncode, chat.stderr) == (0, "")
    assert [json.loads(line)["role"] for line in chat.stdout.splitlines()] == ["user", "assistant"] * 2

    connection = added.connection()
    with OpenAI(base_url=connection.openai_base_url, api_key=connection.api_key, max_retries=0) as client:
        for token, text in (("2", END), ("0", "<|endoftext|>")):
            # What it would write, were it sure of the end.
            answer = client.chat.completions.create(
                model=model, messages=[{"role": "user", "content": "What is 7?"}], logit_bias={token: 100}, max_tokens=6
            )
            assert (answer.choices[0].finish_reason, answer.choices[0].message.content) == ("stop", ""), text
