"""Signals: the first asks, another one ends, and the handlers found are put back."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading

import pytest

from glmctl.run.signals import SAME_REQUEST, StopFlag


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_the_first_signal_sets_the_exit_code(number: signal.Signals, code: int) -> None:
    before = signal.getsignal(number)
    with StopFlag() as stop:
        assert stop.raised is None
        os.kill(os.getpid(), number)
        assert stop.raised == code
    assert signal.getsignal(number) is before


def test_the_second_signal_ends_the_process_at_once() -> None:
    program = (
        "import os, signal\n"
        "from glmctl.run.signals import StopFlag\n"
        "with StopFlag():\n"
        "    os.kill(os.getpid(), signal.SIGTERM)\n"
        "    os.kill(os.getpid(), signal.SIGINT)\n"
        "    print('still here')\n"
    )
    done = subprocess.run([sys.executable, "-P", "-c", program], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (130, "")


@pytest.mark.parametrize(("later", "code"), [(0.9 * SAME_REQUEST, 0), (1.1 * SAME_REQUEST, 143)])
def test_the_same_signal_at_once_is_not_a_second_request(later: float, code: int) -> None:
    """As from GNU timeout, which signals its child and then the group; later it is impatience."""
    program = (
        "import os, signal\n"
        "from glmctl.run.signals import StopFlag\n"
        "now = [10.0]\n"
        "with StopFlag(lambda: now[0]) as stop:\n"
        "    os.kill(os.getpid(), signal.SIGTERM)\n"
        f"    now[0] += {later}\n"
        "    os.kill(os.getpid(), signal.SIGTERM)\n"
        "    print(stop.raised)\n"
    )
    done = subprocess.run([sys.executable, "-P", "-c", program], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (code, "" if code else "143\n"), done.stderr


def test_other_threads_may_use_it_without_handlers() -> None:
    seen: list[int | None] = []

    def work() -> None:
        with StopFlag() as stop:
            seen.append(stop.raised)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [None]
