"""`tunesmith up` and `down` as commands, on a real stack with the tiny base."""

import json
import os
import signal
import stat
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
from openai import OpenAI

from tests.stack_processes import clean_environment
from tests.tiny import write_catalogue, write_tiny_model
from tunesmith import connection as connections
from tunesmith.connection import Connection

pytestmark = pytest.mark.servers


@dataclass
class Machine:
    """A folder to run commands in, with a catalogue of the tiny base."""

    folder: Path

    def __post_init__(self) -> None:
        model = write_tiny_model(self.folder / "model")
        catalogue = write_catalogue(self.folder / "catalogue.toml", model)
        self.environ = clean_environment() | {"TUNESMITH_CATALOGUE": str(catalogue), "OMP_NUM_THREADS": "1"}

    def run(self, *arguments: str, said: str = "", **environ: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "tunesmith.cli", *arguments],
            cwd=self.folder,
            env=self.environ | environ,
            input=said,
            capture_output=True,
            text=True,
            timeout=180,
        )

    def up(self, *arguments: str, **environ: str) -> subprocess.CompletedProcess[str]:
        return self.run("up", "--base", "tiny", *arguments, **environ)

    def trained(self, rows: list[dict[str, Any]], *options: str) -> str:
        """The model that one command makes of these rows."""
        data = self.folder / "rows.jsonl"
        data.write_text("".join(json.dumps(row) + "\n" for row in rows))
        done = self.run("train", str(data), "--epochs", "1", "--precision", "fp32", "--wait", "--json", *options)
        assert done.returncode == 0, done.stderr
        return str(json.loads(done.stdout)["fine_tuned_model"])

    def connection(self) -> Connection:
        return connections.read(self.folder / ".tunesmith" / "connection.json")


@pytest.fixture(scope="module")
def machine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Machine]:
    machine = Machine(tmp_path_factory.mktemp("machine"))
    done = machine.up("--port", "0")
    assert done.returncode == 0, done.stderr
    pids = machine.connection().pids
    try:
        yield machine
    finally:
        assert_nothing_is_left_after_down(machine, set(pids.values()))


def assert_nothing_is_left_after_down(machine: Machine, pids: set[int]) -> None:
    pids |= set(machine.connection().pids.values())
    pids |= {child.pid for pid in pids for child in children_of(pid)}
    done = machine.run("down")
    assert (done.returncode, done.stderr.splitlines()[-1]) == (0, "stopped")
    assert [pid for pid in pids if psutil.pid_exists(pid)] == []
    assert not (machine.folder / ".tunesmith" / "connection.json").exists()
    again = machine.run("down")
    assert (again.returncode, again.stderr) == (0, "nothing was running\n")
    assert machine.run("status").returncode == 1


def children_of(pid: int) -> list[psutil.Process]:
    try:
        return psutil.Process(pid).children(recursive=True)
    except psutil.NoSuchProcess:
        return []


def wait_for(condition: Callable[[], object], seconds: float = 120) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.1)


def test_up_describes_what_runs(machine: Machine) -> None:
    connection = machine.connection()
    path = machine.folder / ".tunesmith" / "connection.json"
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert set(connection.pids) == set(connections.PROCESSES)
    assert {name: psutil.pid_exists(pid) for name, pid in connection.pids.items()} == dict.fromkeys(
        connection.pids, True
    )
    with OpenAI(base_url=connection.openai_base_url, api_key=connection.api_key) as client:
        assert "tiny" in [model.id for model in client.models.list()]
    assert connection.url.endswith(":" + (path.parent / "port").read_text().strip())
    logs = {log.stem for log in (path.parent / "logs").iterdir()}
    assert logs == {"supervisor", "prepare", "migrate", *connections.PROCESSES}
    status = machine.run("status", "--json")
    assert (status.returncode, json.loads(status.stdout)["ready"]) == (0, True)


def test_nothing_listens_beyond_loopback(machine: Machine) -> None:
    for pid in machine.connection().pids.values():
        listening = [c for c in psutil.Process(pid).net_connections("inet") if c.status == psutil.CONN_LISTEN]
        assert {connection.laddr[0] for connection in listening} <= {"127.0.0.1"}


def test_the_command_line_talks_to_it_and_the_doctor_finds_nothing(machine: Machine) -> None:
    options = ("--max-new-tokens", "6")
    whole = machine.run("generate", "What?", *options)
    streamed = machine.run("generate", "What?", "--stream", *options)
    assert (streamed.returncode, streamed.stdout) == (0, whole.stdout)
    chat = machine.run("chat", "--json", *options, said="Hi\nAnd?\n")
    assert chat.returncode == 0, chat.stderr
    assert [json.loads(line)["role"] for line in chat.stdout.splitlines()] == ["user", "assistant"] * 2
    doctor = machine.run("doctor", "--json")
    levels = {finding["subject"]: finding["level"] for finding in json.loads(doctor.stdout)}
    assert doctor.returncode == 0
    assert levels["stack"] == levels["schema"] == levels["folder"] == "ok"


def test_keys_are_made_and_revoked_and_the_doctor_tries_them(machine: Machine) -> None:
    first = machine.connection().api_key
    made = machine.run("keys", "create", "laptop")
    assert (made.returncode, made.stdout.startswith("ts-")) == (0, True), made.stderr
    assert machine.run("models", "list", TUNESMITH_API_KEY=made.stdout.strip()).returncode == 0
    revoked = machine.run("keys", "revoke", "key-laptop")
    assert (revoked.returncode, revoked.stdout) == (0, "key-laptop is revoked\n"), revoked.stderr
    assert machine.run("models", "list", TUNESMITH_API_KEY=made.stdout.strip()).returncode == 4
    examined = machine.run("doctor", TUNESMITH_API_KEY=made.stdout.strip())
    assert examined.returncode == 1
    assert "fail  key: this API key is not valid" in examined.stdout
    # A new key for this machine, whatever became of the old one.
    assert machine.run("keys", "create", "here", "--here").returncode == 0
    assert machine.run("keys", "revoke", "key-first").returncode == 0
    assert machine.connection().api_key != first
    assert machine.run("models", "list").returncode == 0
    listed = machine.run("keys", "list").stdout.splitlines()
    assert sorted(line.split()[0] for line in listed[1:]) == ["key-first", "key-here", "key-laptop"]
    assert "'tunesmith down'" in machine.run("keys", "new-secret").stderr


def test_logs_and_the_front_page_are_for_people(machine: Machine) -> None:
    shown = machine.run("logs", "gateway", "-n", "5", "--all")
    assert shown.returncode == 0
    assert all("  gateway" in line or line.startswith("    ") for line in shown.stdout.splitlines())
    page = httpx.get(machine.connection().url, headers={"accept": "text/html"}, trust_env=False)
    assert "It serves <code>tiny</code>" in page.text


def test_a_model_is_trained_and_asked_by_commands_alone(machine: Machine) -> None:
    data = machine.folder / "twice.jsonl"
    rows = [{"instruction": f"Say {n} twice.", "output": f"{n} {n}"} for n in range(16)]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    base = next(model for model in listed(machine, "models") if model["id"] == "tiny")
    assert (base["state"], base["prepared"]) == ("served", True)
    table = [line.split() for line in machine.run("models", "list").stdout.splitlines()]
    assert ["tiny", "-", "served", "yes"] in table

    uploaded = machine.run("upload", str(data))
    assert uploaded.returncode == 0, uploaded.stderr
    assert "warning: " in uploaded.stderr
    file = uploaded.stdout.strip()
    started = machine.run("train", file, "--model", "tiny", "--epochs", "1", "--precision", "fp32", "--suffix", "cli")
    assert started.returncode == 0, started.stderr
    job = started.stdout.strip()
    waited = machine.run("jobs", "wait", job, "--json", "--timeout", "120")
    assert waited.returncode == 0, waited.stderr
    ended = json.loads(waited.stdout)
    assert (ended["id"], ended["status"], ended["training_file"]) == (job, "succeeded", file)
    assert waited.stderr.splitlines()[-1] == f"succeeded: {ended['fine_tuned_model']}"
    assert [one["id"] for one in listed(machine, "jobs")] == [job]
    assert json.loads(machine.run("jobs", "show", job, "--json").stdout) == ended
    assert listed(machine, "jobs", "events", job)[0]["message"] == f"Created fine-tuning job: {job}"
    assert machine.run("jobs", "watch", job).returncode == 0

    tuned = next(model for model in listed(machine, "models") if model["id"] == ended["fine_tuned_model"])
    assert (tuned["parent"], tuned["state"], tuned["job"]) == ("tiny", "published", job)
    said = machine.run("generate", "Say 7 twice.", "--adapter", tuned["id"], "--max-new-tokens", "4", "--json")
    assert json.loads(said.stdout)["generated_text"] is not None


@pytest.mark.parametrize(
    "row",
    [
        {"instruction": "Say {n} twice.", "output": "{n} {n}"},
        {"prompt": "{n}, twice:", "completion": " {n} {n}"},
    ],
    ids=["instruction", "completion"],
)
def test_a_conversation_goes_on(machine: Machine, row: dict[str, str]) -> None:
    """Formats that know no roles: every question is answered, and with all that was said before it."""
    rows = [{key: text.format(n=n) for key, text in row.items()} for n in range(8)]
    model = machine.trained(rows, "--model", "tiny")
    options = ("--adapter", model, "--max-new-tokens", "6")
    said = "Say 7 twice.\nSay 8 twice.\nAnd 9?\n"
    chat = machine.run("chat", *options, "--json", "--system", "Be brief.", said=f"{said}/reset\nAnd 9?\n")
    assert (chat.returncode, chat.stderr) == (0, "the conversation begins anew\n")
    lines = [json.loads(line) for line in chat.stdout.splitlines()]
    assert [line["role"] for line in lines] == ["user", "assistant"] * 4
    printed = machine.run("chat", *options, "--system", "Be brief.", said=said)
    assert printed.stdout == "".join(line["content"] + "\n" for line in lines[1:6:2])

    connection = machine.connection()
    with OpenAI(base_url=connection.openai_base_url, api_key=connection.api_key, max_retries=0) as client:
        tokens = []
        for asked, answer in ((lines[:5], lines[5]), (lines[6:7], lines[7])):
            whole = client.chat.completions.create(
                model=model,
                messages=[{"role": "system", "content": "Be brief."}, *asked],
                max_tokens=6,
                temperature=0,
            )
            assert whole.choices[0].message.content == answer["content"]
            assert whole.usage is not None
            tokens.append(whole.usage.prompt_tokens)
    assert tokens[0] > 2 * tokens[1]


def listed(machine: Machine, noun: str, verb: str = "list", *arguments: str) -> list[dict[str, Any]]:
    """What a listing command prints as JSON."""
    done = machine.run(noun, verb, *arguments, "--json")
    assert done.returncode == 0, done.stderr
    found: list[dict[str, Any]] = json.loads(done.stdout)
    return found


def test_second_up_says_that_it_runs_and_changes_nothing(machine: Machine) -> None:
    before = machine.connection()
    done = machine.up("--port", "0")
    assert (done.returncode, done.stderr) == (0, "the stack is running already\n")
    assert before.url in done.stdout
    assert machine.connection() == before


def test_port_of_another_stack_is_said_to_be_taken(machine: Machine) -> None:
    port = machine.connection().url.rpartition(":")[2]
    done = machine.up("--home", "second", "--port", port)
    assert done.returncode == 1
    assert f"error: port {port} is taken by another program" in done.stderr
    assert machine.run("down", "--home", "second").stderr == "nothing was running\n"


def test_unknown_base_is_refused_with_the_list(machine: Machine) -> None:
    done = machine.run("up", "--home", "third", "--port", "0", "--base", "gpt-9")
    assert done.returncode == 1
    assert "no base model 'gpt-9' in the catalogue; there are: tiny" in done.stderr


def test_failed_start_shows_the_log_and_leaves_nothing(machine: Machine) -> None:
    done = machine.up("--home", "fourth", "--port", "0", TUNESMITH_INFERENCE_PRECISION="fp64")
    assert done.returncode == 1
    assert "error: the stack did not start: inference ended with status" in done.stderr
    assert "last lines of" in done.stderr
    assert "PRECISION" in done.stderr
    assert machine.run("down", "--home", "fourth").stderr == "nothing was running\n"


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_interrupted_start_leaves_nothing(machine: Machine, signum: signal.Signals) -> None:
    command = [sys.executable, "-m", "tunesmith.cli", "up", "--home", "fifth", "--port", "0", "--base", "tiny"]
    with subprocess.Popen(command, cwd=machine.folder, env=machine.environ, stderr=subprocess.PIPE, text=True) as up:
        assert up.stderr is not None
        for line in up.stderr:
            if line.startswith("starting"):
                up.send_signal(signum)
        assert line == "error: interrupted; nothing is left running\n"
    assert up.returncode == 130
    assert machine.run("down", "--home", "fifth").stderr == "nothing was running\n"
    home = str(machine.folder / "fifth")
    assert [process.pid for process in psutil.process_iter() if home in environment_of(process)] == []


def environment_of(process: psutil.Process) -> list[str]:
    try:
        return list(process.environ().values())
    except (psutil.NoSuchProcess, psutil.AccessDenied, psutil.ZombieProcess):
        return []


@pytest.mark.parametrize("name", ["gateway", "inference", "redis"])
def test_killed_process_is_replaced_and_all_is_well_again(machine: Machine, name: str) -> None:
    before = machine.connection()
    os.kill(before.pids[name], signal.SIGKILL)
    wait_for(lambda: machine.connection().pids[name] != before.pids[name])
    headers = {"authorization": f"Bearer {before.api_key}"}

    def works() -> bool:
        try:
            body = {"inputs": "What", "parameters": {"max_new_tokens": 1}}
            return httpx.post(before.url + "/generate", json=body, headers=headers, timeout=30).status_code == 200
        except httpx.HTTPError:
            return False

    wait_for(works)
    after = machine.connection()
    assert (after.url, after.api_key) == (before.url, before.api_key)
    assert {other for other in after.pids if after.pids[other] != before.pids[other]} == {name}
