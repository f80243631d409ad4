"""Builds kernels._C from csrc/: the CPU part always, the CUDA part when a toolkit is present.

Environment: WSSS_CUDA=0/1 forces the CUDA part off/on; CUDA_HOME names the toolkit; TORCH_CUDA_ARCH_LIST names the GPU
architectures (9.0 plus PTX when unset); MAX_JOBS limits the parallel compilations; WSSS_SANITIZE=address,undefined
compiles the CPU part with these sanitizers, for the tests (see CONTRIBUTING.md). Without a C++ compiler or
without Python.h the packages are installed without kernels._C, and the backend "native" then says that it is missing.
"""

import os
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import setup

ROOT = Path(__file__).resolve().parent
CPU_FLAGS = ["-O3", "-g0", "-std=c++20", "-fvisibility=hidden", "-Wall", "-Wno-unknown-pragmas", "-Wno-sign-compare"]
CUDA_FLAGS = ["-O3", "-std=c++17", "--expt-relaxed-constexpr", "-lineinfo"]


SANITIZERS = ("address", "undefined", "leak", "thread")


def say(text):
    print(f"setup.py: {text}", file=sys.stderr)


def openmp_flags():
    """-fopenmp, without which at::parallel_for is a loop of one thread. The link needs none: torch has the runtime."""
    compiler = (os.environ.get("CXX") or next(c for c in ("c++", "g++", "clang++") if shutil.which(c))).split()
    command = [*compiler, "-fopenmp", "-fsyntax-only", "-x", "c++", "-include", "omp.h", "-"]
    if subprocess.run(command, input="", text=True, capture_output=True, check=False).returncode == 0:
        return ["-fopenmp"]
    say(f"{compiler[0]} has no OpenMP (omp.h): the native operators will run on one thread; install libomp or use g++")
    return []


def missing_for_native():
    """What a native build lacks on this machine, or None."""
    compiler = os.environ.get("CXX") or next((c for c in ("c++", "g++", "clang++") if shutil.which(c)), None)
    if compiler is None or shutil.which(compiler.split()[0]) is None:
        return "no C++ compiler"
    if not (Path(sysconfig.get_paths()["include"]) / "Python.h").exists():
        return "no Python.h (install the python3-dev package)"
    return None


def toolkit_candidates():
    """Folders that may be a CUDA toolkit, best first. An nvcc on PATH may be a script: ask it where it really lives."""
    for name in ("CUDA_HOME", "CUDA_PATH"):
        if os.environ.get(name):
            yield Path(os.environ[name])
    nvcc = shutil.which("nvcc")
    if nvcc:
        dry = subprocess.run([nvcc, "--dryrun", "-c", "x.cu"], capture_output=True, text=True, check=False)
        top = re.search(r"^#\$ TOP=(\S+)", dry.stdout + dry.stderr, re.MULTILINE)
        yield Path(top.group(1)).resolve() if top else Path(nvcc).resolve().parent.parent
    yield Path("/usr/local/cuda")
    yield from sorted(Path("/usr/local").glob("cuda-*"), reverse=True)


def find_cuda_home():
    """First candidate that has both bin/nvcc and libcudart.so, or None."""
    for home in toolkit_candidates():
        libraries = [home / "lib64", home / "lib", *home.glob("targets/*/lib")]
        if (home / "bin" / "nvcc").exists() and any((lib / "libcudart.so").exists() for lib in libraries):
            return home
    return None


def want_cuda():
    """The toolkit to build the CUDA part with, or None. Raises when WSSS_CUDA=1 cannot be met."""
    choice = os.environ.get("WSSS_CUDA", "")
    if choice not in ("", "0", "1"):
        raise SystemExit(f"setup.py: WSSS_CUDA must be 0 or 1, got {choice!r}")
    if choice == "0":
        return None
    import torch

    home = find_cuda_home()
    problem = None
    if torch.version.cuda is None:
        problem = "this torch is built without CUDA"
    elif home is None:
        problem = "no CUDA toolkit found (set CUDA_HOME)"
    else:
        out = subprocess.run([home / "bin" / "nvcc", "--version"], capture_output=True, text=True, check=True).stdout
        found = re.search(r"release (\d+)\.", out)
        if found is None or found.group(1) != torch.version.cuda.split(".")[0]:
            problem = f"the toolkit in {home} is not CUDA {torch.version.cuda.split('.')[0]}, which this torch needs"
    if problem is None:
        return home
    if choice == "1":
        raise SystemExit(f"setup.py: WSSS_CUDA=1, but {problem}")
    say(f"building without CUDA: {problem}")
    return None


def sanitizer_flags():
    """(compile, link) flags of WSSS_SANITIZE; -fno-wrapv undoes a flag of Python's own, which hides overflows."""
    names = [n for n in os.environ.get("WSSS_SANITIZE", "").split(",") if n]
    unknown = [n for n in names if n not in SANITIZERS]
    if unknown:
        known = ", ".join(SANITIZERS)
        raise SystemExit(f"setup.py: WSSS_SANITIZE must be a list of {known}; got {','.join(unknown)!r}")
    if not names:
        return [], []
    chosen = f"-fsanitize={','.join(names)}"
    compile_flags = [chosen, "-fno-sanitize-recover=all", "-fno-omit-frame-pointer", "-fno-wrapv", "-O1", "-g1"]
    return compile_flags, [chosen]


def native_extension():
    """(ext_modules, cmdclass) for kernels._C; empty where it cannot be built."""
    problem = missing_for_native()
    if problem:
        say(f"installing without kernels._C, the native backend: {problem}")
        return [], {}
    cuda_home = want_cuda()
    if cuda_home:
        os.environ["CUDA_HOME"] = str(cuda_home)  # before the next import, which reads it once
        os.environ.setdefault("TORCH_CUDA_ARCH_LIST", "9.0+PTX")
    import pybind11
    from torch.utils.cpp_extension import BuildExtension, CppExtension, CUDAExtension

    sources = [ROOT / "csrc" / "module.cpp", *sorted(ROOT.glob("csrc/*/*.cpp"))]
    if cuda_home:
        sources += sorted(ROOT.glob("csrc/*/*.cu"))
    else:
        sources = [s for s in sources if not s.stem.endswith("_host")]
    sanitize, link = sanitizer_flags()
    cpu_flags = CPU_FLAGS + openmp_flags() + sanitize
    extension = (CUDAExtension if cuda_home else CppExtension)(
        "kernels._C",
        [str(s.relative_to(ROOT)) for s in sources],
        include_dirs=[str(ROOT / "csrc"), pybind11.get_include()],
        define_macros=[("WSSS_WITH_CUDA", "1" if cuda_home else "0")],
        extra_compile_args={"cxx": cpu_flags, "nvcc": CUDA_FLAGS} if cuda_home else cpu_flags,
        extra_link_args=link,
    )
    return [extension], {"build_ext": BuildExtension.with_options(no_python_abi_suffix=False)}


ext_modules, cmdclass = native_extension()
setup(ext_modules=ext_modules, cmdclass=cmdclass)
