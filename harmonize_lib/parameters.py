"""One typed parameter model per notebook: the single source of names, types, defaults, ranges and meanings."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator
from pydantic_core import PydanticCustomError

from harmonize_lib.attribution import METHODS
from harmonize_lib.consensus import list_rules
from harmonize_lib.errors import HarmonizeError, unknown

Fraction = Annotated[float, Field(gt=0, le=1)]
ARCHITECTURES = ("resnet", "vgg", "mobilenet", "convnext", "vit", "swin")
CURVE = [0.01, 0.02, 0.03, 0.05, 0.07, 0.1, 0.2, 0.5]
STUDY_METHODS = ["saliency", "input_x_gradient", "smoothgrad", "integrated_gradients", "grad_cam", "occlusion"]


class Parameters(BaseModel):
    """What every notebook takes."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    dataset: str = Field("shapes-on-scenes", description="shapes-on-scenes, or imagefolder:DIR")
    n_images: int = Field(100, ge=2, le=100_000, description="test images explained")
    seed: int = Field(0, ge=0, description="seed of everything random")
    device: str = Field("auto", description="auto, cpu or cuda")
    output: str = Field("", description="folder for the figures, empty for the one of the repository")


class Study(Parameters):
    """A notebook that compares models."""

    models: list[str] = Field(
        [f"{name}-obj" for name in ARCHITECTURES],
        min_length=2,
        description="zoo names, timm tags or python callables, as load_model takes them",
    )
    methods: list[str] = Field(STUDY_METHODS, min_length=1, description="attribution methods")


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


class DataAndModels(Study):
    """Notebook 01."""

    n_accuracy: int = Field(2000, ge=100, le=10_000, description="test images for the zoo's accuracy")
    patch: int = Field(4, ge=1, description="side of a patch in pixels; divides the image's side")


class AttributionExtraction(Study):
    """Notebook 02."""

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

    @field_validator("rules", "rule")
    @classmethod
    def _known(cls, given: list[str] | str) -> list[str] | str:
        for rule in [given] if isinstance(given, str) else given:
            if rule not in list_rules():
                raise unknown("rule", rule, list_rules())
        return given


class FeatureDetectors(Study):
    """Notebook 06."""

    n_images: int = Field(100, ge=2, le=100_000, description="test images scored against exact masks")
    n_curves: int = Field(30, ge=2, le=100_000, description="images of insertion, deletion and ROAD, at most n_images")
    steps: int = Field(16, ge=2, le=256, description="steps of insertion and deletion curves")
    road_steps: int = Field(5, ge=0, le=64, description="steps of ROAD curves; 0 leaves ROAD out")


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
    rounds: int = Field(8, ge=0, le=1000, description="rounds of growth in the trees drawn")
    n_shown: int = Field(2, ge=1, le=6, description="right, and wrong, predictions in the pictures of trees")


class Simulation(BaseModel):
    """A notebook that makes its own data and trains its own networks."""

    model_config = Parameters.model_config

    seed: int = Field(0, ge=0, description="seed of everything random")
    output: str = Field("", description="folder for the figures, empty for the one of the repository")


class ExplanationPenalties(Simulation):
    """Notebook 11."""

    digits: str = Field("digits", description="digits (scikit-learn's, bundled) or mnist:DIR")
    n_train: int = Field(1000, ge=100, le=50_000, description="training images")
    n_test: int = Field(397, ge=50, le=10_000, description="test images")
    n_validation: int = Field(200, ge=50, le=10_000, description="images of each of the two validation sets")
    seeds: int = Field(5, ge=2, le=100, description="networks per penalty and strength")
    epochs: int = Field(10, ge=1, le=1000, description="passes over the training images")
    batch_size: int = Field(50, ge=2, le=1000, description="images per step")
    strengths: list[float] = Field(
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
    n_signals: int = Field(1000, ge=64, le=100_000, description="training signals of a teacher, as many for testing")
    steps: int = Field(1000, ge=10, le=100_000, description="steps of the distillation")
    sparsity: float = Field(0.005, ge=0, description="weight of the coefficients' L1 norm")
    interpretation: float = Field(1.0, ge=0, description="weight of their importance's L1 norm")


NOTEBOOKS: dict[str, type[BaseModel]] = {
    "01_data_and_models": DataAndModels,
    "02_attribution_extraction": AttributionExtraction,
    "03_feature_images": FeatureImages,
    "04_cross_architecture_transfer": Transfer,
    "05_harmonisation": Harmonization,
    "06_feature_detectors": FeatureDetectors,
    "10_decomposition_and_hierarchies": Decomposition,
    "11_explanation_penalties": ExplanationPenalties,
    "12_transformations_and_wavelets": Transformations,
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
    own = {"In", "Out", "papermill"}
    given = {
        name: value
        for name, value in values.items()
        if not name.startswith("_") and name not in own and isinstance(value, simple)
    }
    for name in given:
        if name not in kind.model_fields:
            raise unknown(f"parameter of {notebook}", name, kind.model_fields)
    try:
        return kind(**{name: _integers_as_floats(kind, name, value) for name, value in given.items()})
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(str(part) for part in first["loc"]) or str(first["type"])
        value = first["ctx"]["fraction"] if first["type"] == "fraction" else first["input"]
        raise HarmonizeError(
            f"parameter {place!r} of {notebook}: {first['msg'].lower()}; got {str(value)[:60]!r}"
        ) from None


def _integers_as_floats(kind: type[BaseModel], name: str, value: Any) -> Any:
    """A whole number is a fine float: JSON and YAML write 1.0 as 1."""
    default = kind.model_fields[name].default
    if isinstance(default, float) and type(value) is int:
        return float(value)
    if isinstance(default, list) and isinstance(value, list) and default and isinstance(default[0], float):
        return [float(item) if type(item) is int else item for item in value]
    return value
