"""A stand-in for a GPU where there is none: device "cuda" is the processor, kernels run in Triton's interpreter, and a
CUDA graph is a list of what was launched while it was captured. bfloat16 is float16, which the interpreter gets right.

With it every line for a GPU runs on any machine. A capture runs nothing, as on a GPU, and refuses what a GPU refuses:
to visit the host, to launch a kernel that was never launched before, another capture beside it. What it cannot show is
all that lies in the hardware: compiled kernels, their order without a wait, memory, and every time.
"""

from __future__ import annotations

import contextlib
import gc
import re
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten

CAPABILITY = (9, 0)
MEMORY = 2 << 30  # bytes that it claims to have free
_CUDA = re.compile(r"cuda(:\d+)?")
# Whoever asks for these wants a number on the host, now.
_VISITS = ("item", "tolist", "cpu", "__bool__", "__int__", "__float__", "__index__")
_VISITING_OPS = ("_local_scalar_dense", "item", "nonzero", "equal", "is_nonzero", "masked_select")


class StandInError(RuntimeError):
    """What CUDA would have refused."""


class Graph:
    """nodes: what replay runs, in order. kernels: how many of them are launches of Triton's. stream, collecting: of its
    capture, the stream, and whether the garbage collector was on."""

    def __init__(self) -> None:
        self.nodes: list[Callable[[], object]] = []
        self.kernels = 0
        self.stream: object = None
        self.collecting: bool | None = None

    def replay(self) -> None:
        _not_capturing("a replay")
        with torch.inference_mode():  # what was made while capturing may have been made so
            for node in self.nodes:
                node()


class Captures:
    """Of a process. graphs: all that were captured, in order. meanwhile: called in each capture, for tests."""

    def __init__(self) -> None:
        self.graphs: list[Graph] = []
        self.open: Graph | None = None
        self.thread: int | None = None
        self.launched: set[tuple[object, ...]] = set()  # kernels, with what each is compiled for
        self.meanwhile: Callable[[], None] = lambda: None


_captures = Captures()


def _mine() -> Graph | None:
    """The graph that this thread captures."""
    return _captures.open if _captures.thread == threading.get_ident() else None


def _not_capturing(what: str) -> None:
    if _mine() is not None:
        raise StandInError(f"{what} while this thread captures a graph")


@contextlib.contextmanager
def _capture(graph: Graph, pool: object = None, stream: object = None, **_: object) -> Iterator[None]:
    if _captures.open is not None:
        raise StandInError("a capture while another is open in this process")
    graph.stream, graph.collecting = stream, gc.isenabled()
    _captures.open, _captures.thread = graph, threading.get_ident()
    try:
        with _Recording(graph):
            yield
        _captures.meanwhile()
        _captures.graphs.append(graph)
    finally:
        _captures.open = _captures.thread = None


class _Recording(TorchDispatchMode):
    """Writes operators down. Those that change memory do not run; those that make some run for its shape."""

    supports_higher_order_operators = True  # as FlexAttention's, which has no schema and changes nothing

    def __init__(self, graph: Graph) -> None:
        super().__init__()
        self.graph = graph

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        schema = getattr(func, "_schema", None)
        name = "" if schema is None else schema.name.removeprefix("aten::")
        if name in _VISITING_OPS:
            raise StandInError(f"{func} visits the host while a graph is captured")
        run = partial(func, *args, **kwargs)
        if schema is not None and schema.is_mutable:
            self.graph.nodes.append(run)
            written = [x for x in zip(schema.arguments, args) if x[0].alias_info and x[0].alias_info.is_write]
            found = [value for _, value in written] + [kwargs[n] for n in ("out",) if n in kwargs]
            return None if not schema.returns else found[0] if len(schema.returns) == 1 else tuple(found)
        made = run()
        old, _ = tree_flatten(made)
        inputs = {_memory(x) for x in tree_flatten((args, kwargs))[0] if isinstance(x, torch.Tensor)}
        fresh = [i for i, x in enumerate(old) if isinstance(x, torch.Tensor) and _memory(x) not in inputs]
        if not fresh or name.startswith("empty"):
            return made  # a view, or memory without contents

        def again() -> None:
            new, _ = tree_flatten(run())
            for i in fresh:
                old[i].copy_(new[i])

        self.graph.nodes.append(again)
        return made


def _memory(x: torch.Tensor) -> int:
    return x.untyped_storage().data_ptr()


class OnProcessor(TorchFunctionMode):
    """Of one thread: "cuda" means the processor, and what visits the host is refused during a capture."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func is torch.device:
            return func(*args, **kwargs)
        name = getattr(func, "__name__", "")
        if name == "bfloat16":
            func = torch.Tensor.half
        if name in _VISITS or (name in ("tensor", "as_tensor") and _names_cuda(kwargs.get("device"))):
            _not_capturing(f"{name}() visits the host")
        kwargs.pop("pin_memory", None)
        moved = any(_names_cuda(x) for x in (*args, *kwargs.values()))
        args = tuple(_placed(x) for x in args)
        kwargs = {key: _placed(x) for key, x in kwargs.items()}
        if name == "cuda":
            return args[0].clone()
        found = func(*args, **kwargs)
        # A copy to another device is a copy.
        same = isinstance(found, torch.Tensor) and args and found is args[0]
        return found.clone() if same and (name == "cpu" or (name == "to" and moved)) else found


def _names_cuda(x: object) -> bool:
    return (isinstance(x, torch.device) and x.type == "cuda") or (isinstance(x, str) and bool(_CUDA.fullmatch(x)))


def _placed(x: object) -> object:
    if x is torch.bfloat16:
        return torch.float16
    return torch.device("cpu") if _names_cuda(x) else x


class Stream:
    def __init__(self, device: object = None, **_: object) -> None:
        self.cuda_stream, self.device = 0, torch.device("cuda")

    def synchronize(self) -> None:
        _not_capturing("a synchronisation")

    wait_stream = wait_event = lambda self, other: None


class Event:
    def __init__(self, **_: object) -> None:
        self.at = 0.0

    def record(self, stream: object = None) -> None:
        self.at = time.perf_counter()

    def synchronize(self) -> None:
        _not_capturing("a synchronisation")

    def elapsed_time(self, other: Event) -> float:
        return 1e3 * (other.at - self.at)


@contextlib.contextmanager
def gpu() -> Iterator[Captures]:
    """This process, and of its threads the caller's, has a GPU; other threads enter `OnProcessor()` themselves."""
    import triton.language as tl
    from triton.language.extra import cuda as language
    from triton.runtime.interpreter import GridExecutor

    from fastigpt.bench import timing
    from fastigpt.kernels import launch

    if not launch.interpreting():
        raise StandInError("the stand-in needs TRITON_INTERPRET=1, set before triton is imported")
    run = GridExecutor.__call__

    def launched(self: Any, *args: Any, **kwargs: Any) -> None:
        kernel = _compiled_for(self, args, kwargs)
        graph = _mine()
        if graph is None:
            _captures.launched.add(kernel)
            return run(self, *args, **kwargs)
        if kernel not in _captures.launched:
            raise StandInError(f"{self.fn.__name__} would be compiled while a graph is captured")
        graph.nodes.append(partial(run, self, *args, **kwargs))
        graph.kernels += 1
        return None

    one = SimpleNamespace(name="stand-in", multi_processor_count=4, total_memory=MEMORY)
    fakes: dict[str, object] = {
        "is_available": lambda: True, "device_count": lambda: 1, "current_device": lambda: 0,
        "get_device_capability": lambda device=None: CAPABILITY, "get_device_name": lambda device=None: one.name,
        "get_device_properties": lambda device=None: one, "mem_get_info": lambda device=None: (MEMORY, MEMORY),
        "memory_reserved": lambda device=None: 0, "memory_allocated": lambda device=None: 0,
        "empty_cache": lambda: None, "synchronize": lambda device=None: _not_capturing("a synchronisation"),
        "is_current_stream_capturing": lambda: _mine() is not None, "current_stream": Stream, "Stream": Stream,
        "Event": Event, "CUDAGraph": Graph, "graph": _capture, "stream": contextlib.nullcontext,
        "device": contextlib.nullcontext, "device_of": contextlib.nullcontext,
    }  # fmt: skip
    _captures.__init__()  # type: ignore[misc]
    with contextlib.ExitStack() as stack:
        for name, fake in fakes.items():
            stack.enter_context(mock.patch.object(torch.cuda, name, fake))
        stack.enter_context(mock.patch.object(GridExecutor, "__call__", launched))
        stack.enter_context(mock.patch.object(launch, "why_unavailable", lambda device: None))
        stack.enter_context(mock.patch.object(launch, "interpreting", lambda: False))
        for wait in ("gdc_wait", "gdc_launch_dependents"):  # launches follow each other anyway
            stack.enter_context(mock.patch.object(language, wait, lambda: None))
        # The kernels' one use of it is a prefetch, which reads nothing.
        stack.enter_context(mock.patch.object(tl, "inline_asm_elementwise", lambda *args, **kwargs: None))
        stack.enter_context(mock.patch.dict(timing._COLD_BYTES, cuda=1))
        stack.enter_context(OnProcessor())
        yield _captures


def _compiled_for(executor: Any, args: Any, kwargs: Any) -> tuple[object, ...]:
    """What Triton would compile apart: constants, dtypes, integers that are 1 or multiples of 16."""
    constants = set(executor.constexprs)

    def kind(name: str, x: object) -> object:
        if isinstance(x, torch.Tensor):
            return x.dtype, x.data_ptr() % 16 == 0
        if name in constants or isinstance(x, bool | str) or x is None:
            return x
        return ("int", x == 1, x % 16 == 0) if isinstance(x, int) else type(x)

    named = [*zip(executor.arg_names, args), *sorted(kwargs.items())]
    return executor.fn.__module__, executor.fn.__name__, *((name, kind(name, x)) for name, x in named)
