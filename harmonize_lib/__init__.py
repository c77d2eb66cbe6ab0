"""Attributions across architectures: extraction, transfer, harmonization and their evaluation."""

from harmonize_lib.agreement import feature_agreement, rank_agreement, sign_agreement, spearman, ssim, topk_iou
from harmonize_lib.attribution import Attribution, explain, list_methods, refusal
from harmonize_lib.bam import (
    concept_attribution,
    input_dependence_rate,
    input_independence_rate,
    insignificant_patch,
    model_contrast_score,
)
from harmonize_lib.consensus import consensus, list_rules
from harmonize_lib.data import Dataset, load_dataset
from harmonize_lib.decomposition import contextual_decomposition
from harmonize_lib.errors import HarmonizeError
from harmonize_lib.faithfulness import area, deletion, insertion, road
from harmonize_lib.features import feature_image, feature_mask
from harmonize_lib.hierarchy import Hierarchy, hierarchies, hierarchy
from harmonize_lib.localization import average_precision, mask_iou, pointing_game, relevance_mass, relevance_rank
from harmonize_lib.models import Model, list_models, load_model
from harmonize_lib.penalties import explanation_penalty
from harmonize_lib.priors import (
    consensus_prior,
    expected_gradients_penalty,
    graph_prior,
    pixel_prior,
    sparsity_prior,
    training_attributions,
)
from harmonize_lib.statistics import Interval, bootstrap_interval, holm, paired_difference
from harmonize_lib.transfer import family_advantage, held_out_pool, recognition, relative_transfer, transfer_table
from harmonize_lib.transformations import TransformImportance, transform_importance
from harmonize_lib.wavelets import DistilledWavelet, distil_wavelet

__all__ = [
    "Attribution",
    "Dataset",
    "DistilledWavelet",
    "HarmonizeError",
    "Hierarchy",
    "Interval",
    "Model",
    "TransformImportance",
    "area",
    "average_precision",
    "bootstrap_interval",
    "concept_attribution",
    "consensus",
    "consensus_prior",
    "contextual_decomposition",
    "deletion",
    "distil_wavelet",
    "expected_gradients_penalty",
    "explain",
    "explanation_penalty",
    "family_advantage",
    "feature_agreement",
    "feature_image",
    "feature_mask",
    "graph_prior",
    "held_out_pool",
    "hierarchies",
    "hierarchy",
    "holm",
    "input_dependence_rate",
    "input_independence_rate",
    "insertion",
    "insignificant_patch",
    "list_methods",
    "list_models",
    "list_rules",
    "load_dataset",
    "load_model",
    "mask_iou",
    "model_contrast_score",
    "paired_difference",
    "pixel_prior",
    "pointing_game",
    "rank_agreement",
    "recognition",
    "refusal",
    "relative_transfer",
    "relevance_mass",
    "relevance_rank",
    "road",
    "sign_agreement",
    "sparsity_prior",
    "spearman",
    "ssim",
    "topk_iou",
    "training_attributions",
    "transfer_table",
    "transform_importance",
]
