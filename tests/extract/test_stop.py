"""A signal is raised or deferred once; a later one kills."""

import signal
import subprocess
import sys

import pytest

from sail_align.extract.system.signals import StoppedError, defer_signals, report_stop


def test_defer_signals_returns_the_first_signal_and_restores_the_handlers():
    before = signal.getsignal(signal.SIGTERM)
    with defer_signals() as stopped:
        assert stopped() is None
        signal.raise_signal(signal.SIGTERM)
        signal.raise_signal(signal.SIGINT)  # within a second: ignored
        assert (stopped().code, stopped().name) == (143, "SIGTERM")
    assert signal.getsignal(signal.SIGTERM) == before


def test_report_stop_raises_stopped_error():
    with pytest.raises(StoppedError) as stopped, report_stop(signals=[signal.SIGINT]):
        signal.raise_signal(signal.SIGINT)
    assert (stopped.value.code, stopped.value.name) == (130, "Ctrl-C")


@pytest.mark.parametrize("context", ["defer_signals", "report_stop"])
def test_a_later_second_signal_kills(context):
    program = (
        "import signal, contextlib; from sail_align.extract.system import signals; signals.HURRY_SECONDS = -1\n"
        f"with signals.{context}():\n"
        "    with contextlib.suppress(signals.StoppedError): signal.raise_signal(signal.SIGINT)\n"
        "    signal.raise_signal(signal.SIGINT)\n"
    )
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == -signal.SIGINT


def test_a_signal_during_a_finaliser_is_raised_after_it():
    """Python prints and ignores what a finaliser raises: the signal is delivered again."""
    program = (
        "import signal, time; from sail_align.extract.system import signals\n"
        "def rows():\n"
        "    try: yield\n"
        "    finally: signal.raise_signal(signal.SIGTERM); time.sleep(0.1)\n"
        "with signals.report_stop():\n"
        "    begun = rows(); next(begun); del begun; time.sleep(60)\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=50, check=False)
    assert (done.returncode, done.stderr) == (143, "")
