"""Builds the extension `fastigpt._C` from csrc/.

Never imports torch: the extension knows pointers and sizes only. Source files carry their instruction set in their
name (`*_avx2.cpp`, `*_avx512.cpp`, `*_avx512vnni.cpp`, `*_amx.cpp`); each is compiled with just those flags and is only
called after the processor has been asked, so one wheel serves every machine of an architecture.

FASTIGPT_CUDA=auto|0|1   compile csrc/cuda with nvcc: when found, never, or fail without it.
"""

import os
import platform
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).parent
X86 = platform.machine().lower() in {"x86_64", "amd64"}
MSVC = os.name == "nt"
BUILDS = {"dist_info", "bdist_wheel", "editable_wheel", "build", "build_ext", "install", "develop"}


def compiler() -> list[str]:
    """The command of the C++ compiler: the one that CXX names, or that Python was built with."""
    return shlex.split(os.environ.get("CXX") or sysconfig.get_config_var("CXX") or "c++")


def check_compiler() -> None:
    """Ends with one sentence where the extension could not be compiled. pip prints what a build has said so far when it
    fails, so this comes before anything else is said. (Of Visual C++ setuptools says itself when it is missing.)"""
    command = compiler()
    how = "install one (docs/install.md says how) or set CXX to yours"
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "check.cpp"
        source.write_text("#include <Python.h>\n#include <string_view>\nconstexpr std::string_view name = __FILE__;\n")
        includes = [f"-I{sysconfig.get_path(kind)}" for kind in ("include", "platinclude")]
        command += ["-std=c++17", *includes, "-c", str(source), "-o", str(source.with_suffix(".o"))]
        try:
            run = subprocess.run(command, capture_output=True, text=True, errors="replace", check=False)
        except OSError:
            sys.exit(
                f"fastigpt is built from source and needs a C++17 compiler, but {command[0]!r} cannot be run: {how}."
            )
    if run.returncode:
        if "Python.h" in run.stderr:
            sys.exit(
                "fastigpt is built from source and needs the headers of Python "
                f"{sysconfig.get_python_version()}, but {command[0]!r} does not find Python.h: install them "
                "(docs/install.md says how)."
            )
        told = next((line for line in run.stderr.splitlines() if "error" in line), run.stderr.strip()[-200:])
        sys.exit(
            f"fastigpt is built from source and needs a C++17 compiler, but {command[0]!r} cannot compile: {how}. "
            f"It says: {told}"
        )


if not MSVC and BUILDS & set(sys.argv):
    check_compiler()

from pybind11.setup_helpers import Pybind11Extension
from setuptools import find_packages, setup
from setuptools.command.build_ext import build_ext

AVX2_FLAGS = ["-mavx2", "-mfma", "-mf16c"]
AVX512_FLAGS = ["-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", *AVX2_FLAGS]
VNNI_FLAGS = [*AVX512_FLAGS, "-mavx512vnni", "-mavx512bf16"]
# Instruction sets by file-name suffix, for gcc and clang / for MSVC.
ISA_FLAGS = {
    "_avx2": (AVX2_FLAGS, ["/arch:AVX2"]),
    "_avx512": (AVX512_FLAGS, ["/arch:AVX512"]),
    "_avx512vnni": (VNNI_FLAGS, ["/arch:AVX512"]),
    "_amx": (VNNI_FLAGS, []),
}
# Folders of csrc that hold C++.
ROOMS = ("runtime", "operators", "nearest", "codecs", "engine", "bindings")
CUDA_TARGETS = ["-gencode=arch=compute_80,code=sm_80", "-gencode=arch=compute_90,code=[sm_90,compute_90]"]


def isa_suffix(source: str) -> str | None:
    stem = Path(source).stem
    return next((suffix for suffix in ISA_FLAGS if stem.endswith(suffix)), None)


def assembles(instruction: str) -> bool:
    """Whether the assembler behind the compiler is new enough to know it."""
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "check.cpp"
        source.write_text(f'__asm__("{instruction}");\n')
        run = subprocess.run([*compiler(), "-c", str(source), "-o", os.devnull], capture_output=True, check=False)
    return run.returncode == 0


# Whether *_amx.cpp holds anything: tiles are asked for in the way of Linux.
AMX = X86 and sys.platform == "linux" and bool(BUILDS & set(sys.argv)) and assembles("tilerelease")


def sources() -> list[str]:
    found = sorted(p.relative_to(ROOT).as_posix() for room in ROOMS for p in (ROOT / "csrc" / room).glob("*.cpp"))
    return [s for s in found if X86 or isa_suffix(s) is None]


def nvcc() -> str | None:
    """Path of the CUDA compiler to use, or None to build for the CPU alone."""
    wish = os.environ.get("FASTIGPT_CUDA", "auto")
    if wish not in {"auto", "0", "1"}:
        raise SystemExit(f"FASTIGPT_CUDA must be auto, 0 or 1, not {wish!r}")
    if wish == "0":
        return None
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    path = shutil.which("nvcc", path=os.path.join(home, "bin") if home else None) or shutil.which("nvcc")
    if path is None and wish == "1":
        raise SystemExit("FASTIGPT_CUDA=1 but nvcc was not found: put it on PATH or set CUDA_HOME")
    return path


def cuda_library_dir(compiler: str) -> str:
    """Folder of libcudart_static.a, as the compiler itself would link it."""
    dry = subprocess.run([compiler, "--dryrun", "-x", "cu", os.devnull], capture_output=True, text=True, check=False)
    top = next((line.split("=", 1)[1].strip() for line in dry.stderr.splitlines() if line.startswith("#$ TOP=")), None)
    root = Path(top) if top else Path(compiler).resolve().parents[1]
    for folder in ("lib64", "lib", "targets/x86_64-linux/lib", "targets/sbsa-linux/lib"):
        if (root / folder / "libcudart_static.a").exists():
            return str(root / folder)
    raise SystemExit(f"{compiler} was found, but no libcudart_static.a beside it in {root}")


class BuildExtension(build_ext):
    """Compiles all files at once, each with the flags of its instruction set, and .cu files with nvcc."""

    def build_extension(self, ext):
        # An object built with the other choice of FASTIGPT_CUDA is as new as its sources and still wrong.
        choice = Path(self.build_temp) / "cuda-choice"
        if not choice.exists() or choice.read_text() != str(nvcc()):
            self.force = True
        compile_one, postargs = self.compiler.compile, list(ext.extra_compile_args or [])

        def compile_parallel(files, **kwargs):
            def task(source):
                suffix = isa_suffix(source)
                flags = ISA_FLAGS[suffix][1 if MSVC else 0] if suffix else []
                return compile_one([source], **{**kwargs, "extra_postargs": postargs + flags})

            with ThreadPoolExecutor(os.cpu_count()) as pool:
                cpu = [pool.submit(task, source) for source in files]
                gpu = [pool.submit(self.compile_cuda, source) for source in self.cuda_sources()]
                return [obj for job in cpu for obj in job.result()] + [job.result() for job in gpu]

        self.compiler.compile = compile_parallel
        try:
            super().build_extension(ext)
            choice.parent.mkdir(parents=True, exist_ok=True)
            choice.write_text(str(nvcc()))
        finally:
            self.compiler.compile = compile_one

    def cuda_sources(self) -> list[Path]:
        return sorted((ROOT / "csrc" / "cuda").glob("*.cu")) if nvcc() else []

    def compile_cuda(self, source: Path) -> str:
        target = Path(self.build_temp) / "cuda" / (source.stem + ".o")
        target.parent.mkdir(parents=True, exist_ok=True)
        host = ["-Xcompiler=/O2"] if MSVC else ["-Xcompiler=-fPIC,-fvisibility=hidden"]
        command = [
            nvcc(),
            "-O3",
            "-std=c++17",
            *CUDA_TARGETS,
            *host,
            f"-I{ROOT / 'csrc' / 'include'}",
            f"-I{ROOT / 'csrc'}",
            "-c",
            str(source),
            "-o",
            str(target),
        ]
        subprocess.run(command, check=True)
        return str(target)


def extension() -> Pybind11Extension:
    # -ffp-contract=off: a product and a sum are fused only where the code says so, else results would depend on the
    # compiler and on the instruction set. Links are from measured need only: no torch, no BLAS.
    flags = (
        ["/O2"]
        if MSVC
        else ["-O3", "-fvisibility=hidden", "-ffp-contract=off", "-Wall", "-Wextra", "-Wno-unused-parameter"]
    )
    ext = Pybind11Extension(
        "fastigpt._C",
        sources(),
        include_dirs=["csrc/include", "csrc"],
        depends=[p.relative_to(ROOT).as_posix() for p in (ROOT / "csrc").rglob("*") if p.suffix in {".h", ".cu"}],
        extra_compile_args=flags,
        extra_link_args=[] if MSVC else ["-pthread"],
        cxx_std=17,
    )
    if AMX:
        ext.define_macros.append(("FASTIGPT_WITH_AMX", "1"))
    cuda = nvcc()
    if cuda and sorted((ROOT / "csrc" / "cuda").glob("*.cu")):
        ext.define_macros.append(("FASTIGPT_WITH_CUDA", "1"))
        ext.library_dirs.append(cuda_library_dir(cuda))
        ext.libraries += ["cudart_static"] if MSVC else ["cudart_static", "dl", "rt", "pthread"]
    return ext


setup(
    packages=find_packages(include=["fastigpt", "fastigpt.*"]),
    package_data={
        "fastigpt": ["py.typed", "data/**/*", "server/static/*"],
        "fastigpt.kernels": ["*.json", "**/*.json"],
    },
    ext_modules=[extension()],
    cmdclass={"build_ext": BuildExtension},
    zip_safe=False,
)
