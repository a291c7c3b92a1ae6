"""Code that needs a process of its own: another instruction level, or a peak of memory nobody else has raised."""

from __future__ import annotations

import os
import subprocess
import sys

from pyeff._extension import extension


def output_of(code: str, **environment: str) -> str:
    """What `code` prints."""
    done = subprocess.run(
        [sys.executable, "-c", code], env=os.environ | environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def outputs_at_every_level(code: str) -> set[str]:
    """What `code` prints at each instruction level of this processor; it must not depend on the level."""
    levels = ["baseline", "avx2", "avx512"]
    levels = levels[: levels.index(extension().build_info()["highest_cpu_level"]) + 1]
    asked = "import pyeff._extension\nprint(pyeff._extension.extension().build_info()['cpu_level'])"
    outputs = [output_of(f"{code}\n{asked}", PYEFF_CPU_LEVEL=level).splitlines() for level in levels]
    assert [lines[-1] for lines in outputs] == levels
    return {"\n".join(lines[:-1]) for lines in outputs}
