"""What a sample is worth: scores of a pool from forward passes alone."""

from __future__ import annotations

from pyeff.scoring.pool import FIELDS, PoolScores, answer_embeddings, cosine_similarity, score_batches

__all__ = ["FIELDS", "PoolScores", "answer_embeddings", "cosine_similarity", "score_batches"]
