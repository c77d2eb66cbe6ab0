"""One typed parameter model per notebook: the single source of names, types, defaults, ranges and meanings."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import pywt
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)
from pydantic_core import PydanticCustomError

from harmonize_lib import shapes
from harmonize_lib.attribution import METHODS, check_options
from harmonize_lib.consensus import list_rules
from harmonize_lib.data import check_name
from harmonize_lib.errors import HarmonizeError, unknown
from harmonize_lib.models import check_spec, manifest
from harmonize_lib.storage import check_folder

Fraction = Annotated[float, Field(gt=0, le=1)]
Share = Annotated[float, Field(ge=0, le=1)]
Width = Annotated[int, Field(ge=1, le=10_000)]
ARCHITECTURES = ("resnet", "vgg", "mobilenet", "convnext", "vit", "swin")
SIDES = {"shapes-on-scenes": 64, "imagefolder": 224, "mnist": 28, "fashion-mnist": 28, "cifar10": 32}
CURVE = [0.01, 0.02, 0.03, 0.05, 0.07, 0.1, 0.2, 0.5]
BAM_METHODS = [
    "saliency",
    "input_x_gradient",
    "smoothgrad",
    "smoothgrad_squared",
    "guided_backprop",
    "deeplift",
    "integrated_gradients",
    "integrated_gradients_smoothgrad",
    "expected_gradients",
    "grad_cam",
    "guided_grad_cam",
    "occlusion",
    "attention_rollout",
]
CONTROLS = ("random", "center", "edges")  # maps that know no model; notebooks 03 to 07 draw them anyway
STUDY_METHODS = ["saliency", "input_x_gradient", "smoothgrad", "integrated_gradients", "grad_cam", "occlusion"]
CHEAP: dict[str, dict[str, Any]] = {
    "smoothgrad": {"samples": 8},
    "smoothgrad_squared": {"samples": 8},
    "integrated_gradients": {"steps": 8, "max_steps": 8},
    "integrated_gradients_smoothgrad": {"steps": 4, "samples": 4},
    "expected_gradients": {"samples": 16},
    "occlusion": {"patch": 8, "stride": 8},
    "rise": {"masks": 64},
}
BAM_OPTIONS: dict[str, dict[str, Any]] = {
    "smoothgrad": {"samples": 8},
    "smoothgrad_squared": {"samples": 8},
    "integrated_gradients": {"steps": 24, "max_steps": 24},
    "integrated_gradients_smoothgrad": {"steps": 8, "samples": 3},
    "expected_gradients": {"samples": 16},
    "occlusion": {"stride": 8},
}


def _folder(folder: str) -> str:
    if folder:
        check_folder(Path(folder).expanduser())
    return folder


def _known_methods(given: list[str] | str) -> list[str] | str:
    for name in [given] if isinstance(given, str) else given:
        _check_method(name, [method for method in METHODS if method not in CONTROLS])
    return given


def _check_method(name: str, methods: Iterable[str]) -> None:
    if name not in methods:
        raise unknown("method", name, methods, "harmonize params NAME")


def _known_rules(given: list[str] | str) -> list[str] | str:
    for rule in [given] if isinstance(given, str) else given:
        if rule not in list_rules():
            raise unknown("rule", rule, list_rules())
    return given


def _known_models(specs: list[str]) -> list[str]:
    for spec in specs:
        check_spec(spec)
    return specs


def _each_once(value: Any, info: ValidationInfo) -> Any:
    """Refuse a list with the same item twice, where that is a slip: two layers may be equally wide."""
    if isinstance(value, list) and info.field_name not in ("hidden", "judges"):
        for i, item in enumerate(value):
            if item in value[:i]:
                raise HarmonizeError(f"parameter {info.field_name!r} has {str(item)[:60]!r} twice: give each once")
    return value


class Parameters(BaseModel):
    """What every notebook takes."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)
    other_data: ClassVar[bool] = True

    dataset: str = Field("shapes-on-scenes", description="shapes-on-scenes, or imagefolder:DIR")
    n_images: int = Field(100, ge=2, le=100_000, description="test images explained")
    seed: int = Field(0, ge=0, description="seed of everything random")
    device: str = Field("auto", description="auto, cpu or cuda")
    output: str = Field("", description="folder for the figures, empty for the one of the repository")

    @field_validator("dataset")
    @classmethod
    def _known_dataset(cls, name: str) -> str:
        check_name(name)
        if not cls.other_data and name != "shapes-on-scenes":
            raise HarmonizeError(f"dataset={name[:60]!r}: this notebook runs on shapes-on-scenes alone")
        return name

    _writable = field_validator("output")(_folder)
    _distinct = field_validator("*")(_each_once)

    @model_validator(mode="after")
    def _patches_fill_the_image(self) -> Parameters:
        patch, side = getattr(self, "patch", 1), SIDES.get(self.dataset.partition(":")[0])
        if side is not None and side % patch:
            fine = ", ".join(str(n) for n in range(1, side) if side % n == 0)
            raise HarmonizeError(f"patch={patch} does not divide the image's side, {side}: choose from {fine}")
        return self


class Study(Parameters):
    """A notebook that compares maps; ``controls_apart``: controls among the methods would be averaged with them."""

    controls_apart: ClassVar[bool] = True

    models: list[str] = Field(
        [f"{name}-obj" for name in ARCHITECTURES],
        min_length=2,
        description="zoo names, timm tags or python callables, as load_model takes them",
    )
    methods: list[str] = Field(STUDY_METHODS, min_length=1, description="attribution methods")
    options: dict[str, dict[str, Any]] = Field(
        {}, description='options of methods, e.g. {"integrated_gradients": {"max_steps": 32}}'
    )

    _models = field_validator("models")(_known_models)

    @field_validator("methods")
    @classmethod
    def _methods_and_controls(cls, names: list[str]) -> list[str]:
        if cls.controls_apart and (found := [name for name in names if name in CONTROLS]):
            raise HarmonizeError(f"{found[0]} is a control, which this notebook has anyway: leave it out of methods")
        for name in names:
            _check_method(name, [m for m in METHODS if not (cls.controls_apart and m in CONTROLS)])
        return names

    @field_validator("options")
    @classmethod
    def _known_options(cls, options: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
        for method, chosen in options.items():
            _check_method(method, METHODS)
            for name in chosen:
                if name not in METHODS[method].options:
                    raise unknown(f"option of {method}", name, METHODS[method].options)
        return options

    @model_validator(mode="after")
    def _sensible_options(self) -> Study:
        if (side := SIDES.get(self.dataset.partition(":")[0])) is not None:
            for method in self.methods:
                check_options(method, self.options.get(method, {}), side)
        return self


class Patches(Study):
    """A notebook that masks images."""

    patch: int = Field(4, ge=1, description="side of a patch in pixels; divides the image's side")
    fill: Literal["mean", "blur", "road"] = Field("mean", description="what stands where features are not")
    fractions: list[Fraction] = Field(CURVE, min_length=2, description="shares k of the patches that are kept")

    @model_validator(mode="after")
    def _read_where_measured(self) -> Patches:
        fraction = getattr(self, "fraction", self.fractions[0])
        if fraction not in self.fractions:
            raise PydanticCustomError("fraction", "fraction must be one of fractions", {"fraction": fraction})
        return self


class DataAndModels(Parameters):
    """Notebook 01."""

    other_data: ClassVar[bool] = False

    dataset: str = Field("shapes-on-scenes", description="shapes-on-scenes")
    n_images: int = Field(100, ge=10, le=100_000, description="test images explained")
    models: list[str] = Field(
        [f"{name}-obj" for name in ARCHITECTURES], min_length=2, description="models of the zoo, trained for objects"
    )
    n_accuracy: int = Field(2000, ge=100, le=10_000, description="test images for the zoo's accuracy")
    patch: int = Field(4, ge=1, description="side of a patch in pixels; divides the image's side")


class AttributionExtraction(Study):
    """Notebook 02."""

    controls_apart: ClassVar[bool] = False

    n_images: int = Field(50, ge=2, le=100_000, description="test images explained")
    methods: list[str] = Field(list(METHODS), min_length=1, description="attribution methods, controls included")
    n_shown: int = Field(3, ge=1, le=8, description="images in the gallery of maps")
    n_timed: int = Field(2, ge=1, le=1000, description="least number of images of a throughput measurement")


class FeatureImages(Patches):
    """Notebook 03."""

    n_shown: int = Field(2, ge=1, le=8, description="images in the galleries")


class Transfer(Patches):
    """Notebook 04."""

    fraction: Fraction = Field(0.05, description="share k at which matrices are read, one of fractions")


class Harmonization(Patches):
    """Notebook 05."""

    rules: list[str] = Field(
        ["mean", "median", "borda", "rrf", "agg_var", "crh", "geometric", "partial_order"],
        min_length=1,
        description="rules of consensus",
    )
    rule: str = Field("mean", description="the rule of curves, pool size, pooling of methods, consistency and shortcut")
    fraction: Fraction = Field(0.05, description="share k at which detection is compared, one of fractions")
    n_deletion: int = Field(30, ge=2, le=100_000, description="images of the deletion curves, at most n_images")
    pool_draws: int = Field(1, ge=1, le=100, description="random pools of each size and image")
    shortcut_methods: list[str] = Field(
        ["saliency", "input_x_gradient", "grad_cam"], description="those of methods that also explain the scene models"
    )
    n_shown: int = Field(2, ge=1, le=8, description="images in the gallery")

    _known = field_validator("rules", "rule")(_known_rules)
    _shortcut = field_validator("shortcut_methods")(_known_methods)


class FeatureDetectors(Study):
    """Notebook 06."""

    n_images: int = Field(100, ge=2, le=100_000, description="test images scored against exact masks")
    n_curves: int = Field(30, ge=2, le=100_000, description="images of insertion, deletion and ROAD, at most n_images")
    steps: int = Field(16, ge=2, le=256, description="steps of insertion and deletion curves")
    road_steps: int = Field(5, ge=0, le=64, description="steps of ROAD curves; 0 leaves ROAD out")


class Bam(Study):
    """Notebook 07."""

    dataset: str = Field("shapes-on-scenes", description="shapes-on-scenes, or bam:DIR (the published folders)")
    n_images: int = Field(40, ge=2, le=100_000, description="test images explained")
    models: list[str] = Field(
        [f"{name}-obj" for name in ARCHITECTURES],
        min_length=2,
        description="models trained for objects, as load_model takes them",
    )
    scene_models: list[str] = Field(
        [], description="trained for scenes on the same images, in the order of models; empty: NAME-scene for NAME-obj"
    )
    scene_only_models: list[str] = Field(
        [], description="trained for scenes without objects, in that order; empty: NAME-scene_only for NAME-obj"
    )
    methods: list[str] = Field(BAM_METHODS, min_length=1, description="attribution methods")
    options: dict[str, dict[str, Any]] = Field(
        BAM_OPTIONS,
        description="options of methods: cheaper than their defaults, because so many models are explained",
    )
    threshold: float = Field(0.1, gt=0, le=1, description="share by which attribution may change under IIR's patch")
    bound: float = Field(0.1, gt=0, le=1, description="share by which the patch may change the logits")
    patch_steps: int = Field(60, ge=0, le=10_000, description="steps in which the patch is optimized")
    relative_models: list[str] = Field(
        ["resnet-scene_k{k}", "swin-scene_k{k}"], description="models for RMCS, {k} stands for the commonality"
    )
    commonalities: list[Annotated[int, Field(ge=1, le=9)]] = Field(
        [1, 3, 5, 7, 9], description="scene classes of 10 that show the object; each is compared with all 10"
    )
    relative_pair: list[str] = Field(
        ["rings disc", "horizon"], min_length=2, max_length=2, description="object and scene of RMCS's images"
    )
    n_relative: int = Field(30, ge=2, le=100_000, description="images of RMCS, at most what there is")
    rules: list[str] = Field(
        ["mean", "median", "geometric", "agg_var", "min"], min_length=1, description="rules of consensus"
    )
    rule: str = Field("mean", description="the rule that claims are judged by, one of rules")
    harmonized_methods: list[str] = Field(STUDY_METHODS, description="those of methods that are harmonized")
    n_shown: int = Field(3, ge=1, le=8, description="images in the gallery")

    _known = field_validator("rules", "rule")(_known_rules)
    _harmonized = field_validator("harmonized_methods")(_known_methods)
    _scenes = field_validator("scene_models", "scene_only_models")(_known_models)

    @model_validator(mode="after")
    def _rule_and_relative_models(self) -> Bam:
        if self.rule not in self.rules:
            raise unknown("rule", self.rule, self.rules)
        for template in self.relative_models:
            if "{k}" not in template:
                raise HarmonizeError(f"relative_models: {template[:60]!r} has no {{k}}, for which a commonality is put")
            _known_models([template.replace("{k}", str(k)) for k in self.commonalities])
        return self


class ExpectedGradients(Parameters):
    """Notebook 08."""

    n_images: int = Field(12, ge=2, le=10_000, description="test images explained")
    models: list[str] = Field(
        [f"{name}-obj" for name in ("resnet", "mobilenet", "convnext", "vit")],
        min_length=1,
        description="zoo names, timm tags or python callables, as load_model takes them",
    )
    n_references: int = Field(100, ge=2, le=10_000, description="training images that references are drawn from")
    draws: int = Field(256, ge=64, le=65_536, description="draws per image behind the completeness curve")
    demo_seeds: int = Field(10, ge=2, le=1000, description="networks of the two-feature demonstration")
    demo_epochs: int = Field(200, ge=5, le=2000, description="epochs of the two-feature demonstration")
    benchmark_seeds: int = Field(10, ge=2, le=200, description="data sets and networks of the keep/remove benchmark")
    benchmark_samples: int = Field(200, ge=1, le=10_000, description="gradients per attribution in that benchmark")
    timed_steps: int = Field(5, ge=2, le=1000, description="pairs of training steps that are timed")
    n_shown: int = Field(3, ge=1, le=8, description="images in the gallery")


class AttributionPriors(Study):
    """Notebook 09."""

    other_data: ClassVar[bool] = False

    dataset: str = Field("shapes-on-scenes", description="of the consensus prior: shapes-on-scenes")

    n_images: int = Field(100, ge=2, le=10_000, description="test images whose maps judge the consensus prior")
    methods: list[str] = Field(
        ["input_x_gradient", "saliency"], min_length=1, description="methods whose maps judge the consensus prior"
    )
    options: dict[str, dict[str, Any]] = Field(
        {"expected_gradients": {"samples": 8}}, description="options of methods, for the maps that are judged"
    )
    pixels: str = Field("digits", description="images of the pixel prior: digits, mnist:DIR, fashion-mnist:DIR, ...")
    pixel_images: int = Field(0, ge=0, description="training images of the pixel prior, 0 for all")
    pixel_recipe: Literal["small", "paper"] = Field("small", description="network and training of the pixel prior")
    pixel_epochs: int = Field(0, ge=0, le=1000, description="epochs of the pixel prior, 0 for the recipe's")
    pixel_seeds: int = Field(5, ge=2, le=100, description="networks per arm and weight of the pixel prior")
    pixel_weights: list[PositiveFloat] = Field(
        [0.0003, 0.001, 0.003, 0.01], min_length=1, description="weights of the pixel prior that are tried"
    )
    tolerance: float = Field(0.01, ge=0, le=1, description="validation accuracy the pixel prior may cost")
    flips: list[Share] = Field(
        [0.0, 0.05, 0.1, 0.15, 0.2, 0.25, 0.3], min_length=2, description="shares of flipped pixels"
    )
    sigmas: list[NonNegativeFloat] = Field(
        [0.0, 0.1, 0.2, 0.3, 0.4, 0.5], min_length=2, description="Gaussian noise, share of the pixels' range"
    )
    graph_seeds: int = Field(10, ge=2, le=1000, description="simulations of expression on a graph")
    graph_shares: list[Share] = Field(
        [0.0, 0.25, 0.5, 0.75, 1.0], min_length=2, description="shares of the graph's edges that are rewired"
    )
    table: str = Field("diabetes", description="of the sparsity prior: diabetes, breast_cancer, csv:FILE[,FILE]")
    outcome: str = Field("", description="column of the outcome in a CSV")
    horizon: float = Field(0.0, ge=0, description="0: outcome is 0 or 1; else: follow-up time, event within this")
    replicates: int = Field(50, ge=2, le=1000, description="splits of the table")
    penalty_weights: int = Field(7, ge=1, le=200, description="weights of each penalty that are tried")
    hidden: list[Width] = Field([32, 16], min_length=1, description="hidden layers of the table's networks")
    penalty_epochs: int = Field(100, ge=1, le=10_000, description="full-batch steps of the table's networks")
    fine_tuned: list[str] = Field(["resnet-obj", "swin-obj"], min_length=1, description="models the consensus trains")
    judges: list[str] = Field(["vit-obj", "convnext-obj"], min_length=1, description="held-out model for each of them")
    consensus_method: str = Field("input_x_gradient", description="method whose maps are pooled")
    train_images: int = Field(500, ge=50, le=100_000, description="images the consensus prior trains on")
    tuning_epochs: int = Field(2, ge=1, le=100, description="passes over them")
    tuning_seeds: list[NonNegativeInt] = Field([0, 1, 2], min_length=2, description="seeds of the fine-tuning")
    tuning_weights: list[PositiveFloat] = Field([1.0, 10.0], min_length=1, description="weights that are tried")
    n_accuracy: int = Field(1000, ge=100, le=10_000, description="test images for clean accuracy")
    n_shown: int = Field(5, ge=1, le=8, description="images in the galleries")

    _consensus = field_validator("consensus_method")(_known_methods)


class Explorer(Patches):
    """Notebook 14."""

    methods: list[str] = Field(
        [method for method in METHODS if method not in CONTROLS],
        min_length=1,
        description="attribution methods to choose from, the first is shown first",
    )
    image: int = Field(0, ge=0, description="position of the image shown first, below n_images")
    rule: str = Field("mean", description="rule of consensus shown first")
    fraction: Fraction = Field(0.05, description="share k shown first, one of fractions")

    _known = field_validator("rule")(_known_rules)

    @model_validator(mode="after")
    def _one_of_the_images(self) -> Explorer:
        if self.image >= self.n_images:
            raise HarmonizeError(
                f"image={self.image}, but n_images={self.n_images}: the last one is {self.n_images - 1}"
            )
        return self


class RealityChecks(Study):
    """Notebook 13."""

    controls_apart: ClassVar[bool] = False

    n_images: int = Field(20, ge=2, le=100_000, description="test images explained")
    models: list[str] = Field(
        ["resnet-obj", "vit-obj", "swin-obj"],
        min_length=2,
        description="zoo names, timm tags or python callables, as load_model takes them",
    )
    methods: list[str] = Field(
        [method for method in METHODS if method not in ("random", "center")],
        min_length=1,
        description="attribution methods, edges as a control",
    )
    options: dict[str, dict[str, Any]] = Field(
        CHEAP,
        description="options of methods: cheaper than their defaults, because every randomized model is explained",
    )
    stages: int = Field(
        4, ge=2, le=20, description="stages of randomization, the logits' layer and equal parts of the rest"
    )
    rule: str = Field("mean", description="the rule of consensus")
    n_shown: int = Field(1, ge=1, le=8, description="images in the gallery")

    _known = field_validator("rule")(_known_rules)


class Decomposition(Parameters):
    """Notebook 10."""

    n_images: int = Field(200, ge=10, le=100_000, description="test images, among which wrong predictions are sought")
    models: list[str] = Field(
        [f"{name}-obj" for name in ARCHITECTURES], min_length=1, description="zoo names, timm tags or python callables"
    )
    n_promises: int = Field(20, ge=1, le=100_000, description="images its promises are tested on, at most n_images")
    n_timed: int = Field(5, ge=2, le=1000, description="paired measurements of cost per model")
    networks: int = Field(10, ge=2, le=1000, description="networks of each kind with planted interactions")
    n_inputs: int = Field(32, ge=1, le=10_000, description="inputs of each of these networks")
    n_stability: int = Field(200, ge=2, le=500, description="digits whose hierarchies are perturbed")
    strength: float = Field(0.1, gt=0, le=1, description="perturbation of a pixel, images lie in [0, 1]")
    percentile: float = Field(95.0, ge=0, le=100, description="what a hierarchy takes up in each round")
    patch: int = Field(4, ge=1, description="side of a unit in pixels, in the trees of scenes")
    scene_percentile: float = Field(99.0, ge=0, le=100, description="what it takes up in the trees of scenes")
    rounds: int = Field(8, ge=0, le=1000, description="rounds of growth in the trees drawn")
    n_shown: int = Field(2, ge=1, le=6, description="right, and wrong, predictions in the pictures of trees")


def _is_short(wavelet: pywt.Wavelet) -> bool:
    return wavelet.orthogonal and wavelet.rec_len <= 10


class Simulation(BaseModel):
    """A notebook that makes its own data and trains its own networks."""

    model_config = Parameters.model_config

    seed: int = Field(0, ge=0, description="seed of everything random")
    output: str = Field("", description="folder for the figures, empty for the one of the repository")

    _writable = field_validator("output")(_folder)
    _distinct = field_validator("*")(_each_once)


class ExplanationPenalties(Simulation):
    """Notebook 11."""

    digits: str = Field("digits", description="digits (scikit-learn's, bundled) or mnist:DIR")
    n_train: int = Field(1000, ge=100, le=50_000, description="training images")
    n_test: int = Field(397, ge=50, le=10_000, description="test images")
    n_validation: int = Field(200, ge=50, le=10_000, description="images of each of the two validation sets")
    seeds: int = Field(5, ge=2, le=100, description="networks per penalty and strength")
    epochs: int = Field(10, ge=1, le=1000, description="passes over the training images")
    batch_size: int = Field(50, ge=2, le=1000, description="images per step")
    strengths: list[PositiveFloat] = Field(
        [0.1, 1.0, 10.0, 100.0, 1000.0],
        min_length=2,
        description="weights λ that are tried, in units: 0.01 CDEP (paper), 1 CDEP (code), 1 RRR, 0.1 EG",
    )
    tolerance: float = Field(0.02, ge=0, le=1, description="unshifted validation accuracy a penalty may cost")
    n_shown: int = Field(4, ge=1, le=8, description="images in the galleries of maps")


class Transformations(Simulation):
    """Notebook 12."""

    simulations: int = Field(100, ge=2, le=10_000, description="knock-out simulations per transform")
    training_steps: int = Field(300, ge=10, le=100_000, description="training steps of the knock-out networks")
    wavelets: list[str] = Field(
        ["coif1", "db3", "sym4"], min_length=1, description="generating wavelets, at most 10 taps"
    )
    seeds: int = Field(5, ge=2, le=100, description="data sets and teachers per wavelet")
    n_signals: int = Field(
        1000, ge=64, le=100_000, description="training signals of a teacher, as many for validation, and for testing"
    )
    steps: int = Field(1000, ge=10, le=100_000, description="steps of each distillation")
    sparsities: list[NonNegativeFloat] = Field(
        [0.005, 0.02, 0.1, 0.3], min_length=1, description="weights of the coefficients' L1 norm that are tried"
    )
    interpretation: float = Field(1.0, ge=0, description="weight of their importance's L1 norm")

    @field_validator("wavelets")
    @classmethod
    def _short_wavelets(cls, names: list[str]) -> list[str]:
        short = [name for name in pywt.wavelist(kind="discrete") if _is_short(pywt.Wavelet(name))]
        for name in names:
            if name not in short:
                raise unknown("orthogonal wavelet of at most 10 taps", name, short)
        return names


NOTEBOOKS: dict[str, type[BaseModel]] = {
    "01_data_and_models": DataAndModels,
    "02_attribution_extraction": AttributionExtraction,
    "03_feature_images": FeatureImages,
    "04_cross_architecture_transfer": Transfer,
    "05_harmonisation": Harmonization,
    "06_feature_detectors": FeatureDetectors,
    "07_bam": Bam,
    "08_expected_gradients": ExpectedGradients,
    "09_attribution_priors": AttributionPriors,
    "10_decomposition_and_hierarchies": Decomposition,
    "11_explanation_penalties": ExplanationPenalties,
    "12_transformations_and_wavelets": Transformations,
    "13_reality_checks": RealityChecks,
    "14_explorer": Explorer,
}


def parameters_cell(notebook: str) -> str:
    """Source of a notebook's ``parameters`` cell, in the form papermill reads back.

    Parameters
    ----------
    notebook : str
        A key of ``NOTEBOOKS``.

    Returns
    -------
    str
        One line ``name: type = default  # meaning`` per parameter.
    """
    lines = []
    for name, info in NOTEBOOKS[notebook].model_fields.items():
        kind = type(info.default).__name__
        lines.append(f"{name}: {kind} = {json.dumps(info.default)}  # {info.description}")
    return "\n".join(lines)


def known(notebook: str) -> dict[str, list[str]]:
    """Names that a notebook's parameters take.

    Parameters
    ----------
    notebook : str
        A key of ``NOTEBOOKS``.

    Returns
    -------
    dict[str, list[str]]
        By parameter: models of the zoo with the classes of the data (besides them, any timm tag or python callable of
        such classes), attribution methods, rules of consensus.
    """
    kind = NOTEBOOKS[notebook]
    apart = CONTROLS if getattr(kind, "controls_apart", False) else ()
    names = {
        "models": sorted(name for name, entry in manifest().items() if tuple(entry["classes"]) == shapes.OBJECTS),
        "methods": [method for method in METHODS if method not in apart],
        "rules": list_rules(),
    }
    return {field: names[field] for field in kind.model_fields if field in names}


def check(notebook: str, values: Mapping[str, Any]) -> Any:
    """Check the parameters of a notebook.

    Parameters
    ----------
    notebook : str
        A key of ``NOTEBOOKS``.
    values : Mapping[str, Any]
        The parameters; a notebook passes ``globals()``, where names that start with an underscore and what IPython
        puts there itself are left out, and any other name counts as a parameter.

    Returns
    -------
    Any
        The notebook's parameter model, frozen.

    Raises
    ------
    HarmonizeError
        Names the parameter, what is wrong with it and what would be right.
    """
    kind = NOTEBOOKS[notebook]
    simple = (bool, int, float, str, list, dict, tuple, type(None))
    ipython = {"In", "Out", "papermill"}
    given = {
        name: value
        for name, value in values.items()
        if not (name.startswith("_") and name.isidentifier()) and name not in ipython and isinstance(value, simple)
    }
    for name in given:
        if name not in kind.model_fields:
            raise unknown(f"parameter of {notebook}", name, kind.model_fields, f"harmonize params {notebook[:2]}")
    try:
        return kind(**{name: _integers_as_floats(kind, name, value) for name, value in given.items()})
    except ValidationError as error:
        first = error.errors()[0]
        if isinstance(own := first.get("ctx", {}).get("error"), HarmonizeError):
            raise HarmonizeError(str(own)) from None
        place = ".".join(str(part) for part in first["loc"]) or str(first["type"])
        value = first["ctx"]["fraction"] if first["type"] == "fraction" else first["input"]
        message = first["msg"].lower().replace(" after validation", "")
        if first["type"] == "string_type" and isinstance(value, dict):  # how YAML reads 'imagefolder: DIR'
            key, rest = next(iter(value.items()), ("name", None))
            message = f"write one text without a space, as in {str(key)[:30]}:{str(rest or 'PATH')[:30]}"
        raise HarmonizeError(f"parameter {place!r} of {notebook}: {message}; got {str(value)[:60]!r}") from None


def recorded(settings: BaseModel) -> dict[str, Any]:
    """Parameters as provenance keeps them: without places of this machine.

    Parameters
    ----------
    settings : BaseModel
        From :func:`check`.

    Returns
    -------
    dict[str, Any]
        All but ``output``; of a data set's folder and of models' weights files the name.
    """
    values = settings.model_dump(exclude={"output"})
    for name in ("dataset", "digits", "pixels"):
        if name in values:
            kind, colon, folder = values[name].partition(":")
            values[name] = f"{kind}{colon}{Path(folder).name}"
    if "models" in values:
        values["models"] = [re.sub(r"(?<=[?&]weights=)[^&]*/", "", spec) for spec in values["models"]]
    return values


def _integers_as_floats(kind: type[BaseModel], name: str, value: Any) -> Any:
    """A whole number is a fine float: JSON and YAML write 1.0 as 1."""
    default = kind.model_fields[name].default
    if isinstance(default, float) and type(value) is int:
        return float(value)
    if isinstance(default, list) and isinstance(value, list) and default and isinstance(default[0], float):
        return [float(item) if type(item) is int else item for item in value]
    return value
