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
    threshold: float = Field(0.1, gt=0, le=1, description="share by which attribution may change under IIR's patch")
    bound: float = Field(0.1, gt=0, le=1, description="share by which the patch may change the logits")
    patch_steps: int = Field(60, ge=0, le=10_000, description="steps in which the patch is optimized")
    relative_models: list[str] = Field(
        ["resnet-scene_k{k}", "swin-scene_k{k}"], description="models for RMCS, {k} stands for the commonality"
    )
    commonalities: list[int] = Field(
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

    @field_validator("rules", "rule")
    @classmethod
    def _known(cls, given: list[str] | str) -> list[str] | str:
        for rule in [given] if isinstance(given, str) else given:
            if rule not in list_rules():
                raise unknown("rule", rule, list_rules())
        return given


NOTEBOOKS: dict[str, type[Parameters]] = {
    "01_data_and_models": DataAndModels,
    "02_attribution_extraction": AttributionExtraction,
    "03_feature_images": FeatureImages,
    "04_cross_architecture_transfer": Transfer,
    "05_harmonisation": Harmonization,
    "06_feature_detectors": FeatureDetectors,
    "07_bam": Bam,
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


def _integers_as_floats(kind: type[Parameters], name: str, value: Any) -> Any:
    """A whole number is a fine float: JSON and YAML write 1.0 as 1."""
    default = kind.model_fields[name].default
    if isinstance(default, float) and type(value) is int:
        return float(value)
    if isinstance(default, list) and isinstance(value, list) and default and isinstance(default[0], float):
        return [float(item) if type(item) is int else item for item in value]
    return value
