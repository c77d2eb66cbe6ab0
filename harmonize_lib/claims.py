"""The claims ledger: criteria stated before the run, verdicts computed by them."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

import pandas as pd

from harmonize_lib.errors import unknown
from harmonize_lib.statistics import Interval
from harmonize_lib.storage import sha256_bytes, write_atomic

REPRODUCED, PARTLY, NOT, UNTESTABLE = "reproduced", "partly", "not reproduced", "not testable here"
COLUMNS = ("id", "source", "reported", "measured", "criterion", "estimate", "low", "high", "n", "verdict", "notebook")


class Claim(NamedTuple):
    """A claim with the rule that judges it; ``judge`` sees the interval alone."""

    title: str
    source: str
    reported: str
    measured: str
    criterion: str
    judge: Callable[[Interval], str]

    @property
    def said(self) -> tuple[str, str, str, str]:
        """What the ledger says of it before the run."""
        return self.source, self.reported, self.measured, self.criterion


def _above(full: float, part: float) -> Callable[[Interval], str]:
    return lambda i: REPRODUCED if i.low > full else PARTLY if i.low > part else NOT


def _mean_below(full: float) -> Callable[[Interval], str]:
    return lambda i: REPRODUCED if i.high < full else PARTLY if i.mean < full else NOT


def _positive(i: Interval) -> str:
    return REPRODUCED if i.low > 0 else PARTLY if i.mean > 0 else NOT


def _negative(i: Interval) -> str:
    return REPRODUCED if i.high < 0 else PARTLY if i.mean < 0 else NOT


def _within(low: float, high: float) -> Callable[[Interval], str]:
    return lambda i: REPRODUCED if low < i.low and i.high < high else PARTLY if low < i.mean < high else NOT


def _below(full: float, part: float) -> Callable[[Interval], str]:
    return lambda i: REPRODUCED if i.high < full else PARTLY if i.high < part else NOT


SIGN = "reproduced: the 95 % interval lies {side} 0; partly: only the mean does; else not reproduced"
UNDECIDED = "; undecided, see notebook 07"
KADIR = "Kadir et al. 2023"
BAM = "Yang & Kim 2019"
PROJECT = "this project's question"
ERION = "Erion et al. 2021"
SINGH = "Singh, Ha, Yu 2021"
AUDIT = "Explainability sanity audit (BaurothM)"

CLAIMS: dict[str, Claim] = {
    "transfer": Claim(
        "features transfer across architectures",
        KADIR,
        "Feature attributions can serve as feature detectors across architectures (abstract; no number given)",
        "relative transfer ρ (of the label's probability) between architectures, pooled over pairs and methods",
        "reproduced: lower bound > 0.5; partly: lower bound > 0; else not reproduced",
        _above(0.5, 0.0),
    ),
    "inconsistency": Claim(
        "CNN and transformer maps disagree",
        KADIR,
        "Maps of CNNs and vision transformers trained on the same data are inconsistent (author's summary)",
        "Spearman of a CNN's map with a transformer's minus Spearman of two seeds of one architecture",
        SIGN.format(side="below"),
        _negative,
    ),
    "selectivity": Claim(
        "Grad-CAM is less selective",
        KADIR,
        "Coarse-resolution methods have low spatial selectivity (as citing work reports it)",
        "spatial selectivity of Grad-CAM minus the mean of the gradient methods",
        SIGN.format(side="below"),
        _negative,
    ),
    "family": Claim(
        "better transfer within a family",
        PROJECT,
        "Features travel better inside a family (CNN, transformer) than across",
        "family advantage: mean ρ within minus across",
        SIGN.format(side="above"),
        _positive,
    ),
    "harmonized_detects": Claim(
        "consensus beats one random other",
        KADIR,
        "Features can be harmonized across architectures trained on the same data (abstract; no number given)",
        "recognition by a held-out architecture: consensus of the others minus a random single other model",
        SIGN.format(side="above"),
        _positive,
    ),
    "harmonized_beats_best": Claim(
        "consensus beats the best other",
        PROJECT,
        "The consensus of others beats the best single other model on a held-out architecture",
        "recognition by a held-out architecture: consensus of the others minus the best single other model",
        SIGN.format(side="above"),
        _positive,
    ),
    "harmonized_beats_edges": Claim(
        "consensus beats an edge filter",
        PROJECT,
        "The consensus of others finds features better than an edge filter, which knows no network",
        "recognition by a held-out architecture: consensus of the others minus edges",
        SIGN.format(side="above"),
        _positive,
    ),
    "harmonized_beats_own": Claim(
        "consensus beats the own map",
        PROJECT,
        "The consensus of others finds features a held-out architecture recognizes better than its own map's",
        "recognition by a held-out architecture: consensus of the others minus its own map",
        SIGN.format(side="above"),
        _positive,
    ),
    "harmonized_localizes": Claim(
        "consensus finds the object better",
        KADIR,
        "Harmonized attributions improve interpretability (abstract; no number given)",
        "relevance rank against the object mask: consensus of the others minus the held-out model's own map",
        SIGN.format(side="above"),
        _positive,
    ),
    "pool_size": Claim(
        "a larger pool is better",
        PROJECT,
        "A larger pool makes a better consensus",
        "recognition by a held-out architecture: full pool minus pools of two",
        SIGN.format(side="above"),
        _positive,
    ),
    "detectors": Claim(
        "best method beats controls on the object",
        KADIR,
        "Attributions work as feature detectors (abstract; no number given)",
        "relevance rank against the object mask: best method minus the best of center, edges and random",
        SIGN.format(side="above"),
        _positive,
    ),
    "eg_complete": Claim(
        "EG is complete (slope)",
        ERION,
        "Expected gradients are complete: they sum to f(x) minus the mean output over references (axiom)",
        "slope of log completeness gap over log number of references, independent draws",
        "reproduced: the 95 % interval lies in (-0.6, -0.4); partly: the mean does; else not reproduced",
        _within(-0.6, -0.4),
    ),
    "eg_one_draw": Claim(
        "EG: one draw a step suffices",
        ERION,
        "One draw per step suffices: dependence gone after about 68 epochs, with five draws after about 59 (figure)",
        "epochs until the dependence is gone: one draw per step over five draws, same seeds",
        "reproduced: upper bound < 1.5; partly: upper bound < 5; else not reproduced",
        _below(1.5, 5),
    ),
    "eg_gradients_saturate": Claim(
        "gradient penalty leaves dependence",
        ERION,
        "A penalty on gradients does not remove the dependence: about .16 is left after 200 epochs (figure)",
        "dependence left after the last epoch: penalty on gradients minus penalty on expected gradients, one draw",
        "reproduced: lower bound > 0.1; partly: lower bound > 0; else not reproduced",
        _above(0.1, 0.0),
    ),
    "eg_benchmark": Claim(
        "EG beats IG on most metrics",
        ERION,
        "Expected gradients beat integrated gradients on 17 of 18 metrics (Correlated Groups 60, p = 7.2e-5)",
        "share of the 18 metrics on which expected gradients score higher than integrated gradients in one network, "
        "mean over networks (the paper counts metrics by their mean; that count is printed too)",
        "reproduced: lower bound > 0.5; partly: only the mean; else not reproduced",
        lambda i: REPRODUCED if i.low > 0.5 else PARTLY if i.mean > 0.5 else NOT,
    ),
    "eg_blindness": Claim(
        "EG sees black pixels",
        ERION,
        "Integrated gradients from a black image cannot see black pixels, expected gradients can (SI, figure 3)",
        "mean |expected gradients| on black pixels over that elsewhere; integrated gradients from black give 0",
        "reproduced: lower bound > 1; partly: lower bound > 0.5; else not reproduced",
        _above(1.0, 0.5),
    ),
    "prior_flipped_pixels": Claim(
        "pixel prior against flipped pixels",
        ERION,
        "The pixel prior makes networks robust: MNIST at 10 % flipped pixels .9128 with it, .4905 without (repository)",
        "test accuracy on the notebook's images (8 × 8 digits unless told otherwise) at 10 % flipped pixels: prior on "
        "expected gradients minus baseline, weight by the 1 % rule",
        SIGN.format(side="above"),
        _positive,
    ),
    "prior_gaussian_noise": Claim(
        "pixel prior against Gaussian noise",
        ERION,
        "More than double the accuracy of the baseline at high levels of Gaussian noise (CIFAR-10, text)",
        "test accuracy on the same images at the highest level of Gaussian noise: prior over baseline, same weight",
        "reproduced: lower bound > 2; partly: lower bound > 1; else not reproduced",
        _above(2.0, 1.0),
    ),
    "prior_graph": Claim(
        "graph prior beats none",
        ERION,
        "The graph prior raises R² from about .377 to about .395 (AML drug response; read off a figure; p = .002)",
        "R² on simulated expression: prior with the true graph minus none",
        SIGN.format(side="above"),
        _positive,
    ),
    "prior_graph_random": Claim(
        "true graph beats a random one",
        ERION,
        "It is the graph that helps: a random graph does not (p = .23)",
        "R² on simulated expression: prior with the true graph minus prior with a random graph",
        SIGN.format(side="above"),
        _positive,
    ),
    "prior_sparsity_auc": Claim(
        "sparsity prior predicts best",
        ERION,
        "The sparsity prior predicts best from 100 samples: ROC-AUC about .782, L1 about .759 (NHANES, off a figure)",
        "test ROC-AUC: sparsity prior minus the best of none, L1, L2, sparse group lasso, gradient Gini",
        SIGN.format(side="above"),
        _positive,
    ),
    "prior_sparsity_gini": Claim(
        "sparsity prior is most sparse",
        ERION,
        "The sparsity prior concentrates importance most: Gini about .840, L1 about .714 (NHANES, off a figure)",
        "Gini of mean |expected gradients|: sparsity prior minus the highest of none, L1, L2, sparse group lasso, "
        "gradient Gini",
        SIGN.format(side="above"),
        _positive,
    ),
    "prior_consensus_agrees": Claim(
        "consensus prior: closer to held-out maps",
        PROJECT,
        "Training towards the consensus of others brings maps closer to those of an architecture nobody trained on",
        "Spearman with a held-out architecture's maps on patches: consensus prior minus as many epochs without",
        SIGN.format(side="above"),
        _positive,
    ),
    "prior_consensus_localizes": Claim(
        "consensus prior finds the object",
        PROJECT,
        "Training towards the consensus of others makes maps find the object",
        "relevance rank against the object mask: consensus prior minus as many epochs without",
        SIGN.format(side="above"),
        _positive,
    ),
    "prior_consensus_specific": Claim(
        "consensus prior beats random target",
        PROJECT,
        "It is what the others learned that helps, not a smooth target",
        "relevance rank against the object mask: prior towards trained models' maps minus prior towards random models'",
        SIGN.format(side="above"),
        _positive,
    ),
    "sanity_weights": Claim(
        "all methods depend on weights",
        PROJECT,
        "Maps depend on the weights: randomizing all of them changes every method's maps more than training from "
        "another seed does",
        "Spearman with the maps of a second seed minus with those of the randomized model, mean over ResNet, ViT and "
        "Swin where a method is defined, for the method where it is least",
        SIGN.format(side="above"),
        _positive,
    ),
    "sanity_labels": Claim(
        "all methods depend on labels",
        PROJECT,
        "Maps depend on the labels: a ResNet, a ViT and a Swin that memorized random labels have other maps than "
        "those trained from another seed, by every method",
        "Spearman with the maps of a second seed minus with those of the model of random labels, mean over ResNet, "
        "ViT and Swin where a method is defined, for the method where it is least",
        SIGN.format(side="above"),
        _positive,
    ),
    "sanity_floor": Claim(
        "IG stays off the floor (cascade)",
        AUDIT,
        "Integrated gradients never reach the floor under cascading randomization (Spearman at its end 0.345, 0.389, "
        "0.375 for ResNet50, ViT-B/16, MobileViT-S on ImageNet)",
        "Spearman of integrated gradients before and after all weights are randomized, mean over architectures",
        "reproduced: lower bound > 0.1; partly: lower bound > 0; else not reproduced",
        _above(0.1, 0.0),
    ),
    "harmonized_sanity": Claim(
        "consensus depends on weights, labels",
        PROJECT,
        "Harmonized maps pass the checks of weights and labels by every method defined for two networks or more",
        "Spearman with the consensus of second seeds minus with the consensus of destroyed models (of ResNet, ViT and "
        "Swin, those for which a method is defined), for the method and check where it is least",
        SIGN.format(side="above"),
        _positive,
    ),
    "harmonized_sharpens": Claim(
        "consensus sharpens the weights check",
        PROJECT,
        "Harmonizing sharpens the check of weights rather than dulling it",
        "the difference of sanity_weights for harmonized maps minus the mean of their members, mean over methods",
        SIGN.format(side="above"),
        _positive,
    ),
    "cd_interactions": Claim(
        "CD finds interactions",
        SINGH,
        "Contextual decomposition captures interactions of features (ACD; no number given)",
        "AUC of planted pairs of features among all, by mean |interaction|, over networks of all kinds",
        "reproduced: the 95 % interval lies above 0.95; partly: above 0.5; else not reproduced",
        _above(0.95, 0.5),
    ),
    "cd_over_baselines": Claim(
        "CD beats occlusion, build-up",
        PROJECT,
        "Contextual decomposition finds interactions better than occlusion and build-up",
        "AUC of planted pairs in single inputs: contextual decomposition minus each kind's better baseline",
        SIGN.format(side="above"),
        _positive,
    ),
    "acd_stability": Claim(
        "ACD is more stable under FGSM",
        SINGH,
        "Under FGSM ACD's order of pixels is more stable than agglomerative occlusion's (0.590, 0.131; ImageNet)",
        "Spearman of the order in which pixels enter, before and after FGSM, digits: ACD minus agglomerative occlusion",
        SIGN.format(side="above"),
        _positive,
    ),
    "cdep_color": Claim(
        "CDEP regains color digits",
        SINGH,
        "On ColorMNIST CDEP regains accuracy (31.0 %; 25.1 %, 34.25 % in its code), RRR and no penalty stay at 0.2 %",
        "color digits turned around, λ by shifted validation: CDEP (code's form) minus the best of RRR, EG, none on "
        "shifted validation images",
        SIGN.format(side="above"),
        _positive,
    ),
    "cdep_color_paper": Claim(
        "paper's CDEP regains color digits",
        PROJECT,
        "The paper's form of CDEP, ‖β‖₁, regains accuracy on ColorMNIST",
        "color digits turned around, λ by shifted validation: CDEP (paper's form) minus the best of RRR, EG, none on "
        "shifted validation images",
        SIGN.format(side="above"),
        _positive,
    ),
    "cdep_color_unknown_eg": Claim(
        "CDEP beats EG on color digits",
        ERION,
        "On ColorMNIST CDEP wins (SI B): over EG",
        "color digits turned around, λ by unshifted validation: CDEP (code's form) minus EG",
        SIGN.format(side="above"),
        _positive,
    ),
    "cdep_color_unknown_rrr": Claim(
        "CDEP beats RRR on color digits",
        ERION,
        "On ColorMNIST CDEP wins (SI B): over RRR",
        "color digits turned around, λ by unshifted validation: CDEP (code's form) minus RRR",
        SIGN.format(side="above"),
        _positive,
    ),
    "cdep_decoy": Claim(
        "CDEP regains decoy digits",
        SINGH,
        "On DecoyMNIST CDEP reaches 97.2 % (RRR 99.0 %)",
        "decoy digits turned around, λ by shifted validation: CDEP (code's form) minus none",
        SIGN.format(side="above"),
        _positive,
    ),
    "cdep_decoy_paper": Claim(
        "paper's CDEP regains decoy digits",
        PROJECT,
        "The paper's form of CDEP, ‖β‖₁, regains accuracy on DecoyMNIST",
        "decoy digits turned around, λ by shifted validation: CDEP (paper's form) minus none",
        SIGN.format(side="above"),
        _positive,
    ),
    "eg_rrr_decoy": Claim(
        "EG, RRR beat CDEP on decoys",
        ERION,
        "On DecoyMNIST EG and RRR win over CDEP (SI B)",
        "decoy digits turned around, λ by shifted validation: the worse of EG and RRR on shifted validation images "
        "minus CDEP (code's form)",
        SIGN.format(side="above"),
        _positive,
    ),
    "eg_rrr_decoy_paper": Claim(
        "EG, RRR beat paper's CDEP on decoys",
        PROJECT,
        "On DecoyMNIST EG and RRR win over the paper's form of CDEP",
        "decoy digits turned around, λ by shifted validation: the worse of EG and RRR on shifted validation images "
        "minus CDEP (paper's form)",
        SIGN.format(side="above"),
        _positive,
    ),
    "eg_decoy_unknown": Claim(
        "EG beats CDEP, shift unseen",
        ERION,
        "On DecoyMNIST EG and RRR win over CDEP (SI B): EG",
        "decoy digits turned around, λ by unshifted validation: EG minus CDEP (code's form)",
        SIGN.format(side="above"),
        _positive,
    ),
    "rrr_decoy_unknown": Claim(
        "RRR beats CDEP, shift unseen",
        ERION,
        "On DecoyMNIST EG and RRR win over CDEP (SI B): RRR",
        "decoy digits turned around, λ by unshifted validation: RRR minus CDEP (code's form)",
        SIGN.format(side="above"),
        _positive,
    ),
    "eg_cost": Claim(
        "EG is cheaper than CDEP (MFLOP)",
        ERION,
        "EG and RRR are faster than CDEP (SI B, a whole VGG16): EG",
        "million floating-point operations of a training step, decoy digits, CDEP minus EG; counted, so the interval "
        "is a point",
        "reproduced: above 0; else not reproduced",
        _positive,
    ),
    "rrr_cost": Claim(
        "RRR is cheaper than CDEP (MFLOP)",
        ERION,
        "EG and RRR are faster than CDEP (SI B, a whole VGG16): RRR",
        "million floating-point operations of a training step, decoy digits, CDEP minus RRR; counted, so the interval "
        "is a point",
        "reproduced: above 0; else not reproduced",
        _positive,
    ),
    "trim_recovery": Claim(
        "TRIM finds the coefficient",
        SINGH,
        "TRIM finds the coefficient of a transform that a response depends on (simulation; no number given)",
        "share of simulations in which that coefficient ranks first, the worst of all transforms and methods",
        "reproduced: the 95 % interval lies above 0.9; partly: above 0.5; else not reproduced",
        _above(0.9, 0.5),
    ),
    "awd_recovery": Claim(
        "AWD recovers the wavelet",
        PROJECT,
        "Wavelet distillation recovers the wavelet the data were made with",
        "cosine to the generating filter after the best shift and sign, mean over wavelets",
        "reproduced: the 95 % interval lies above 0.95; partly: above 0.9; else not reproduced",
        _above(0.95, 0.9),
    ),
    "awd_over_db5": Claim(
        "AWD predicts better than db5",
        SINGH,
        "AWD predicts better than a fixed db5 (R² 0.262 against 0.197, clathrin)",
        "simulated signals, R² of least squares on peaks: AWD minus db5",
        SIGN.format(side="above"),
        _positive,
    ),
    "awd_over_teacher": Claim(
        "AWD predicts better than its teacher",
        SINGH,
        "AWD predicts better than the network it was distilled from (R² 0.262 against 0.237, clathrin)",
        "simulated signals, R²: least squares on AWD's peaks minus the teacher",
        SIGN.format(side="above"),
        _positive,
    ),
    "awd_interpretation": Claim(
        "AWD needs the interpretation loss",
        SINGH,
        "Without the interpretation loss AWD predicts worse (R² 0.231 against 0.262, clathrin)",
        "simulated signals, R² of least squares on peaks, sparsity weights by validation: AWD minus the same without "
        "the interpretation loss",
        SIGN.format(side="above"),
        _positive,
    ),
    "awd_compression": Claim(
        "AWD compresses better than db5",
        SINGH,
        "AWD compresses better than db5 (0.574 against 0.704, clathrin)",
        "simulated signals, share of coefficients that hold 95 % of the energy: AWD minus db5",
        SIGN.format(side="below"),
        _negative,
    ),
    "bam_grad_cam_contrast": Claim(
        "Grad-CAM has the highest contrast",
        BAM,
        "Grad-CAM has the highest model contrast score (as citing work reports it; no number at hand)",
        "MCS on ReLU CNNs: Grad-CAM minus the best other method, chosen on the other half of the images",
        SIGN.format(side="above"),
        _positive,
    ),
    "bam_smoothgrad_gradient": Claim(
        "SmoothGrad² beats the gradient",
        BAM,
        "SmoothGrad improves the gradient (as citing work reports it; its SmoothGrad squares the gradients)",
        "MCS on ReLU CNNs: SmoothGrad² minus saliency",
        SIGN.format(side="above"),
        _positive,
    ),
    "bam_smoothgrad_ig": Claim(
        "SmoothGrad improves IG",
        BAM,
        "SmoothGrad improves integrated gradients (as citing work reports it)",
        "MCS on ReLU CNNs: IG + SmoothGrad minus integrated gradients",
        SIGN.format(side="above"),
        _positive,
    ),
    "bam_dependence": Claim(
        "input dependence: Grad-CAM, gradient best",
        BAM,
        "Grad-CAM and the gradient have the fewest false positives on input dependence (as citing work reports it)",
        "false positives 1 − IDR on ReLU CNNs: mean of Grad-CAM and saliency minus the best of the other methods, "
        "chosen on the other half of the images",
        SIGN.format(side="below"),
        _negative,
    ),
    "bam_independence": Claim(
        "input independence: over 80 % wrong",
        BAM,
        "All methods but Grad-CAM and the gradient have over 80 % false positives on input independence "
        "(as citing work reports it)",
        "false positives 1 − IIR on ReLU CNNs (an image's mean over the models it counts on; VGG has almost none): the "
        f"best of the other methods, chosen on the other half of the images{UNDECIDED}",
        "reproduced: lower bound > 0.8; partly: lower bound > 0.5; else not reproduced",
        _above(0.8, 0.5),
    ),
    "bam_rankings": Claim(
        "rankings vary by metric",
        BAM,
        "Rankings of methods vary by metric (as citing work reports it)",
        "Kendall's W of MCS, IDR and IIR on the order of methods, on ReLU CNNs (1 is one order; VGG has almost no "
        f"images of IIR){UNDECIDED}",
        "reproduced: the 95 % interval lies below 0.7, the threshold of strong agreement; partly: only the estimate; "
        "else not reproduced",
        _mean_below(0.7),
    ),
    "bam_relative": Claim(
        "contrast follows accuracy drop",
        BAM,
        "Relative model contrast follows accuracy drop (correlation 0.92 for Grad-CAM, as a review reports it)",
        "Pearson correlation of Grad-CAM's RMCS with accuracy drop over commonality, on ReLU CNNs (ResNet alone); "
        "rests on one commonality, see notebook 07",
        "reproduced: lower bound > 0.8; partly: lower bound > 0; else not reproduced",
        _above(0.8, 0.0),
    ),
    "harmonized_dependence": Claim(
        "consensus: fewer false positives (IDR)",
        PROJECT,
        "Harmonizing lowers false positives on input dependence",
        "1 − IDR: consensus of the others minus its members, each under the same rule alone",
        SIGN.format(side="below"),
        _negative,
    ),
    "harmonized_independence": Claim(
        "consensus: fewer false positives (IIR)",
        PROJECT,
        "Harmonizing lowers false positives on input independence",
        f"1 − IIR: consensus of the others minus its members, each under the same rule alone{UNDECIDED}",
        SIGN.format(side="below"),
        _negative,
    ),
    "harmonized_inherits": Claim(
        "consensus inherits a shortcut",
        PROJECT,
        "Harmonizing inherits a shared shortcut: where all members were trained for scenes, the consensus neglects the "
        "object as they do",
        "neglect by the consensus over that by its members; neglect: 1 − attribution of the object by models for "
        "scenes over that by models for objects",
        "reproduced: lower bound > 0.5; partly: lower bound > 0; else not reproduced",
        _above(0.5, 0.0),
    ),
}

JUDGED: dict[str, tuple[str, ...]] = {  # by the notebook that measures them
    "03_feature_images": ("selectivity",),
    "04_cross_architecture_transfer": (
        "transfer",
        "inconsistency",
        "family",
    ),
    "05_harmonisation": (
        "harmonized_detects",
        "harmonized_beats_best",
        "harmonized_beats_own",
        "harmonized_localizes",
        "harmonized_beats_edges",
        "pool_size",
    ),
    "06_feature_detectors": ("detectors",),
    "07_bam": (
        "bam_grad_cam_contrast",
        "bam_smoothgrad_gradient",
        "bam_smoothgrad_ig",
        "bam_dependence",
        "bam_independence",
        "bam_rankings",
        "bam_relative",
        "harmonized_dependence",
        "harmonized_independence",
        "harmonized_inherits",
    ),
    "08_expected_gradients": (
        "eg_complete",
        "eg_one_draw",
        "eg_gradients_saturate",
        "eg_benchmark",
        "eg_blindness",
    ),
    "09_attribution_priors": (
        "prior_flipped_pixels",
        "prior_gaussian_noise",
        "prior_graph",
        "prior_graph_random",
        "prior_sparsity_auc",
        "prior_sparsity_gini",
        "prior_consensus_agrees",
        "prior_consensus_localizes",
        "prior_consensus_specific",
    ),
    "10_decomposition_and_hierarchies": (
        "cd_interactions",
        "cd_over_baselines",
        "acd_stability",
    ),
    "11_explanation_penalties": (
        "cdep_color",
        "cdep_color_paper",
        "cdep_color_unknown_eg",
        "cdep_color_unknown_rrr",
        "cdep_decoy",
        "cdep_decoy_paper",
        "eg_rrr_decoy",
        "eg_rrr_decoy_paper",
        "eg_decoy_unknown",
        "rrr_decoy_unknown",
        "eg_cost",
        "rrr_cost",
    ),
    "12_transformations_and_wavelets": (
        "trim_recovery",
        "awd_recovery",
        "awd_over_db5",
        "awd_over_teacher",
        "awd_interpretation",
        "awd_compression",
    ),
    "13_reality_checks": (
        "sanity_weights",
        "sanity_labels",
        "sanity_floor",
        "harmonized_sanity",
        "harmonized_sharpens",
    ),
}


def criteria(notebook: str) -> str:
    """Say what a notebook asks, and what decides it, before it has an answer.

    Parameters
    ----------
    notebook : str
        A key of ``JUDGED``.

    Returns
    -------
    str
        Markdown, one line per claim.
    """
    asked = [CLAIMS[name] for name in JUDGED[notebook]]
    lines = [f"- {claim.reported}. Measured by: {claim.measured}. Criterion: {claim.criterion}." for claim in asked]
    return "\n".join(["**What is asked, and what decides it:**", "", *lines])


def write_claims(folder: Path, measured: Mapping[str, Interval]) -> pd.DataFrame:
    """Judge what a notebook measured and write its part of the ledger, with its checksum as ``sha256sum`` writes it.

    Parameters
    ----------
    folder : Path
        The notebook's folder of figures.
    measured : Mapping[str, Interval]
        Claim id to what was measured.

    Returns
    -------
    pd.DataFrame
        One row per claim, columns ``COLUMNS``.

    Raises
    ------
    HarmonizeError
        A claim that is not in ``CLAIMS``.
    """
    rows = []
    for name, interval in measured.items():
        if name not in CLAIMS:
            raise unknown("claim", name, CLAIMS)
        claim = CLAIMS[name]
        verdict = claim.judge(interval) if interval.n > 0 and not math.isnan(interval.mean) else UNTESTABLE
        numbers = [f"{value:.4f}" for value in interval[:3]]
        rows.append([name, *claim.said, *numbers, int(interval.n), verdict, folder.name])
    table = pd.DataFrame(rows, columns=list(COLUMNS))
    text = table.to_csv(index=False, lineterminator="\n")
    write_atomic(folder / "claims.csv", text)
    write_atomic(folder / "claims.sha256", f"{sha256_bytes(text.encode())}  claims.csv\n")
    return table


def gather_claims(figures: Path) -> pd.DataFrame:
    """Read every notebook's claims.

    Parameters
    ----------
    figures : Path
        The figures folder.

    Returns
    -------
    pd.DataFrame
        The ledger as text, in the order of the notebooks.
    """
    parts = [pd.read_csv(path, dtype=str) for path in sorted(figures.glob("[0-9][0-9]_*/claims.csv"))]
    return pd.concat(parts, ignore_index=True) if parts else pd.DataFrame(columns=list(COLUMNS))


def merge_claims(figures: Path) -> pd.DataFrame:
    """Gather every notebook's claims into ``claims.csv`` of the figures folder.

    Parameters
    ----------
    figures : Path
        The figures folder.

    Returns
    -------
    pd.DataFrame
        The ledger, in the order of the notebooks.
    """
    text = ledger_text(figures)
    write_atomic(figures / "claims.csv", text)
    return pd.read_csv(io.StringIO(text), dtype=str)


def ledger_text(figures: Path) -> str:
    """Every notebook's claims as one CSV.

    Parameters
    ----------
    figures : Path
        The figures folder.

    Returns
    -------
    str
        Header and one line per claim, in the order of the notebooks.
    """
    return gather_claims(figures).to_csv(index=False, lineterminator="\n", quoting=csv.QUOTE_MINIMAL)


def in_words(ledger: pd.DataFrame) -> str:
    """Say a notebook's part of the ledger as a list.

    Parameters
    ----------
    ledger : pd.DataFrame
        From :func:`write_claims`.

    Returns
    -------
    str
        Markdown, one line per claim.
    """
    return "\n".join(
        f"- **{row.verdict}**: {row.reported}. Measured: {row.measured}, {row.estimate} [{row.low}, {row.high}], "
        f"n = {row.n}. Criterion: {row.criterion}."
        for row in ledger.itertuples()
    )


def elsewhere_in_words(ledger: pd.DataFrame, folder: Path) -> str:
    """Say which verdicts of a notebook hold in a run of it on other data.

    Parameters
    ----------
    ledger : pd.DataFrame
        From :func:`write_claims`.
    folder : Path
        The figures of the other run.

    Returns
    -------
    str
        Markdown: one line per claim whose data differ, then how many verdicts are the same.
    """
    path = folder / "claims.csv"
    if not path.is_file():
        return f"No run on other data stands in `{folder.parent.name}/{folder.name}`."
    there = pd.read_csv(path, dtype=str).set_index("id")
    lines, count, same = [], 0, 0
    for here in ledger[ledger["id"].isin(there.index)].itertuples():
        other = there.loc[here.id]
        if list(other[["estimate", "low", "high", "n"]]) == [here.estimate, here.low, here.high, str(here.n)]:
            continue  # this part of the notebook has other data, which were the same
        tested = UNTESTABLE not in (here.verdict, other["verdict"])
        same += tested and here.verdict == other["verdict"]
        count += tested
        numbers = f", {other['estimate']} [{other['low']}, {other['high']}], n = {other['n']}" if tested else ""
        verdict = other["verdict"] if tested else "not testable"
        lines.append(f"- {here.reported}: {verdict} there{numbers}; {here.verdict} here, {here.estimate}.")
    told = f"{same} of {count} verdicts that can be tested there are the same."
    return "\n".join(
        [*lines, "", f"{told} A verdict asks for the criterion above, not for the size that was reported."]
    )


def readme_text(text: str, ledger: pd.DataFrame) -> str:
    """Draw the ledger between the marks ``<!-- claims -->`` of the README.

    Parameters
    ----------
    text : str
        The README.
    ledger : pd.DataFrame
        From :func:`merge_claims`.

    Returns
    -------
    str
        The README with this ledger.
    """
    rows = [
        f"| {row.source}: {row.reported} (`{row.id}`) | {row.measured} | "
        f"{row.estimate} [{row.low}, {row.high}], n = {row.n} | **{row.verdict}** | {row.notebook[:2]} |"
        for row in ledger.itertuples()
    ]
    table = [
        "| claim | measured here | estimate [95 % interval] | verdict | notebook |",
        "|---|---|---|---|---|",
        *rows,
    ]
    before, mark, rest = text.partition("<!-- claims -->\n")
    _, end, after = rest.partition("<!-- /claims -->")
    return "".join([before, mark, "\n".join(table), "\n", end, after])


def update_readme(readme: Path, ledger: pd.DataFrame) -> None:
    """Draw the ledger in the README, as :func:`readme_text` does.

    Parameters
    ----------
    readme : Path
        The file.
    ledger : pd.DataFrame
        From :func:`merge_claims`.
    """
    write_atomic(readme, readme_text(readme.read_text(), ledger))
