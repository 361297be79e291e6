"""A signal is raised or noticed once; a later one kills."""

import signal
import subprocess
import sys

import pytest

from sail_align.extract.system.signals import StoppedError, noticing, stopping_on


def test_a_noticed_signal_is_left_to_the_caller_and_what_was_there_comes_back():
    before = signal.getsignal(signal.SIGTERM)
    with noticing(signal.SIGTERM, signal.SIGINT) as stopped:
        assert stopped() is None
        signal.raise_signal(signal.SIGTERM)
        signal.raise_signal(signal.SIGINT)  # within a second: the same wish
        assert (stopped().code, stopped().name) == (143, "SIGTERM")
    assert signal.getsignal(signal.SIGTERM) == before


def test_a_signal_that_is_not_waited_for_is_raised():
    with pytest.raises(StoppedError) as stopped, stopping_on(signal.SIGINT):
        signal.raise_signal(signal.SIGINT)
    assert (stopped.value.code, stopped.value.name) == (130, "Ctrl-C")


@pytest.mark.parametrize("waits", ["noticing", "stopping_on"])
def test_a_second_signal_later_kills(waits):
    program = (
        "import signal, contextlib; from sail_align.extract import stop; stop.HURRY_SECONDS = -1\n"
        f"with stop.{waits}(signal.SIGINT):\n"
        "    with contextlib.suppress(stop.StoppedError): signal.raise_signal(signal.SIGINT)\n"
        "    signal.raise_signal(signal.SIGINT)\n"
    )
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == -signal.SIGINT
