"""Data: sources of samples, their token ids, packing, and the order in which they are shown."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pyeff.data.order import DataOrder
    from pyeff.data.packing import (
        IGNORE_INDEX,
        LabelPositions,
        PackedBatch,
        label_positions,
        pack,
        pack_one,
    )
    from pyeff.data.samples import (
        EncodedSample,
        EncodedSamples,
        Sample,
        encode,
        prompt_ids,
        split_disjoint,
        without_prompts_of,
    )
    from pyeff.data.sources import (
        HFDatasetSource,
        JsonlSource,
        ParquetSource,
        ReasoningGymSource,
        ReasoningGymTask,
        Source,
        load_samples,
    )

__all__ = [
    "IGNORE_INDEX",
    "DataOrder",
    "EncodedSample",
    "EncodedSamples",
    "HFDatasetSource",
    "JsonlSource",
    "LabelPositions",
    "PackedBatch",
    "ParquetSource",
    "ReasoningGymSource",
    "ReasoningGymTask",
    "Sample",
    "Source",
    "encode",
    "label_positions",
    "load_samples",
    "pack",
    "pack_one",
    "prompt_ids",
    "split_disjoint",
    "without_prompts_of",
]

_HOME = {
    "pyeff.data.order": ("DataOrder",),
    "pyeff.data.packing": (
        "IGNORE_INDEX",
        "LabelPositions",
        "PackedBatch",
        "label_positions",
        "pack",
        "pack_one",
    ),
    "pyeff.data.samples": (
        "EncodedSample",
        "EncodedSamples",
        "Sample",
        "encode",
        "prompt_ids",
        "split_disjoint",
        "without_prompts_of",
    ),
    "pyeff.data.sources": (
        "HFDatasetSource",
        "JsonlSource",
        "ParquetSource",
        "ReasoningGymSource",
        "ReasoningGymTask",
        "Source",
        "load_samples",
    ),
}


def __getattr__(name: str) -> Any:
    # Describing sources (a configuration does) must not wait for torch, which only packing needs.
    for module, names in _HOME.items():
        if name in names:
            return getattr(importlib.import_module(module), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
