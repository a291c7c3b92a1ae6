"""The build: from nothing but a compiler, with and without CUDA, and honest about what it left out."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from pyeff._extension import extension

ROOT = Path(__file__).resolve().parent.parent


def supported_levels() -> list[str]:
    flags = Path("/proc/cpuinfo").read_text().split("flags", 1)[-1].split("\n", 1)[0].split()
    levels = ["baseline"]
    if {"avx2", "fma"} <= set(flags):
        levels.append("avx2")
    if {"avx512f", "avx512bw", "avx512dq", "avx512vl"} <= set(flags):
        levels.append("avx512")
    return levels


def build_info(**env: str) -> subprocess.CompletedProcess[str]:
    code = "from pyeff._extension import extension; print(extension().build_info()['cpu_level'])"
    environment = {**os.environ, **env}
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, cwd=ROOT)


def test_highest_supported_cpu_level_is_taken() -> None:
    assert build_info(PYEFF_CPU_LEVEL="").stdout.strip() == supported_levels()[-1]


@pytest.mark.parametrize("level", supported_levels())
def test_cpu_level_can_be_forced(level: str) -> None:
    assert build_info(PYEFF_CPU_LEVEL=level).stdout.strip() == level


def test_unknown_cpu_level_is_refused_in_one_sentence() -> None:
    result = build_info(PYEFF_CPU_LEVEL="sse9")
    assert result.returncode != 0
    assert "PYEFF_CPU_LEVEL must be baseline, avx2 or avx512, not 'sse9'" in result.stderr


def test_extension_with_cuda_loads_without_a_driver() -> None:
    import torch

    if extension().build_info()["cuda"] is None:
        assert not hasattr(extension(), "cuda_problem")
        assert shutil.which("nvcc") is None or os.environ.get("PYEFF_BUILD_CUDA") == "0"
    elif not torch.cuda.is_available():
        assert "CUDA device" in extension().cuda_problem()
    else:
        assert extension().cuda_problem() is None


def setup_py(tmp_path: Path, *, path: str | None = None, **env: str) -> subprocess.CompletedProcess[str]:
    """Run the build alone, into a folder of its own."""
    environment = {**os.environ, **env}
    if path is not None:
        environment["PATH"] = path
    command = [sys.executable, "setup.py", "build_ext", "--build-lib", str(tmp_path), "--build-temp", str(tmp_path)]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment)


def tools_without_nvcc(tmp_path: Path) -> str:
    """A PATH with the compiler's tools on it and no nvcc."""
    folder = tmp_path / "tools"
    folder.mkdir()
    for tool in ("g++", "gcc", "c++", "cc", "as", "ld", "ar", "ninja", "sh"):
        found = shutil.which(tool)
        if found:
            (folder / tool).symlink_to(found)
    return str(folder)


def test_demanding_cuda_without_nvcc_is_an_error_with_a_remedy(tmp_path: Path) -> None:
    result = setup_py(tmp_path, path=tools_without_nvcc(tmp_path), PYEFF_BUILD_CUDA="1", NVCC="", CUDA_HOME="")
    assert result.returncode != 0
    assert "PYEFF_BUILD_CUDA=1 but nvcc was not found" in result.stderr
    assert "Traceback" not in result.stderr


def test_unknown_wish_for_cuda_is_refused(tmp_path: Path) -> None:
    result = setup_py(tmp_path, PYEFF_BUILD_CUDA="maybe")
    assert result.returncode != 0
    assert "PYEFF_BUILD_CUDA must be auto, 1 or 0, not 'maybe'" in result.stderr


def test_plain_install_without_torch_or_nvcc_works_from_another_directory(tmp_path: Path) -> None:
    """A plain offline install into an empty target; then the kernels run from another directory."""
    site = tmp_path / "site"
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-build-isolation", "--no-deps", "--no-index"]
    environment = {**os.environ, "PATH": tools_without_nvcc(tmp_path), "NVCC": "", "CUDA_HOME": ""}
    source = tmp_path / "source"
    ignored = shutil.ignore_patterns(".git", ".venv", "build", "runs", "*.so", "*.egg-info", ".*_cache", "__pycache__")
    shutil.copytree(ROOT, source, ignore=ignored)
    install = subprocess.run(
        [*command, "--target", str(site), str(source)], capture_output=True, text=True, env=environment, cwd=tmp_path
    )
    assert install.returncode == 0, install.stderr
    code = f"""
import sys
sys.path.insert(0, {str(site)!r})
import torch, pyeff, pyeff.triton_kernels
from pyeff._extension import extension
assert pyeff.__file__.startswith({str(site)!r}), pyeff.__file__
assert pyeff.triton_kernels.__file__.startswith({str(site)!r}), pyeff.triton_kernels.__file__
assert extension().build_info()["cuda"] is None
scores = pyeff.linear_cross_entropy_scores(torch.ones(4, 8), torch.ones(16, 8), torch.zeros(4, dtype=torch.long))
assert torch.isfinite(scores.nll).all()
assert pyeff.explain("linear_cross_entropy_scores", torch.ones(4, 8)).impl == "cpu"
print("ok")
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path)
    assert result.stdout.strip() == "ok", result.stderr
