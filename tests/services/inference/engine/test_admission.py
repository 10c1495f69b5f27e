"""The queue's bound counts what prompts really have."""

import pytest

from services.inference.engine.admission import Admission
from shared.errors import Overloaded


def test_a_permit_counts_its_real_length_once_known() -> None:
    admission = Admission(requests=10, tokens=100)
    first, second = admission.acquire(10), admission.acquire(20)
    first.resize(60)
    assert (admission.requests, admission.tokens) == (2, 80)
    with pytest.raises(Overloaded):
        second.resize(50)
    assert (admission.requests, admission.tokens) == (2, 80)
    second.resize(5)
    assert admission.tokens == 65
    first.release()
    first.release()
    first.resize(1000)
    assert (admission.requests, admission.tokens) == (1, 5)
    # Alone in the queue, any prompt fits.
    second.resize(500)
    second.release()
    assert (admission.requests, admission.tokens) == (0, 0)
