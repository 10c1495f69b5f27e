import os
import subprocess
import sys

from shared.openmp import WAITING, spin_briefly


def test_what_was_set_stays() -> None:
    environ = {"GOMP_SPINCOUNT": "7"}
    spin_briefly(environ)
    assert environ == {"GOMP_SPINCOUNT": "7", "OMP_WAIT_POLICY": WAITING["OMP_WAIT_POLICY"]}


def test_libgomp_hears_of_it_when_torch_is_imported_afterwards() -> None:
    code = "import os; from shared.openmp import spin_briefly; spin_briefly(os.environ); import torch"
    environ = {name: value for name, value in os.environ.items() if name not in WAITING}
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=environ | {"OMP_DISPLAY_ENV": "VERBOSE"},
        capture_output=True,
        text=True,
        check=True,
        timeout=120,
    )
    assert "OMP_WAIT_POLICY = 'PASSIVE'" in done.stderr
    assert f"GOMP_SPINCOUNT = '{WAITING['GOMP_SPINCOUNT']}'" in done.stderr
