"""Which errors are the machine's, and how long a worker then takes no job."""

import errno

import pytest
from safetensors import SafetensorError
from sqlalchemy.exc import OperationalError

from services.trainer.worker.out_of_service import (
    BlockedBases,
    FaultCount,
    is_machine_fault,
    pause_seconds,
)
from shared.errors import JobFailed, TunesmithError, Unavailable


def caused(error: Exception, cause: Exception) -> Exception:
    error.__cause__ = cause
    return error


AWAY = OperationalError("UPDATE", None, Exception("server closed the connection unexpectedly"))


@pytest.mark.parametrize(
    ("error", "machine"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), True),
        (OSError(errno.ESTALE, "Stale file handle"), True),
        (caused(RuntimeError("write failed"), OSError(errno.EIO, "Input/output error")), True),
        (SafetensorError("I/O error: No space left on device (os error 28)"), True),
        (SafetensorError("header too large"), False),
        (Unavailable("the hub"), True),
        (TunesmithError("the disk is full", code="storage_full"), True),
        (AWAY, True),
        (JobFailed("no memory", code="out_of_memory"), False),
        (MemoryError(), False),
        (OSError(errno.ENOMEM, "Cannot allocate memory"), False),
        (OSError("does not appear to have a file named config.json"), False),
        (RuntimeError("CUDA error: invalid argument"), False),
    ],
)
def test_which_errors_are_the_machines(error: Exception, machine: bool) -> None:
    assert is_machine_fault(error) is machine


def test_pauses_double_to_five_minutes() -> None:
    assert [pause_seconds(faults, 10) for faults in range(1, 8)] == [10, 20, 40, 80, 160, 300, 300]
    assert pause_seconds(255, 10) == 300


def test_a_replacement_goes_on_counting() -> None:
    shared = bytearray(1)
    first = FaultCount(shared)
    assert [first.add(), first.add()] == [1, 2]
    assert FaultCount(shared).add() == 3
    first.clear()
    assert FaultCount(shared).add() == 1
    assert [first.add() for _ in range(300)][-1] == 255


def test_a_base_is_passed_over_for_longer_each_time_until_it_could_be_had() -> None:
    now = 0.0
    blocked = BlockedBases(10, lambda: now)
    assert blocked.block("big") == 10
    assert blocked.block("big") == 20
    assert blocked.names() == ["big"]
    now = 21.0
    assert blocked.names() == []
    assert blocked.block("big") == 40
    blocked.clear("big")
    assert blocked.names() == []
    assert blocked.block("big") == 10
