"""PyTorch's CUDA kernels on fake GPUs: each becomes its CPU kernel on the same memory, which a
stream runs later.

Allocation, views and the caching allocator stay PyTorch's own, so memory is used again as on a GPU.
The numbers are those of the CPU, bit by bit, if and only if streams and events order what depends
on each other.
"""

from __future__ import annotations

import ctypes
import itertools
import traceback
from collections.abc import Callable
from typing import Any

import torch
from torch.utils import _pytree as tree

fake = ctypes.CDLL(None)
errors: list[BaseException] = []
"""What kernels raised, in the threads of the streams."""

NOT_KERNELS = {
    "empty.memory_format",
    "empty_strided",
    "resize_",
    "set_",
    "set_.source_Tensor",
    "set_.source_Storage",
    "set_.source_Storage_storage_offset",
    "as_strided",
    "view",
    "_reshape_alias",
    "unfold",
    "view_as_real",
    "_has_same_storage_numel",
    "_local_scalar_dense",
    "record_stream",
    "_pin_memory",
    "is_pinned",
}
"""These only allocate, look at memory that is there, or wait for the stream: they work on a fake
GPU as they are.
"""

_queued: dict[int, Callable[[], Any]] = {}
_tokens = itertools.count()


@ctypes.CFUNCTYPE(None, ctypes.c_long)
def _run_queued(token: int) -> None:
    try:
        with torch.no_grad():
            _queued.pop(token)()
    except BaseException as error:
        traceback.print_exc()
        errors.append(error)


def queue(device: torch.device, kernel: Callable[[], Any]) -> None:
    """Put `kernel` at the end of the device's current stream."""
    token = next(_tokens)
    _queued[token] = kernel
    stream = ctypes.c_void_p(torch._C._cuda_getCurrentRawStream(device.index))
    fake.fake_queue(ctypes.c_int(device.index), stream, _run_queued, ctypes.c_long(token))


def on_gpu(x: Any) -> bool:
    return isinstance(x, torch.Tensor) and x.device.type == "cuda"


def as_cpu(x: Any) -> Any:
    """Return a GPU's tensor as one of the CPU on the same memory, which it does not keep alive;
    anything else as it is.
    """
    if isinstance(x, torch.device):
        return torch.device("cpu")
    if not on_gpu(x):
        return x
    storage = x.untyped_storage()
    if not x.numel():
        return torch.empty_strided(x.shape, x.stride(), dtype=x.dtype)
    memory = torch.frombuffer(
        (ctypes.c_uint8 * storage.nbytes()).from_address(storage.data_ptr()), dtype=torch.uint8
    )
    view = torch.empty(0, dtype=x.dtype)
    return view.set_(memory.untyped_storage(), x.storage_offset(), x.shape, x.stride())


def as_meta(x: Any) -> Any:
    if isinstance(x, torch.device):
        return torch.device("meta")
    if on_gpu(x):
        return torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device="meta")
    return x.to("meta") if isinstance(x, torch.Tensor) and x.dim() else x


def late(op: Any) -> Callable[..., Any]:
    """Return what stands in for the CUDA kernel of `op`."""
    arguments, returns = op._schema.arguments, op._schema.returns
    is_tensor = [str(argument.type) == "Tensor" for argument in arguments]
    written = [a.name for r in returns for a in arguments if r.alias_info and a.alias_info
               and r.alias_info.before_set == a.alias_info.before_set]  # fmt: skip

    def run(*args: Any, **kwargs: Any) -> Any:
        args = tuple(
            torch.tensor(x)
            if tensor and isinstance(x, int | float)
            else x  # numbers come here as such
            for tensor, x in zip(is_tensor, args, strict=False)
        )
        leaves = tree.tree_leaves((args, kwargs))
        device = next(
            x.device if on_gpu(x) else x for x in leaves if on_gpu(x) or isinstance(x, torch.device)
        )
        if device.index is None:
            device = torch.device("cuda", torch.cuda.current_device())
        if returns and not written:
            shapes = op(*tree.tree_map(as_meta, args), **tree.tree_map(as_meta, kwargs))
            made = tree.tree_map(
                lambda x: (
                    None  # a gradient that nobody has asked for
                    if x is None
                    else torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=device)
                ),
                shapes,
            )
            places = tree.tree_leaves(tree.tree_map(as_cpu, made))
        else:
            _resize_outputs(op, args, kwargs)
            given = dict(zip((a.name for a in arguments), args, strict=False)) | kwargs
            made = tuple(given[name] for name in written)
            made = made[0] if len(made) == 1 else made or None
            places = []
        cpu_args, cpu_kwargs = tree.tree_map(as_cpu, (args, kwargs))

        def kernel() -> None:
            for place, result in zip(
                places, tree.tree_leaves(op(*cpu_args, **cpu_kwargs)), strict=False
            ):
                if place is not None:
                    place.copy_(result)

        queue(device, kernel)
        return made

    return run


def _resize_outputs(op: Any, args: Any, kwargs: Any) -> None:
    """Gives the tensors of `out=` their shapes; the kernel would do it too late."""
    outputs = [argument.name for argument in op._schema.arguments if argument.is_out]
    if outputs:
        shapes = tree.tree_map(as_meta, kwargs)
        op(*tree.tree_map(as_meta, args), **shapes)
        for name in outputs:
            if shapes[name].shape != kwargs[name].shape:
                kwargs[name].resize_(shapes[name].shape)


def copy_(to: torch.Tensor, source: torch.Tensor, non_blocking: bool = False) -> torch.Tensor:
    """`Tensor.copy_`: in the sender's stream between GPUs, and the host waits where one side is
    pageable memory.
    """
    if on_gpu(to) and on_gpu(source) and to.device != source.device:
        streams = [torch.cuda.current_stream(x.device) for x in (to, source)]
        streams[1].wait_stream(streams[0])
        a, b = as_cpu(to), as_cpu(source)
        queue(source.device, lambda: a.copy_(b))
        streams[0].wait_stream(streams[1])
        return to
    device = to.device if on_gpu(to) else source.device
    is_pinned = all(on_gpu(x) or x.is_pinned() for x in (to, source))
    a, b = as_cpu(to), as_cpu(source if on_gpu(source) or is_pinned else source.clone())
    queue(device, lambda: a.copy_(b))
    if not on_gpu(to) and not (non_blocking and is_pinned):
        torch.cuda.current_stream(device).synchronize()
    return to


def install() -> torch.library.Library:
    """Put a late kernel in the place of every CUDA kernel, for as long as the result lives."""
    library = torch.library.Library("aten", "IMPL", "CUDA")
    for name in torch._C._dispatch_get_registrations_for_dispatch_key("CUDA"):
        namespace, _, name = name.partition("::")
        base, _, overload = name.partition(".")
        op = getattr(getattr(torch.ops.aten, base, None), overload or "default", None)
        if namespace != "aten" or name in NOT_KERNELS or op is None or "Dimname" in str(op._schema):
            continue
        is_view = any(
            r.alias_info is not None and not r.alias_info.is_write for r in op._schema.returns
        )
        if not is_view:
            library.impl(name, late(op), "CUDA", allow_override=True)
    library.impl("copy_", copy_, "CUDA", allow_override=True)
    return library
