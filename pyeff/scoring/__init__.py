"""What a sample is worth: GraNd, EL2N and their kind as resumable tables, and a pool scored in one forward pass."""

from __future__ import annotations

from pyeff.scoring.el2n import EL2N
from pyeff.scoring.feature_store import FeatureStore
from pyeff.scoring.features import Features, read_features
from pyeff.scoring.gradients import GradientSketches
from pyeff.scoring.grand import GraNd
from pyeff.scoring.influence import LESS, TracIn
from pyeff.scoring.last_layer import LastLayerGraNd
from pyeff.scoring.method import FeatureMethod, ScoreMethod
from pyeff.scoring.perplexity import Perplexity
from pyeff.scoring.pool import FIELDS, PoolScores, answer_embeddings, cosine_similarity, score_batches
from pyeff.scoring.scores import Scores, average
from pyeff.scoring.similarity import EmbeddingSimilarity, HiddenStates, RDSPlus, TextEmbeddings
from pyeff.scoring.store import read_scores
from pyeff.scoring.subspace import SubspaceSimilarities
from pyeff.scoring.targets import TargetSimilarities, target_scores
from pyeff.scoring.texts import BM25, RandomScore
from pyeff.scoring.training_states import TrainingState, WeightedSum
from pyeff.scoring.zeroth_order import zeroth_order_slopes

__all__ = [
    "BM25",
    "EL2N",
    "FIELDS",
    "LESS",
    "EmbeddingSimilarity",
    "FeatureMethod",
    "FeatureStore",
    "Features",
    "GraNd",
    "GradientSketches",
    "HiddenStates",
    "LastLayerGraNd",
    "Perplexity",
    "PoolScores",
    "RDSPlus",
    "RandomScore",
    "ScoreMethod",
    "Scores",
    "SubspaceSimilarities",
    "TargetSimilarities",
    "TextEmbeddings",
    "TracIn",
    "TrainingState",
    "WeightedSum",
    "answer_embeddings",
    "average",
    "cosine_similarity",
    "read_features",
    "read_scores",
    "score_batches",
    "target_scores",
    "zeroth_order_slopes",
]
