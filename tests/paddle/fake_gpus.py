"""Fake GPUs under Paddle: the plugin of tests/campaigns/fake_gpu/fake_paddle.cc, and what plugins
lack.
"""

from __future__ import annotations

import ctypes
import subprocess
from importlib.util import find_spec
from pathlib import Path
from typing import Any

SOURCE = Path(__file__).parents[1] / "campaigns" / "fake_gpu" / "fake_paddle.cc"
LIBRARY = "libfake_paddle.so"


def build(folder: Path) -> Path:
    """Compile the plugin against the headers of the installed wheel; returns its folder."""
    paddle = find_spec("paddle")
    assert paddle is not None and paddle.origin is not None
    include = Path(paddle.origin).with_name("include")
    flags = ["-shared", "-fPIC", "-O1", "-std=c++17", "-Wall", "-isystem", str(include)]
    subprocess.run(["g++", *flags, SOURCE, "-o", folder / LIBRARY, "-lpthread"], check=True)
    return folder


def environment(plugin: Path, gpus: int = 8, late_us: int = 0) -> dict[str, str]:
    """What a process needs that is to find so many fake GPUs, each at most `late_us` late."""
    return {
        "CUSTOM_DEVICE_ROOT": str(plugin),
        "FAKE_GPUS": str(gpus),
        "FAKE_LATE_US": str(late_us),
        "FLAGS_use_stride_kernel": "0",  # a CPU kernel makes no view of a device's memory
        "GLOG_minloglevel": "3",
        "TMPDIR": str(plugin),
    }


def complete(plugin: Path) -> None:
    """Give this process what only Paddle on CUDA has: events that tell the time, and an embedding
    whose gradient is on the device. A communicator that is made in the middle of a pass is an
    error from now on.
    """
    import paddle
    from paddle import nn
    from paddle.base import core

    import paddle_impl  # noqa: F401  before Paddle
    from paddle_impl.fleet import NativePipeline

    library = ctypes.CDLL(str(plugin / LIBRARY))
    library.fake_event_seconds.restype = ctypes.c_double

    def seconds(event: Any) -> float:
        return float(library.fake_event_seconds(ctypes.c_void_p(event.raw_event)))

    core.CustomDeviceEvent.elapsed_time = lambda a, b: 1e3 * (seconds(b) - seconds(a))
    walk = NativePipeline.walk

    def watched(*arguments: Any) -> Any:
        made = library.fake_communicators()
        result = walk(*arguments)
        assert library.fake_communicators() == made, "a communicator was made in a pass"
        return result

    NativePipeline.walk = watched

    def rows(self: Any, places: Any) -> Any:
        # Paddle leaves the gradient of its own kernel on the CPU, where it was computed.
        return paddle.gather(self.weight, places.flatten()).reshape([*places.shape, -1])

    nn.Embedding.forward = rows
