import json
import os
import socket
import stat
from pathlib import Path

import pytest

from tunesmith.local_stack import plan as plans
from tunesmith.local_stack import stack
from tunesmith.local_stack.home import Home
from tunesmith.local_stack.plan import CannotPlan, Plan, environment, make_plan


@pytest.fixture
def home(tmp_path: Path) -> Home:
    home = Home(tmp_path / "with space")
    lock = home.acquire()
    assert lock is not None
    os.close(lock)
    return home


def planned(home: Home, **environ: str) -> Plan:
    return make_plan(home, 0, "tiny", environment(home, environ))


def test_stack_listens_on_loopback_only_with_passwords_nobody_else_can_read(home: Home) -> None:
    plan = planned(home)
    config = home.redis / "valkey.conf"
    assert stat.S_IMODE(config.stat().st_mode) == 0o600
    assert "bind 127.0.0.1" in config.read_text().splitlines()
    password = plan.connection["redis_url"].split(":")[2].split("@")[0]
    assert f"requirepass {password}" in config.read_text().splitlines()
    children = {child.name: child for child in plan.children}
    assert children["gateway"].env["TUNESMITH_HOST"] == "127.0.0.1"
    assert children["inference"].env["TUNESMITH_INFERENCE_HOST"] == "127.0.0.1"
    token = children["gateway"].env["TUNESMITH_INTERNAL_TOKEN"]
    assert token == children["inference"].env["TUNESMITH_INTERNAL_TOKEN"]
    # Command lines are readable by every user of the machine.
    commands = " ".join(part for child in plan.children for part in child.argv)
    assert password not in commands
    assert token not in commands


def test_secrets_and_ports_are_new_each_time_and_two_homes_share_nothing(home: Home, tmp_path: Path) -> None:
    first, second = planned(home), planned(home)
    assert first.connection["redis_url"].split("@")[0] != second.connection["redis_url"].split("@")[0]
    other = Home(tmp_path / "other")
    assert environment(home, {})["TUNESMITH_DATABASE_URL"] != environment(other, {})["TUNESMITH_DATABASE_URL"]


def test_what_the_caller_set_goes_through(home: Home, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    plan = planned(home, TUNESMITH_DATABASE_URL="postgresql://db/x", TUNESMITH_CATALOGUE="mine.toml", PYTHONPATH="/x")
    assert plan.connection["database_url"] == "postgresql://db/x"
    for child in plan.children[1:]:
        assert child.env["TUNESMITH_DATABASE_URL"] == "postgresql://db/x"
        assert child.env["TUNESMITH_CATALOGUE"] == str(tmp_path / "mine.toml")
        assert child.env["PYTHONPATH"] == f"{plans.CHECKOUT}{os.pathsep}/x"


def test_taken_port_is_said_clearly(home: Home) -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        with pytest.raises(CannotPlan, match=f"port {port} is taken by another program; this takes another") as refused:
            make_plan(home, port, "tiny", environment(home, {}))
        suggested = int(str(refused.value).partition("tunesmith up --port ")[2].split()[0])
        assert suggested != port
        assert plans.is_free(suggested)


def test_a_taken_port_is_found_before_anything_is_made(tmp_path: Path) -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        with pytest.raises(stack.StackError, match="is taken by another program"):
            stack.up(tmp_path / "home", port=other.getsockname()[1])
    assert not (tmp_path / "home").exists()


def test_a_home_remembers_its_port(tmp_path: Path) -> None:
    place = Home(tmp_path)
    assert stack.usual_port(place) == 8000
    place.remember_port(8123)
    assert stack.usual_port(Home(tmp_path)) == 8123
    for nonsense in ("", "x", "0", "70000", "-1"):
        (tmp_path / "port").write_text(nonsense)
        assert stack.usual_port(place) == 8000


def test_installed_package_says_that_it_is_the_client(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plans, "CHECKOUT", tmp_path)
    with pytest.raises(CannotPlan, match="from a checkout"):
        plans.check_checkout()


def test_plan_is_json(home: Home) -> None:
    from tunesmith.local_stack.supervisor import decode, encode

    plan = planned(home)
    assert decode(encode(plan)) == plan
    assert json.loads(encode(plan))["ready"].keys() == {"gateway", "inference"}


def test_a_vllm_server_is_one_more_process_that_knows_no_secret(home: Home, tmp_path: Path) -> None:
    python = tmp_path / "python"
    plan = make_plan(home, 0, "tiny", environment(home, {"TUNESMITH_DATABASE_URL": "postgresql://u:pw@db/x"}), python)
    children = {child.name: child for child in plan.children}
    vllm, inference = children["vllm"], children["inference"]
    assert vllm.argv == (str(python), str(plans.CHECKOUT / "services" / "inference" / "vllm_server.py"))
    assert vllm.env["TUNESMITH_DATABASE_URL"] == vllm.env["HF_TOKEN"] == vllm.env["PYTHONPATH"] == ""
    assert "TUNESMITH_INTERNAL_TOKEN" not in vllm.env
    assert inference.env["TUNESMITH_INFERENCE_ENGINE"] == "vllm"
    for name in ("TUNESMITH_HOME", "TUNESMITH_INFERENCE_BASE", "TUNESMITH_INFERENCE_VLLM_URL"):
        assert vllm.env[name] == inference.env[name]
    assert plan.ready["vllm"] == vllm.env["TUNESMITH_INFERENCE_VLLM_URL"] + "/health"
    assert list(children) == ["redis", "vllm", "inference", "trainer", "gateway"]


def test_without_vllms_python_it_says_where_it_looked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plans, "CHECKOUT", tmp_path)
    with pytest.raises(CannotPlan, match=r"no Python with vLLM at .*\.venv-vllm"):
        plans.checked_vllm_python(None)
    (tmp_path / "python").touch()
    assert plans.checked_vllm_python(tmp_path / "python") == tmp_path / "python"


def test_a_catalogue_in_the_stacks_folder_counts_unless_another_is_named(tmp_path: Path) -> None:
    home = Home(tmp_path / "home")
    assert "TUNESMITH_CATALOGUE" not in environment(home, {})
    home.root.mkdir()
    home.catalogue_file.write_text("")
    assert environment(home, {})["TUNESMITH_CATALOGUE"] == str(home.catalogue_file)
    assert environment(home, {"TUNESMITH_CATALOGUE": "/other.toml"})["TUNESMITH_CATALOGUE"] == "/other.toml"
