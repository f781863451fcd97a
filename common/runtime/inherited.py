"""What a run inherits from its shell: what would change numbers is dropped, the rest reported."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, MutableMapping
from typing import Any

IGNORED = "TRIPTYCH_IGNORED"
"""The environment variable that tells workers what their parent has dropped."""

LEFT_BEHIND = re.compile(
    r"""
    # Where another launcher (torchrun, paddle.distributed.launch, a cluster's) had placed a process.
    MASTER_(ADDR|PORT) | (LOCAL_|GROUP_|ROLE_)?(RANK|WORLD_SIZE) | ROLE_NAME | NODE_RANK | TORCHELASTIC_.* | PADDLE_.*
    | TRAINING_ROLE | POD_IP | TF_CONFIG | FLAGS_(selected_.*|START_PORT) | DISTRIBUTED_TRAINER_ENDPOINTS
    | (GLOO|TP)_SOCKET_IFNAME
    # Coarser or rewritten arithmetic.
    | (TF_)?XLA_FLAGS | TF_ENABLE_AUTO_MIXED_PRECISION.* | TF_USE_LEGACY_KERAS | TF_NUM_INT(ER|RA)OP_THREADS | KERAS_.*
    | NVIDIA_TF32_OVERRIDE | TORCH_ALLOW_TF32_CUBLAS_OVERRIDE | (ONEDNN|DNNL)_DEFAULT_FPMATH_MODE
    | FLAGS_(use_mkldnn|use_onednn|use_cinn|use_fast_math|prim_.*)
    # Python's: the frameworks need their asserts, and warn when they are imported.
    | PYTHON(OPTIMIZE|WARNINGS|INSPECT)
    """,  # noqa: E501
    re.VERBOSE,
)

REPORTED = re.compile(
    r"(ATEN|CUBLAS|CUDA|CUDNN|DNNL|FLAGS|GOMP|KMP|MALLOC|MKL|NCCL|NPY|NVIDIA|OMP|ONEDNN|OPENBLAS|PYTORCH|TF|TORCH)_.*"
    r"|GLIBC_TUNABLES|LD_PRELOAD"
)
"""What a framework, or a library under it, may read."""


def kept(variables: Mapping[str, str]) -> dict[str, str]:
    """Return the environment for a worker, without the dropped variables, which `IGNORED` lists.

    Keras reads no keras.json: its folder is a device, in which there can be none.
    """
    ignored = [name for name in variables if LEFT_BEHIND.fullmatch(name)]
    own = {
        "KERAS_BACKEND": "tensorflow",
        "KERAS_HOME": os.devnull,
        IGNORED: " ".join(sorted(ignored)),
    }
    return {name: value for name, value in variables.items() if name not in ignored} | own


def drop(variables: MutableMapping[str, str]) -> None:
    """Make this the environment of a process that a launcher has started, once its variables are
    read; the interface that the user has named for its messages stays.
    """
    found = kept(variables) | {n: v for n, v in variables.items() if n.endswith("_SOCKET_IFNAME")}
    for name in set(variables) - set(found):
        del variables[name]
    variables.update(found)


def report() -> dict[str, Any]:
    """Return the `environment`'s part about the shell, before a framework is configured."""
    heeded = {name: value for name, value in sorted(os.environ.items()) if REPORTED.fullmatch(name)}
    found = {
        "variables": heeded,
        "ignored_variables": os.environ.get(IGNORED, "").split(),
        "niceness": os.getpriority(os.PRIO_PROCESS, 0),
    }
    return {key: value for key, value in found.items() if value}
