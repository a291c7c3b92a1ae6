"""What the documents say is true: their examples run, their links lead somewhere, their tables are current."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
DOCUMENTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]


def python_blocks() -> list[tuple[str, str]]:
    return [
        (f"{document.name}-{number}", block)
        for document in DOCUMENTS
        for number, block in enumerate(re.findall(r"```python\n(.*?)```", document.read_text(), re.DOTALL))
    ]


@pytest.mark.parametrize("block", [pytest.param(block, id=name) for name, block in python_blocks()])
def test_example_runs(block: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    exec(compile(block, "example", "exec"), {"__name__": "example"})


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_links_lead_to_files_that_exist(document: Path) -> None:
    targets = re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", document.read_text())
    missing = [target for target in targets if not (document.parent / target).exists()]
    assert not missing


def test_files_the_documents_name_exist() -> None:
    for document in DOCUMENTS:
        named = re.findall(
            r"`((?:pyeff|tests|benchmarks|docs|csrc|examples|triton_kernels)/[\w./-]+)`", document.read_text()
        )
        for name in named:
            if any(part in name for part in ("/f.", "test_f.", "bench_f.", "<")):
                continue  # the placeholder of "how to add an operation"
            assert (ROOT / name).exists(), f"{document.name} names {name}"


def test_tables_show_what_the_result_files_hold() -> None:
    import subprocess
    import sys

    check = [sys.executable, "benchmarks/tables.py", "--check"]
    result = subprocess.run(check, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
