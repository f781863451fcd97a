"""A plugin of pytest that ends a test which hangs: one that makes no progress, however long a good
one may take.

No progress: neither the test's process nor any that it has started has computed anything for
`hang_seconds`.
"""

from __future__ import annotations

import contextlib
import faulthandler
import os
import signal
import sys
import threading
from collections.abc import Generator
from types import FrameType

import psutil
import pytest

from common.runtime.patience import Patience


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addini(
        "hang_seconds", "a test is ended when nothing was computed for so long", default="300"
    )


def pytest_configure(config: pytest.Config) -> None:
    def fail(number: int, frame: FrameType | None) -> None:  # in the main thread, where the test is
        _say_where()
        pytest.fail(f"the test hangs: nothing was computed for {config.getini('hang_seconds')} s")

    signal.signal(signal.SIGUSR1, fail)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Generator[None, object, object]:
    over, seconds = threading.Event(), float(item.config.getini("hang_seconds"))
    watch = threading.Thread(target=_watch, args=(over, seconds), name="watchdog", daemon=True)
    watch.start()
    try:
        return (yield)
    finally:
        over.set()
        watch.join()


def _watch(over: threading.Event, seconds: float) -> None:
    patience, strikes = Patience(os.getpid(), seconds), 0
    while not over.wait(min(5.0, seconds / 8)):
        if not patience.is_over():
            continue
        if strikes:  # the main thread is where no signal reaches it
            _say_where()
            os._exit(1)
        strikes += 1
        signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGUSR1)


def _say_where() -> None:
    """Where every thread is; and where those of the children are that know `faulthandler`, as they
    end.
    """
    faulthandler.dump_traceback(sys.__stderr__)
    children = psutil.Process().children(recursive=True)
    for child in children:
        with contextlib.suppress(psutil.Error):
            child.send_signal(signal.SIGABRT)
    psutil.wait_procs(children, timeout=5)
