from __future__ import annotations

import subprocess
import sys


def test_the_governor_works_where_torch_cannot_be_imported():
    script = """
import sys
for name in ("torch", "transformers", "triton", "matplotlib"):
    sys.modules[name] = None  # any import of it fails
from pyeff.governor import GovernorPolicy, Observation
assert not {"numpy", "scipy"} & set(sys.modules), "importing the governor loads a numerical library"
check = Observation(step=1, spent=10, budget=100, unit="tokens", anchors_before=(2.0, 3.0), anchors_now=(1.5, 2.6),
                    spent_before=5, refresh_cost=5, cooldown_cost=20)
assert GovernorPolicy().decide(check).action == "REFRESH"
"""
    subprocess.run([sys.executable, "-c", script], check=True)
