"""Pallas kernels for Hopper GPUs on a CPU: not step by step as they were written, but as they are compiled.

`emulated()` lets JAX's CPU run them. Each is compiled for a described H200 to PTX, by XLA and Mosaic, and its code for
the host to a function of this process; emulator.cc runs the PTX, a thread block after the other: threads of a warp
together, warps in turns and copies in an order that `seed` decides. What is right in one order may still be left to
chance, so it also keeps account of who knows what of whom (vector clocks, through barriers) and of what the units that
copy and multiply may not have done yet, and fails with what it found:

- reads and writes of shared memory that no barrier orders, or that a unit may still be busy with;
- what was stored and is read by another unit without a fence, registers of a product before it is waited for;
- arrays read or written outside, addresses and descriptors that the hardware refuses, warps that wait for ever.

Registers, shared memory and results begin with what is no number. Times it does not know, nor thread blocks that talk
to each other. Instructions that it does not know are named in the error.

Source: NVIDIA, PTX ISA 9.0: sections on asynchronous operations, mbarrier, wgmma and its matrix descriptors.
"""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import os
import pathlib
import re
import shutil
import subprocess
import tempfile
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from unittest import mock

import jax
import numpy as np

from striate.lib import attention, plan

HERE = pathlib.Path(__file__).parent
CALLED_BY_KERNELS = "mosaic_gpu_init_tma_desc", "mosaic_gpu_init_tma_im2col_desc", "mosaic_gpu_build_kernel_spec"
COMPILER = next(filter(None, map(shutil.which, ("c++", "g++", "clang++"))), None)
ALIGNMENT = 256  # bytes, of arrays in the memory of a GPU


class Found(Exception):
    """What a kernel does that a GPU leaves to chance, or that it cannot do."""


class Kernel:
    """A compiled kernel, called with numpy arrays.

    Args:
      ptx, host: the texts of its PTX and of the LLVM code that launches it.
      results: shape and dtype of each.
      aliases: which result lies where which argument lay.
    """

    def __init__(self, ptx: str, host: str, results, aliases: dict[int, int]):
        self.name, self.ptx, self.host = re.search(r"\.entry (\w+)", ptx)[1], ptx, host
        self.results, self.aliases = results, aliases
        error = ctypes.create_string_buffer(1000)
        self._program = _library().emulator_read(ptx.encode(), error, len(error))
        if not self._program:
            raise NotImplementedError(f"{self.name}: {error.value.decode()}")
        self._launch = _compiled(host)

    def replace(self, instruction: str, by: str) -> Kernel:
        """With something else for the instructions that a pattern finds in the PTX; by "" they are left out."""
        whole = rf"[^\n;{{}}]*{instruction}[^;]*;"
        assert re.search(whole, self.ptx), f"there is no {instruction} in {self.name}"
        ptx = re.sub(whole, lambda found: re.sub(instruction, by, found[0]) if by else ";", self.ptx)
        return Kernel(ptx, self.host, self.results, self.aliases)

    def __call__(self, *arguments, seed: int = 0) -> list[np.ndarray]:
        given = [_placed(np.asarray(x)) for x in arguments]
        argument_of = {result: argument for argument, result in self.aliases.items()}
        results = [
            given[argument_of[n]]
            if n in argument_of
            else _placed(np.full(x.shape, -1, f"i{np.dtype(x.dtype).itemsize}"))
            for n, x in enumerate(self.results)
        ]
        arrays, library = given + results, _library()
        places, sizes = ([getter(x) for x in arrays] for getter in (lambda x: x.ctypes.data, lambda x: x.nbytes))
        numbers = ctypes.c_uint64 * len(arrays)
        table = (ctypes.c_void_p * len(arrays))(*places)
        with _one_at_a_time:
            library.emulator_begin(self._program, seed, len(arrays), numbers(*places), numbers(*sizes))
            self._launch.run(None, ctypes.addressof(table))
            found = "\n".join(filter(None, (library.emulator_error().decode(), library.emulator_notes().decode())))
        if found:
            raise Found(f"{self.name}: {found}")
        return [x.view(y.dtype).reshape(y.shape).copy() for x, y in zip(results, self.results, strict=True)]


class _Host:
    """A function of this process; `engine` holds its memory."""

    def __init__(self, engine, address: int):
        self._engine, self.run = engine, ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_void_p)(address)


def _compiled(host: str) -> _Host:
    import llvmlite.binding as llvm

    llvm.initialize_native_target()
    llvm.initialize_native_asmprinter()
    for name in CALLED_BY_KERNELS:
        llvm.add_symbol(name, ctypes.cast(getattr(_library(), name), ctypes.c_void_p).value)
    module = llvm.parse_assembly(host)
    machine = llvm.Target.from_default_triple().create_target_machine(jit=True)
    engine = llvm.create_mcjit_compiler(module, machine)
    engine.finalize_object()
    [name] = re.findall(r"define void @((?!_mlir)\w+)\(", host)
    return _Host(engine, engine.get_function_address(name))


_one_at_a_time = threading.Lock()  # there is one launch in emulator.cc
_libraries = []


def _library() -> ctypes.CDLL:
    """emulator.cc, compiled for this process."""
    if COMPILER is None:
        raise RuntimeError("tests/emulator takes a C++ compiler of C++20 (c++, g++ or clang++), and none is in PATH.")
    if not _libraries:
        with tempfile.TemporaryDirectory() as folder:
            path = pathlib.Path(folder) / "emulator.so"
            how = [COMPILER, "-O3", "-std=c++20", "-shared", "-fPIC", "-o", path, HERE / "emulator.cc"]
            subprocess.run(how, check=True)
            library = ctypes.CDLL(str(path))
        library.emulator_read.restype = ctypes.c_void_p
        library.emulator_begin.argtypes = [ctypes.c_void_p, ctypes.c_uint32, ctypes.c_int] + [ctypes.c_void_p] * 2
        library.emulator_error.restype = library.emulator_notes.restype = ctypes.c_char_p
        _libraries.append(library)
    return _libraries[0]


def _placed(x: np.ndarray) -> np.ndarray:
    """The bytes of an array, where they would begin on a GPU."""
    room = np.empty(x.nbytes + ALIGNMENT, np.uint8)
    first = -room.ctypes.data % ALIGNMENT
    placed = room[first : first + x.nbytes]
    placed[:] = np.ascontiguousarray(x).reshape(-1).view(np.uint8)
    return placed


def _compile(module, arguments, results, aliases) -> Kernel:
    """Of a Mosaic module, by XLA, which writes PTX and host code to files that the environment names."""
    from jax.experimental.mosaic.gpu import core as mosaic

    def call(*arrays):
        return mosaic.mosaic_gpu_p.bind(*arrays, module=module, out_types=tuple(results), inout_types=())

    with tempfile.TemporaryDirectory() as folder:
        wanted = {"MOSAIC_GPU_DUMP_TO": folder, "MOSAIC_GPU_DUMP_PTX": "1", "MOSAIC_GPU_DUMP_HOST_LLVM": "1"}
        # In a thread of its own, where no mesh is set.
        with mock.patch.dict(os.environ, wanted), ThreadPoolExecutor() as another:
            shapes = (jax.ShapeDtypeStruct(x.shape, x.dtype) for x in arguments)
            another.submit(plan.compile_for, "h200:1", call, *shapes).result()
        [ptx], [host] = (list(pathlib.Path(folder).glob(f"*.{kind}")) for kind in ("ptx", "ll"))
        return Kernel(ptx.read_text(), host.read_text(), results, dict(aliases))


_kernels: dict[str, Kernel] = {}


@dataclass
class Emulation:
    """What runs, and in which order warps take turns and copies are done."""

    seed: int
    kernels: list[Kernel] = field(default_factory=list)


@contextlib.contextmanager
def emulated(seed: int = 0, change: Callable[[Kernel], Kernel] = lambda kernel: kernel) -> Iterator[Emulation]:
    """While this is entered, programs that JAX compiles for the CPU run GPU kernels, or what `change` makes of them."""
    # Imported here: jax 0.10 has not all of them.
    from jax._src import callback
    from jax._src.pallas import mpmd
    from jax.experimental.mosaic.gpu import core as mosaic
    from jax.experimental.mosaic.gpu import utils

    emulation = Emulation(seed)

    def lower(ctx, *arguments, module, out_types, inout_types=(), input_output_aliases=(), **how):
        if ctx.module_context.platforms != ("cpu",):
            also = {"inout_types": inout_types, "input_output_aliases": input_output_aliases}
            return for_gpu(ctx, *arguments, module=module, out_types=out_types, **also, **how)
        key = hashlib.sha256(re.sub(r"dump_basename = \"\w*\"", "", str(module)).encode()).hexdigest()
        if key not in _kernels:
            _kernels[key] = _compile(module, ctx.avals_in, out_types, input_output_aliases)
        emulation.kernels.append(kernel := change(_kernels[key]))

        def run(*arrays):
            return tuple(kernel(*arrays, seed=emulation.seed))

        how = {"has_side_effect": False, "returns_token": False}
        return callback.emit_python_callback(ctx, run, None, arguments, ctx.avals_in, ctx.avals_out, **how)[0]

    def dispatch(ctx, *arguments, **how):
        return (elsewhere if how["interpret"] else mpmd._mpmd_map_mgpu_lowering)(ctx, *arguments, **how)

    for_gpu, elsewhere = mosaic._mosaic_gpu_lowering_rule, mpmd._mpmd_map_fallback_lowering
    with (
        mock.patch.object(mosaic, "_mosaic_gpu_lowering_rule", lower),
        mock.patch.object(mpmd, "_mpmd_map_fallback_lowering", dispatch),
        mock.patch.object(utils, "_infer_arch", lambda: (9, 0)),
        mock.patch.object(attention, "capability", lambda: "9.0"),
        mock.patch.dict(os.environ, {attention.EXPERIMENTAL: "pallas_gpu"}),
    ):
        jax.clear_caches()  # of programs with other kernels
        try:
            yield emulation
        finally:
            jax.clear_caches()
