"""Data: sources of samples, their token ids, packing, and the order in which they are shown."""

from __future__ import annotations

from pyeff.data.order import DataOrder
from pyeff.data.packing import IGNORE_INDEX, LabelPositions, PackedBatch, label_positions, pack, pack_one
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
