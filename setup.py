"""Build of the native extension `pyeff._native`; everything else stands in pyproject.toml.

The extension takes integer pointers and never sees a torch header, so the build needs a C++17 compiler and pybind11
and nothing else. CUDA sources join when `nvcc` is found:

    PYEFF_BUILD_CUDA=auto|1|0     auto (default): if nvcc is there; 1: fail without it; 0: never
    PYEFF_CUDA_ARCHS="80;90a"     instead of the default architectures
    NVCC, CXX                     compilers to use

Every file of csrc/cpu is compiled once per instruction level into a namespace of its own; the level is
chosen at run time (csrc/level.cpp). No GPU is probed: what is built depends on the tools alone.
"""

from __future__ import annotations

import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
CSRC = ROOT / "csrc"

# Contraction stays off and errno is not set: a kernel must give the same bits at every level (fused multiply-adds
# appear only where a source writes them), and sqrt must be the instruction.
HOST_FLAGS = [
    "-std=c++17",
    "-O3",
    "-fPIC",
    "-fvisibility=hidden",
    "-ffp-contract=off",
    "-fno-math-errno",
    "-Wall",
]
X86_LEVELS = {
    "baseline": [],
    "avx2": ["-mavx2", "-mfma", "-mf16c"],
    "avx512": ["-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mfma", "-mprefer-vector-width=512"],
}
# wgmma needs the "a" target, which runs on its own chip alone; the others run on every later minor version.
DEFAULT_ARCHS = ["80", "90a", "100", "120"]


@dataclass(frozen=True)
class Unit:
    """One object file and the command that makes it."""

    source: Path
    output: Path
    command: list[str]


class NativeBuild(build_ext):
    """Compiles csrc with the host compiler, and with nvcc where there is one."""

    def build_extension(self, ext: Extension) -> None:
        """Compile every unit and link them into the one shared library."""
        out = Path(self.get_ext_fullpath(ext.name)).resolve()
        temp = Path(self.build_temp).resolve()
        temp.mkdir(parents=True, exist_ok=True)
        out.parent.mkdir(parents=True, exist_ok=True)
        cuda = find_cuda()
        units = host_units(temp, cuda) + (cuda_units(temp, cuda) if cuda else [])
        link = link_command(out, [unit.output for unit in units], cuda)
        ninja = shutil.which("ninja") or ninja_of_wheel()
        if ninja:
            run_ninja(ninja, temp, units, out, link)
        else:
            run_plainly(units, link)


def host_compiler() -> list[str]:
    """The C++ compiler as a command; CXX wins over what Python was built with."""
    command = os.environ.get("CXX") or sysconfig.get_config_var("CXX") or "c++"
    words = shlex.split(command)
    if shutil.which(words[0]) is None:
        found = next((name for name in ("c++", "g++", "clang++") if shutil.which(name)), None)
        if found is None:
            raise SystemExit("pyeff: no C++17 compiler found; install g++ or clang++, or name one in CXX.")
        words = [found]
    return words


def openmp_flags() -> list[str]:
    """Flags for OpenMP on Linux; elsewhere kernels run on one thread."""
    return ["-fopenmp"] if sys.platform.startswith("linux") else []


def host_units(temp: Path, cuda: Cuda | None) -> list[Unit]:
    """Commands for the bindings and for every CPU kernel at every level of this processor family."""
    import pybind11

    x86 = platform.machine().lower() in {"x86_64", "amd64"}
    levels = X86_LEVELS if x86 else {"baseline": []}
    defines = [f"-DPYEFF_LEVEL_{name.upper()}" for name in levels]
    defines.append(f'-DPYEFF_VERSION="{project_version()}"')
    if cuda:
        defines += ["-DPYEFF_CUDA", f'-DPYEFF_CUDA_VERSION="{cuda.version}"']
        defines.append(f'-DPYEFF_CUDA_ARCHS="{" ".join(cuda.archs)}"')
    base = [*host_compiler(), *HOST_FLAGS, *openmp_flags(), f"-I{CSRC}"]
    includes = [f"-I{sysconfig.get_path('include')}", f"-I{pybind11.get_include()}"]
    units = []
    for source in sorted(CSRC.glob("*.cpp")):
        output = temp / f"{source.stem}.o"
        units.append(Unit(source, output, [*base, *includes, *defines, "-c", str(source), "-o", str(output)]))
    for source in sorted((CSRC / "cpu").glob("*.cpp")):
        for level, flags in levels.items():
            output = temp / f"{source.stem}.{level}.o"
            command = [*base, *flags, f"-DPYEFF_LEVEL={level}", f"-DPYEFF_AT_{level.upper()}"]
            units.append(Unit(source, output, [*command, "-c", str(source), "-o", str(output)]))
    return units


@dataclass(frozen=True)
class Cuda:
    """A CUDA toolkit and the architectures built with it."""

    nvcc: str
    top: Path
    version: str
    archs: list[str]


def find_cuda() -> Cuda | None:
    """The toolkit to build with, or None with one line that says why."""
    wish = os.environ.get("PYEFF_BUILD_CUDA", "auto").lower()
    if wish not in {"auto", "0", "1"}:
        raise SystemExit(f"pyeff: PYEFF_BUILD_CUDA must be auto, 1 or 0, not {wish!r}.")
    if wish == "0":
        print("pyeff: CUDA sources left out (PYEFF_BUILD_CUDA=0).")
        return None
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    nvcc = os.environ.get("NVCC") or shutil.which("nvcc")
    if nvcc is None and home and (Path(home) / "bin" / "nvcc").exists():
        nvcc = str(Path(home) / "bin" / "nvcc")
    if nvcc is None:
        if wish == "1":
            raise SystemExit(
                "pyeff: PYEFF_BUILD_CUDA=1 but nvcc was not found; install the CUDA toolkit and put nvcc on PATH, "
                "or set NVCC or CUDA_HOME."
            )
        print("pyeff: nvcc not found, CUDA sources left out; on a GPU the Triton kernels and torch are used.")
        return None
    # nvcc may be a wrapper script, so its own dry run tells where the toolkit lies.
    dry = subprocess.run([nvcc, "--dryrun", "-x", "cu", os.devnull], capture_output=True, text=True)
    top = re.search(r"^#\$ TOP=(.+)$", dry.stdout + dry.stderr, re.MULTILINE)
    release = subprocess.run([nvcc, "--version"], capture_output=True, text=True).stdout
    version = re.search(r"release (\d+\.\d+)", release)
    if top is None or version is None:
        if wish == "1":
            raise SystemExit(f"pyeff: {nvcc} does not answer like nvcc; set NVCC to the CUDA compiler.")
        print(f"pyeff: {nvcc} does not answer like nvcc, CUDA sources left out.")
        return None
    known = subprocess.run([nvcc, "--list-gpu-code"], capture_output=True, text=True).stdout.split()
    wanted = re.findall(r"\d+a?", os.environ.get("PYEFF_CUDA_ARCHS", "")) or DEFAULT_ARCHS
    archs = [arch for arch in wanted if f"sm_{arch.rstrip('a')}" in known]
    if not archs:
        raise SystemExit(f"pyeff: {nvcc} knows none of the architectures {' '.join(wanted)}.")
    return Cuda(nvcc, Path(top.group(1).strip()).resolve(), version.group(1), archs)


def cuda_units(temp: Path, cuda: Cuda) -> list[Unit]:
    """Commands for the CUDA sources: machine code for each architecture, PTX of the oldest and the newest."""
    targets = [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in cuda.archs]
    # The "a" targets are not forward compatible, so PTX comes from the plain ones.
    plain = sorted({int(arch) for arch in cuda.archs if arch.isdigit()})
    targets += [f"-gencode=arch=compute_{arch},code=compute_{arch}" for arch in sorted({*plain[:1], *plain[-1:]})]
    flags = ["-std=c++17", "-O3", "--fmad=false", "-Xcompiler=-fPIC,-fvisibility=hidden,-ffp-contract=off"]
    if tuple(map(int, cuda.version.split("."))) >= (12, 8):
        flags.append("--compress-mode=size")
    host = ["-ccbin", host_compiler()[0]]
    units = []
    for source in sorted((CSRC / "cuda").glob("*.cu")):
        output = temp / f"{source.stem}.cu.o"
        command = [cuda.nvcc, *host, *flags, *targets, f"-I{CSRC}", "-c", str(source), "-o", str(output)]
        units.append(Unit(source, output, command))
    return units


def link_command(out: Path, objects: list[Path], cuda: Cuda | None) -> list[str]:
    """The shared library; the CUDA runtime is linked statically, so that it loads without a driver."""
    command = [*host_compiler(), "-shared", *openmp_flags(), "-o", str(out), *map(str, objects)]
    if sys.platform == "darwin":
        command += ["-undefined", "dynamic_lookup"]
    else:
        command += ["-Wl,--as-needed", "-s"]
    if cuda:
        places = [cuda.top / "lib64", cuda.top / "lib", *sorted((cuda.top / "targets").glob("*/lib"))]
        place = next((p for p in places if (p / "libcudart_static.a").exists()), None)
        if place is None:
            raise SystemExit(
                f"pyeff: libcudart_static.a not found under {cuda.top}; install the CUDA runtime libraries."
            )
        command += [f"-L{place}", "-lcudart_static", "-ldl", "-lrt", "-lpthread"]
    return command


def project_version() -> str:
    """The version in pyproject.toml."""
    found = re.search(r'^version = "([^"]+)"', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
    return found.group(1) if found else "0"


def ninja_of_wheel() -> str | None:
    """The ninja of the PyPI wheel, whose folder need not be on PATH."""
    try:
        import ninja
    except ImportError:
        return None
    path = Path(ninja.BIN_DIR) / "ninja"
    return str(path) if path.exists() else None


def run_ninja(ninja: str, temp: Path, units: list[Unit], out: Path, link: list[str]) -> None:
    """Write build.ninja and run it: only what changed is compiled again."""

    def quoted(path: Path) -> str:
        return str(path).replace("$", "$$").replace(" ", "$ ").replace(":", "$:")

    lines = [
        "rule compile\n  command = $cmd -MMD -MF $out.d\n  depfile = $out.d\n  deps = gcc\n",
        "rule link\n  command = $cmd\n",
    ]
    for unit in units:
        lines.append(f"build {quoted(unit.output)}: compile {quoted(unit.source)}")
        lines.append(f"  cmd = {shlex.join(unit.command).replace('$', '$$')}")
    lines.append(f"build {quoted(out)}: link {' '.join(quoted(unit.output) for unit in units)}")
    lines.append(f"  cmd = {shlex.join(link).replace('$', '$$')}\n")
    (temp / "build.ninja").write_text("\n".join(lines))
    jobs = [f"-j{os.environ['MAX_JOBS']}"] if os.environ.get("MAX_JOBS") else []
    subprocess.run([ninja, "-C", str(temp), *jobs], check=True)


def run_plainly(units: list[Unit], link: list[str]) -> None:
    """Without ninja: compile everything, as many files at a time as there are processors."""
    with ThreadPoolExecutor(int(os.environ.get("MAX_JOBS") or os.cpu_count() or 1)) as pool:
        list(pool.map(lambda unit: subprocess.run(unit.command, check=True), units))
    subprocess.run(link, check=True)


setup(
    ext_modules=[Extension("pyeff._native", sources=["csrc/bindings.cpp"])],
    cmdclass={"build_ext": NativeBuild},
)
