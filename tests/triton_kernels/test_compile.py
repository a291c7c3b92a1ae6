"""Every kernel at its shipped configurations, compiled for GPUs that are not here.

The interpreter says whether a kernel is right; this says whether it would be fast: no spills, shared memory that fits,
tensor cores, wide copies, and several of them in flight. One subprocess for each architecture, because this process
interprets.
"""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("triton", reason="triton is not installed")

# Shared memory one program may take, in bytes, and the tensor-core instruction of the architecture.
ARCHITECTURES = {
    80: (163 << 10, "mma.sync"),
    90: (227 << 10, "wgmma.mma_async"),
    100: (227 << 10, "tcgen05.mma"),
}
ATTENTION = {"attend": True, "key_gradients": True}
DETERMINISTIC = ATTENTION | {"query_gradients": True}
# What is expected of the kernels that multiply matrices; True: on the tensor cores.
PRODUCTS = {
    "attention.bf16_64": ATTENTION,
    # Two accumulators of 256 columns leave `key_gradients` too few keys for wgmma.
    "attention.bf16_256": {"attend": True},
    "attention.bf16_packed": ATTENTION,
    "attention.bf16_softcap": ATTENTION,
    "attention.fp16_80_window": ATTENTION,
    "attention.fp32": dict.fromkeys(ATTENTION, False),
    "attention.bf16_64_deterministic": DETERMINISTIC,
    "attention.bf16_256_deterministic": {"attend": True, "query_gradients": True},
    "attention.bf16_packed_deterministic": DETERMINISTIC,
    "attention.bf16_softcap_deterministic": DETERMINISTIC,
    "attention.fp16_80_window_deterministic": DETERMINISTIC,
    "attention.fp32_deterministic": dict.fromkeys(DETERMINISTIC, False),
    "attention.descriptors": ATTENTION,
    "attention.descriptors_packed": ATTENTION,
    "linear_cross_entropy_scores.bf16": {"reduce_logits": True},
    "linear_cross_entropy_scores.bf16_softcap": {"reduce_logits": True},
    "linear_cross_entropy_scores.fp16_ragged": {"reduce_logits": True},
    "linear_cross_entropy_scores.wide_offsets": {"reduce_logits": True},
    "linear_cross_entropy_scores.fp32": {"reduce_logits": False},
    "linear_cross_entropy_grad.bf16": {"store_logit_grads": True},
    "linear_cross_entropy_grad.bf16_softcap": {"store_logit_grads": True},
    "linear_cross_entropy_grad.fp16_ragged": {"store_logit_grads": True},
    "linear_cross_entropy_grad.wide_offsets": {"store_logit_grads": True},
    "linear_cross_entropy_grad.fp32": {"store_logit_grads": False},
    "linear_grad.bf16": {"accumulate_samples": True},
    "linear_grad.bf16_reference": {"accumulate_samples": True},
    "linear_grad.fp16_ragged": {"accumulate_samples": True},
    "linear_grad.fp32": {"accumulate_samples": False},
    "linear_grad.fp32_reference": {"accumulate_samples": False},
    "linear_grad.descriptors": {"accumulate_samples": True},
    "linear_grad.narrow": {"accumulate_samples": True},
    "linear_grad.bf16_sketch": {"accumulate_samples": True},
    "linear_grad.bf16_sketch_2048": {"accumulate_samples": True},
    "linear_grad.bf16_sketch_adamw": {"accumulate_samples": True},
    "linear_grad.fp32_sketch": {"accumulate_samples": False},
    "linear_grad.panel": {},
    "linear_grad.panel_reference": {},
    "directional_scores.bf16": {"meet_rows": True},
    "directional_scores.fp16_ragged": {"meet_rows": True},
    "directional_scores.bf16_64": {"meet_rows": True},
    "directional_scores.bf16_16": {"meet_rows": True},
    "directional_scores.fp32": {"meet_rows": False},
    "gram_norms.bf16": {"multiply_grams": True},
    "gram_norms.bf16_short": {"multiply_grams": True},
    "gram_norms.fp16_ragged": {"multiply_grams": True},
    "gram_norms.fp32": {"multiply_grams": False},
    "vector_grad.bf16": {},
    "vector_grad.bf16_offset": {},
    "vector_grad.fp32": {},
    "norm_layer_grad.bf16": {},
    "norm_layer_grad.bf16_center": {},
    "norm_layer_grad.bf16_kept": {},
    "norm_layer_grad.fp32_8192": {},
    "norm_layer_grad.fp32_16384": {},
    "norm_layer_grad.bf16_16384": {},
    "norm_layer_grad.fp32_64": {},
    "sketch_grads.bf16": {},
    "sketch_grads.fp32_adamw": {},
    "embedding_grad.bf16": {},
    "embedding_grad.fp32": {},
}
# Kernels that stream a number for each row beside their tiles.
WITH_VECTORS = ["key_gradients"]
# Shapes too small to be fast; they must compile all the same.
COMPILED_ONLY = [
    "directional_scores.ones",
    "linear_cross_entropy_grad.ones",
    "linear_cross_entropy_scores.ones",
    "sketch_grads.ones",
]


@functools.cache
def compiled(
    capability: int, cases: tuple[str, ...] = (*PRODUCTS, *COMPILED_ONLY)
) -> dict[str, dict[str, dict[str, Any]]]:
    script = Path(__file__).with_name("compile_kernels.py")
    # 1 is the default until Triton 3.10 turns it off; set, so that all versions compile the same arithmetic.
    environment = os.environ | {"TRITON_INTERPRET": "0", "TRITON_DEFAULT_FP_FUSION": "1"}
    command = [sys.executable, str(script), str(capability), *cases]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize("capability", ARCHITECTURES)
@pytest.mark.parametrize("case", [*PRODUCTS, *COMPILED_ONLY])
def test_kernels_fit_shared_memory(case: str, capability: int) -> None:
    shared_limit, _ = ARCHITECTURES[capability]
    kernels = compiled(capability)[case]
    assert kernels, "nothing was launched"
    for name, facts in kernels.items():
        assert facts["shared_bytes"] <= shared_limit, name


@pytest.mark.parametrize("capability", ARCHITECTURES)
@pytest.mark.parametrize("case", PRODUCTS)
def test_kernels_keep_everything_in_registers(case: str, capability: int) -> None:
    for name, facts in compiled(capability)[case].items():
        assert facts["local_bytes"] == 0, f"{name} spills at {facts['registers']} registers"


@pytest.mark.parametrize("capability", ARCHITECTURES)
@pytest.mark.parametrize("case", PRODUCTS)
def test_products_are_pipelined_on_the_tensor_cores(case: str, capability: int) -> None:
    _, tensor_core = ARCHITECTURES[capability]
    for name, on_tensor_cores in PRODUCTS[case].items():
        facts = compiled(capability)[case][name]
        assert facts["tensor_core"] == (tensor_core if on_tensor_cores else None), name
        assert facts["copies_in_flight"] >= 2 or facts["bulk_copies"], f"{name} waits for every copy"
        # A thread's share of a short vector is less than sixteen bytes.
        assert not facts["narrow_copies"] or (name in WITH_VECTORS and facts["wide_copies"]), name


def test_attention_fits_gpus_with_less_shared_memory() -> None:
    cases = ("attention.bf16_packed", "attention.bf16_256", "attention.bf16_256_deterministic")
    for case, kernels in compiled(86, cases).items():
        for name, facts in kernels.items():
            assert facts["shared_bytes"] <= 99 << 10, f"{case}: {name}"


@pytest.mark.parametrize("case", ["attention.descriptors", "attention.descriptors_packed"])
def test_descriptors_become_bulk_copies(case: str) -> None:
    assert compiled(90)[case]["attend"]["bulk_copies"]
