"""Write the tables of measured results into the documents, from `benchmarks/results/*.json` and nothing else.

    python benchmarks/tables.py            # rewrite what stands between the markers
    python benchmarks/tables.py --check    # fail if a document is not current

A result that no file holds is shown as "not measured yet".
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
BEGIN, END = "<!-- tables:begin -->", "<!-- tables:end -->"
GPU = "any NVIDIA GPU"
MISSING = "not measured yet"


def load() -> dict[str, dict[str, Any]]:
    """Results by device: the file's name, and a column for GPUs while no file is a GPU's."""
    found = {path.stem: json.loads(path.read_text()) for path in sorted(RESULTS.glob("*.json"))}
    if not any(name.startswith("nvidia") for name in found):
        found[GPU] = {}
    return found


def heading(node: str) -> str:
    """The promise a benchmark is named after, as words: test_a_is_fast[16] becomes "a is fast (16)"."""
    name, _, parameters = node.removeprefix("test_").partition("[")
    return name.replace("_s_", "'s ").replace("_", " ") + (f" ({parameters.rstrip(']')})" if parameters else "")


def cell(result: dict[str, Any] | None, contender: str) -> str:
    """Fastest time and its ratio to the baseline."""
    if result is None or contender not in result["seconds"]:
        return MISSING
    seconds = result["seconds"][contender]["minimum"]
    ratio = seconds / result["seconds"][result["baseline"]]["minimum"]
    return f"{1e3 * seconds:.3g} ms ({ratio:.2f} x)"


def judged(result: dict[str, Any] | None, contender: str) -> str:
    """The cell, in bold with a word where the target is missed."""
    text = cell(result, contender)
    missed = result is not None and result.get("target") and result["ratio"]["minimum"] > result["target"]
    return f"**{text}, missed**" if missed else text


def summary(results: dict[str, dict[str, Any]]) -> str:
    """One row per benchmark that has a target: our time on each device and its ratio to the baseline."""
    devices = list(results)
    lines = [f"| benchmark | against | target | {' | '.join(devices)} |", "|---|---|---|" + "---|" * len(devices)]
    for node, by_device in _by_node(results):
        first = next(result for result in by_device.values() if result)
        if not first.get("target"):
            continue
        cells = " | ".join(judged(by_device[device], first["contender"]) for device in devices)
        lines.append(f"| {heading(node)} | {first['baseline']} | <= {first['target']:.3g} x | {cells} |")
    return "\n".join(lines)


def table(results: dict[str, dict[str, Any]]) -> str:
    """One row per contender, one column per device; ratios are to the contender marked as baseline."""
    devices = list(results)
    lines = [f"| benchmark | contender | {' | '.join(devices)} |", "|---|---|" + "---|" * len(devices)]
    for node, by_device in _by_node(results):
        measured = [result for result in by_device.values() if result]
        contenders = dict.fromkeys(name for result in measured for name in result["seconds"])
        for position, contender in enumerate(contenders):
            name = f"{contender} (baseline)" if contender == measured[0]["baseline"] else contender
            cells = " | ".join(cell(by_device[device], contender) for device in devices)
            lines.append(f"| {heading(node) if position == 0 else ''} | {name} | {cells} |")
    return "\n".join(lines)


def _by_node(results: dict[str, dict[str, Any]]) -> list[tuple[str, dict[str, dict[str, Any] | None]]]:
    nodes = sorted({node for found in results.values() for node in found})
    return [(node, {device: found.get(node) for device, found in results.items()}) for node in nodes]


def rendered(text: str, body: str) -> str:
    """The document with the table between its markers."""
    before, rest = text.split(BEGIN)
    _, after = rest.split(END)
    return f"{before}{BEGIN}\n{body}\n{END}{after}"


def main() -> int:
    """Rewrite or check every document."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="change nothing; exit 1 if a document is not current")
    check = parser.parse_args().check
    results = load()
    bodies = {ROOT / "README.md": summary(results), ROOT / "docs" / "benchmarks.md": table(results)}
    stale = []
    for document, body in bodies.items():
        text = document.read_text()
        current = rendered(text, body)
        if current != text:
            stale.append(document.name)
            if not check:
                document.write_text(current)
    if check and stale:
        print(f"not current: {', '.join(stale)}; run python benchmarks/tables.py", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
