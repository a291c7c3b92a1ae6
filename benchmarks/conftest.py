"""What every benchmark shares: the device, the report that closes the run, and the results kept by device name."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from timing import Timing, interleaved, interleaved_until_steady

import pyeff

# A target is missed for good beyond this multiple of it; up to there it is printed.
FAILURE = 1.25


@dataclasses.dataclass(frozen=True)
class Result:
    """One line of the report: an operation against its baseline."""

    name: str
    baseline: str
    timings: dict[str, Timing]
    target: float | None
    flops: float | None
    bytes: float | None
    bound: str | None
    peaks: dict[str, int] | None = None
    memory_target: float | None = None

    @property
    def ratio(self) -> Timing:
        return self.timings[self.name].ratio(self.timings[self.baseline])

    @property
    def memory_ratio(self) -> float | None:
        """Peak memory, of which most is the model's and its activations', over the baseline's."""
        return None if self.peaks is None else self.peaks[self.name] / self.peaks[self.baseline]

    @property
    def counts(self) -> bool:
        return self.timings[self.baseline].steady

    def lines(self) -> list[str]:
        """The report: every contender, then what the target says."""
        lines = []
        for name, timing in self.timings.items():
            ratio = timing.ratio(self.timings[self.baseline])
            line = f"  {name:<34} {timing.minimum * 1e3:9.3f} ms (median {timing.median * 1e3:9.3f})"
            line += f"  {ratio.minimum:6.3f} x (median {ratio.median:6.3f})"
            if name == self.name:
                line += self._rate(timing)
            lines.append(line)
        if self.target is not None:
            verdict = "met" if self.ratio.minimum <= self.target else "missed"
            if not self.counts:
                verdict += ", but the baseline was disturbed and this run does not count"
            lines.append(f"  target: <= {self.target} x {self.baseline}: {verdict}")
        if self.peaks is not None and self.memory_ratio is not None:
            line = f"  peak memory {self.peaks[self.name] / 2**20:.0f} MiB, {self.memory_ratio:.4f} x {self.baseline}"
            if self.memory_target is not None:
                line += f"; target: <= {self.memory_target} x: "
                line += "met" if self.memory_ratio <= self.memory_target else "missed"
            lines.append(line)
        return lines

    def _rate(self, timing: Timing) -> str:
        rate = ""
        if self.flops:
            rate += f"  {self.flops / timing.minimum / 1e12:.3f} TFLOP/s"
        if self.bytes:
            rate += f"  {self.bytes / timing.minimum / 1e9:.1f} GB/s"
        if self.bound:
            rate += f"  {100 * self.timings[self.bound].minimum / timing.minimum:.0f} % of {self.bound}"
        return rate


@pytest.fixture(scope="session")
def device() -> str:
    """Where benchmarks run: the GPU if there is one."""
    return "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture
def contest(benchmark: Any, request: pytest.FixtureRequest) -> Callable[..., Result]:
    """Time contenders against each other and keep the result: `contest(name, functions, baseline=..., ...)`.

    `name` is our contender among `functions`; `target` the most its time may be of the baseline's; `flops` and `bytes`
    what one call must do and move; `bound` the contender that does nothing but the unavoidable part. Fails when the
    target is missed by more than a quarter while the baseline was steady, unless it is not `enforced`: a goal that is
    known to be missed on some machines, and printed. On a GPU `memory_target` has both measure their peak memory. With
    --tiny everything runs, and neither times nor targets mean anything.
    """
    tiny = request.config.getoption("--tiny")

    def run(
        name: str,
        functions: dict[str, Callable[[], object]],
        *,
        baseline: str,
        target: float | None = None,
        flops: float | None = None,
        bytes: float | None = None,
        bound: str | None = None,
        pairs: int = 20,
        memory_target: float | None = None,
        enforced: bool = True,
    ) -> Result:
        if tiny:
            timings = interleaved(functions, pairs=1)
        else:
            timings = interleaved_until_steady(functions, baseline=baseline, pairs=pairs)
        peaks = None
        if memory_target is not None and torch.cuda.is_available():
            peaks = {each: _peak_bytes(functions[each]) for each in (baseline, name)}
        result = Result(name, baseline, timings, target, flops, bytes, bound, peaks, memory_target)
        benchmark.extra_info.update(_record(result))
        benchmark.pedantic(functions[name], rounds=3, warmup_rounds=1)
        request.config.stash[_REPORT].append((request.node.name, result))
        if target is not None and enforced and result.counts and not tiny:
            assert result.ratio.minimum <= FAILURE * target, "\n".join(["target missed", *result.lines()])
        return result

    return run


def _peak_bytes(function: Callable[[], object]) -> int:
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    function()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated()


@pytest.fixture
def tiny(request: pytest.FixtureRequest) -> bool:
    """Whether shapes should be toys, to see that a benchmark runs."""
    return bool(request.config.getoption("--tiny"))


def _record(result: Result) -> dict[str, Any]:
    record: dict[str, Any] = {
        "contender": result.name,
        "baseline": result.baseline,
        "ratio": {"minimum": result.ratio.minimum, "median": result.ratio.median},
        "target": result.target,
        "steady": result.counts,
        "seconds": {name: dataclasses.asdict(timing) for name, timing in result.timings.items()},
        "versions": {"pyeff": pyeff.__version__, "torch": torch.__version__},
    }
    if result.flops:
        record["flops"] = result.flops
    if result.bytes:
        record["bytes"] = result.bytes
    if result.peaks is not None:
        record["memory"] = {"peak_bytes": result.peaks, "ratio": result.memory_ratio, "target": result.memory_target}
    return record


_REPORT = pytest.StashKey[list[tuple[str, Result]]]()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--keep-results",
        metavar="DIR",
        type=Path,
        help="write the results that count to DIR/<device>.json; benchmarks/results feeds the tables of the documents",
    )
    parser.addoption("--long", action="store_true", help="also what takes minutes on a CPU, with twenty pairs each")
    parser.addoption("--tiny", action="store_true", help="toy shapes, one round: whether the benchmarks run at all")


def pytest_configure(config: pytest.Config) -> None:
    config.stash[_REPORT] = []


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    report = config.stash[_REPORT]
    if not report:
        return
    terminalreporter.section(f"benchmarks on {device_name()}")
    for node, result in report:
        terminalreporter.line(node)
        for line in result.lines():
            terminalreporter.line(line)
    directory = config.getoption("--keep-results")
    if directory and not config.getoption("--tiny"):
        terminalreporter.line(f"kept in {keep(report, directory)}")


def device_name() -> str:
    """The GPU, or the processor with its instruction level and torch's thread count."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    model = "cpu"
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        found = re.search(r"^model name\s*:\s*(.+)$", cpuinfo.read_text(), re.MULTILINE)
        model = found.group(1) if found else model
    level = pyeff.info().extension.get("cpu level", "no extension").split()[0]
    return f"{model} {level} {torch.get_num_threads()} threads"


def keep(report: list[tuple[str, Result]], directory: Path) -> Path:
    """Add the results that count to the device's file, over those of the same names."""
    path = directory / (re.sub(r"[^a-z0-9]+", "-", device_name().lower()).strip("-") + ".json")
    kept = json.loads(path.read_text()) if path.exists() else {}
    kept |= {node: _record(result) for node, result in report if result.counts}
    directory.mkdir(parents=True, exist_ok=True)
    written = path.with_suffix(".json.new")
    written.write_text(json.dumps(kept, indent=1, sort_keys=True) + "\n")
    written.replace(path)
    return path
