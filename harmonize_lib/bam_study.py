"""Notebook 07: BAM's metrics for methods, controls and harmonized maps, over architectures and commonalities."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pandera.pandas as pa
import seaborn as sns
import torch
from matplotlib.figure import Figure
from torch import Tensor
from tqdm.std import tqdm

from harmonize_lib import bam, detectors, plots, study
from harmonize_lib.attribution import refusal
from harmonize_lib.consensus import RULES, consensus
from harmonize_lib.data import Dataset, load_dataset
from harmonize_lib.errors import HarmonizeError, unknown
from harmonize_lib.models import Model, load_model
from harmonize_lib.parameters import CONTROLS
from harmonize_lib.statistics import Interval, bootstrap_interval, holm, paired_difference, summarize
from harmonize_lib.storage import remember, sha256_tensors
from harmonize_lib.study import Run
from harmonize_lib.tasks import pick

METRICS = ("MCS", "IDR", "IIR")
VARIANTS = {"original": False, "signed": True}
ALL = 10  # scene classes: the commonality that all others are compared with
DROPS = {"drop": "accuracy drop", "logit_drop": "logit drop"}
RELU = "ReLU CNNs"  # the group of models that BAM's findings are judged by
PATCH_VERSION = 1
ORIGINAL_METHODS = (  # those of BAM's own list that are defined here
    "saliency",
    "smoothgrad_squared",
    "guided_backprop",
    "integrated_gradients",
    "integrated_gradients_smoothgrad",
    "grad_cam",
    "guided_grad_cam",
    "input_x_gradient",
)

# What is shown to which model, in the words of the maps' keys.
OBJECT, SCENE, BARE, SCENE_ONLY, PATCHED = "object", "scene", "scene bare", "scene only", "scene only patched"
CONDITIONS = (OBJECT, SCENE, BARE, SCENE_ONLY, PATCHED)
PAIRS = {"MCS": (OBJECT, SCENE), "IDR": (BARE, SCENE), "IIR": (SCENE_ONLY, PATCHED)}

Maps = Mapping[tuple[str, str, str], Tensor]

SCHEMA = pa.DataFrameSchema(
    {
        "metric": pa.Column(str, pa.Check.isin((*METRICS, "RMCS"))),
        "variant": pa.Column(str, pa.Check.isin(VARIANTS)),
        "model": pa.Column(str),
        "method": pa.Column(str),
        "image": pa.Column(str),
        "value": pa.Column(float, pa.Check.in_range(-2, 2), nullable=True, coerce=True),
    },
    checks=pa.Check(
        lambda table: not table.duplicated([c for c in table if c not in ("value", "drop", "logit_drop")]).any(),
        name="one row per cell",
    ),
)


class Bench(NamedTuple):
    """What BAM compares, by the name of the model trained for objects.

    Attributes
    ----------
    models : dict[str, dict[str, Model]]
        ``object``, ``scene``, ``scene only`` to models.
    data : dict[str, Dataset]
        Condition to images with the labels explained.
    patch : bam.Patch
        The functionally insignificant patches, one per image, the same for all models.
    correct : dict[str, dict[str, Tensor]]
        Metric to model to (N) bool, images that count.
    """

    models: dict[str, dict[str, Model]]
    data: dict[str, Dataset]
    patch: bam.Patch
    correct: dict[str, dict[str, Tensor]]


def prepare(run: Run) -> Bench:
    """Load the models for scenes, make the patches, and see which images count.

    Parameters
    ----------
    run : Run
        Gives models for objects, images and parameters.

    Returns
    -------
    Bench
        All that the metrics need.

    Raises
    ------
    HarmonizeError
        Lists of models that do not match; images whose scene without object is not known.
    """
    dataset = run.dataset
    data = shown(dataset)
    models = {
        OBJECT: dict(run.models),
        SCENE: _partners(run, SCENE),
        SCENE_ONLY: _partners(run, SCENE_ONLY),
    }
    patch = _patches(run, list(models[SCENE_ONLY].values()), data[BARE])
    data[PATCHED] = replace(data[SCENE], images=patch.images)
    right = {
        condition: {
            name: study.predictions(model, data[condition].images) == data[condition].labels
            for name, model in models[_task(condition)].items()
        }
        for condition in CONDITIONS
    }
    correct = {
        metric: {name: right[a][name] & right[b][name] for name in run.models} for metric, (a, b) in PAIRS.items()
    }
    for name, accepted in zip(run.models, patch.accepted, strict=True):
        correct["IIR"][name] = correct["IIR"][name] & accepted
    return Bench(models, data, patch, correct)


def _masks(data: Dataset) -> Tensor:
    if data.masks is None:
        raise HarmonizeError(f"{data.name} has no masks: take shapes-on-scenes or bam:DIR")
    return data.masks


def _task(condition: str) -> str:
    return {BARE: SCENE, PATCHED: SCENE_ONLY}.get(condition, condition)


def shown(dataset: Dataset) -> dict[str, Dataset]:
    """What models are shown: the images, with labels of objects or scenes, and the scenes without their objects.

    Parameters
    ----------
    dataset : Dataset
        Images with labels of objects.

    Returns
    -------
    dict[str, Dataset]
        All of ``CONDITIONS`` but the patched one.

    Raises
    ------
    HarmonizeError
        The scenes, or the images without objects, are not known.
    """
    for known in ("without_object", "scene_labels"):
        if known not in dataset.extras:
            raise HarmonizeError(f"{dataset.name} has no {known}: take shapes-on-scenes or bam:DIR")
    scene = replace(dataset, labels=dataset.extras["scene_labels"])
    bare = replace(scene, images=dataset.extras["without_object"])
    return {OBJECT: dataset, SCENE: scene, BARE: bare, SCENE_ONLY: bare}


def _partner_specs(settings: Any, task: str) -> list[str]:
    """The models that belong to the models for objects, trained with other labels, as ``load_model`` takes them."""
    labels = task.replace(" ", "_")
    names = [spec.partition("?")[0].removesuffix("-obj") for spec in settings.models]
    specs = getattr(settings, f"{labels}_models") or [f"{name}-{labels}" for name in names]
    if len(specs) != len(names):
        raise HarmonizeError(f"{labels}_models: {len(specs)} given for {len(names)} models: give one for each")
    return specs


def _partners(run: Run, task: str) -> dict[str, Model]:
    specs = _partner_specs(run.settings, task)
    return {name: load_model(spec, device=run.settings.device) for name, spec in zip(run.models, specs, strict=True)}


def explained(settings: Any, dataset: Dataset) -> list[tuple[str, Dataset]]:
    """What notebook 07 explains before it knows the patches: models of all labels and commonalities.

    Parameters
    ----------
    settings : Any
        The notebook's checked parameters.
    dataset : Dataset
        Its images.

    Returns
    -------
    list[tuple[str, Dataset]]
        As :func:`study.explained` has it.
    """
    specs = {task: _partner_specs(settings, task) for task in (SCENE, SCENE_ONLY)} | {OBJECT: settings.models}
    few = relative_data(settings)
    pairs = [(spec, data) for condition, data in shown(dataset).items() for spec in specs[_task(condition)]]
    return pairs + [(template.replace("{k}", str(k)), few) for template, k in _relative(settings)]


def _relative(settings: Any) -> list[tuple[str, int]]:
    return [(template, k) for template in settings.relative_models for k in (*settings.commonalities, ALL)]


def _patches(run: Run, models: Sequence[Model], bare: Dataset) -> bam.Patch:
    """The patches, computed once and kept in the store."""
    settings, dataset = run.settings, run.dataset
    key = {
        "version": PATCH_VERSION,
        "model": [model.identity for model in models],
        "images": sha256_tensors({"bare": bare.images, "with": dataset.images, "masks": _masks(dataset)}),
        "steps": settings.patch_steps,
        "bound": settings.bound,
    }

    def compute() -> dict[str, Tensor]:
        patch = bam.insignificant_patch(
            models, bare.images, dataset.images, _masks(dataset), steps=settings.patch_steps, bound=settings.bound
        )
        return patch._asdict()

    return bam.Patch(**remember("patch", key, compute))


def patch_table(run: Run, bench: Bench) -> pd.DataFrame:
    """How much objects, and the patches made from them, change the logits.

    Parameters
    ----------
    run : Run
        The run.
    bench : Bench
        From :func:`prepare`.

    Returns
    -------
    pd.DataFrame
        Columns ``model``, ``image``, ``shown`` (object, patch), ``change`` (norm over norm), ``contrast`` (of the
        patch), ``accepted`` (of the patch).
    """
    parts = []
    for i, name in enumerate(run.models):
        for shown, change in (("object", bench.patch.object_change), ("patch", bench.patch.change)):
            cells = {"model": name, "image": run.dataset.ids, "shown": shown, "change": change[i].numpy()}
            rest = {"contrast": bench.patch.contrast.numpy(), "accepted": bench.patch.accepted[i].numpy()}
            parts.append(pd.DataFrame(cells | rest))
    return pd.concat(parts, ignore_index=True)


def all_maps(run: Run, bench: Bench) -> dict[tuple[str, str, str], Tensor]:
    """Maps of every model, for every condition, by every method and control.

    Parameters
    ----------
    run : Run
        Gives methods and seed.
    bench : Bench
        From :func:`prepare`.

    Returns
    -------
    dict[tuple[str, str, str], Tensor]
        (condition, model, method) to maps (N, H, W); methods a model refuses are left out. The random control is
        drawn anew for each condition.
    """
    jobs = [
        (c, name, method)
        for c in CONDITIONS
        for name, model in bench.models[_task(c)].items()
        for method in (*run.settings.methods, *CONTROLS)
        if refusal(model, method) is None
    ]
    return {
        (c, name, method): _explain(
            bench.models[_task(c)][name], bench.data[c], method, run.settings, CONDITIONS.index(c)
        )
        for c, name, method in tqdm(jobs, desc="attributions", mininterval=1)
    }


def _explain(model: Model, dataset: Dataset, method: str, settings: Any, stream: int) -> Tensor:
    seed = settings.seed + (1000 * stream if method == "random" else 0)
    return study.attributions(model, dataset, method, seed, **settings.options.get(method, {}))["maps"]


def _compare(metric: str, a: Tensor, b: Tensor, threshold: float) -> Tensor:
    """A metric's values (N) from two concept attributions of every image."""
    if metric == "IDR":
        return bam.lowered(a, b)
    return bam.unchanged(a, b, threshold) if metric == "IIR" else a - b


def scores(run: Run, bench: Bench, maps: Maps) -> pd.DataFrame:
    """MCS, IDR and IIR of every image, with the original and with the signed concept attribution.

    Parameters
    ----------
    run : Run
        Gives masks and threshold.
    bench : Bench
        From :func:`prepare`.
    maps : Maps
        From :func:`all_maps`.

    Returns
    -------
    pd.DataFrame
        ``SCHEMA``; an image that does not count has no value.
    """
    parts = []
    for variant, signed in VARIANTS.items():
        g = {key: bam.concept_attribution(values, _masks(run.dataset), signed).values for key, values in maps.items()}
        for metric, (a, b) in PAIRS.items():
            for condition, name, method in maps:
                if condition == a:
                    values = _compare(metric, g[a, name, method], g[b, name, method], run.settings.threshold)
                    values = values.masked_fill(~bench.correct[metric][name], torch.nan)
                    cell = {"metric": metric, "variant": variant, "model": name, "method": method}
                    parts.append(pd.DataFrame(cell | {"image": run.dataset.ids, "value": values.numpy()}))
    return SCHEMA.validate(pd.concat(parts, ignore_index=True))


def counts(run: Run, bench: Bench, table: pd.DataFrame) -> pd.DataFrame:
    """How many images count, and why others do not.

    Parameters
    ----------
    run : Run
        The run.
    bench : Bench
        From :func:`prepare`.
    table : pd.DataFrame
        From :func:`scores`.

    Returns
    -------
    pd.DataFrame
        Columns ``model``, ``methods`` (that gave values there, controls apart), ``images``, ``MCS``, ``IDR``, ``IIR``
        (images correct in both, for IIR with an accepted patch), ``patches_refused``, ``undefined`` (values lost to
        maps without scale, over metrics and methods).
    """
    rows = []
    for i, name in enumerate(run.models):
        counted = {metric: int(bench.correct[metric][name].sum()) for metric in METRICS}
        part = table[(table["model"] == name) & (table["variant"] == "original")]
        possible = sum(counted[m] * part.loc[part["metric"] == m, "method"].nunique() for m in METRICS)
        undefined = possible - int(part["value"].notna().sum())
        refused = int((~bench.patch.accepted[i]).sum())
        row = {"model": name, "methods": len(_given(table, name, run.settings.methods)), "images": len(run.dataset)}
        rows.append(row | counted | {"patches_refused": refused, "undefined": undefined})
    return pd.DataFrame(rows)


def _given(table: pd.DataFrame, model: str, methods: Sequence[str]) -> list[str]:
    """Those of the methods that gave a value on the model."""
    there = set(table.loc[(table["model"] == model) & table["value"].notna(), "method"])
    return [method for method in methods if method in there]


def original_models(run: Run, table: pd.DataFrame) -> list[str]:
    """Models for which all of BAM's own methods are defined (CNNs with ReLU), by which its findings are judged.

    Parameters
    ----------
    run : Run
        Gives methods.
    table : pd.DataFrame
        From :func:`scores` or :func:`relative_scores`.

    Returns
    -------
    list[str]
        Names, as the table has them; may be none.
    """
    wanted = {method for method in ORIGINAL_METHODS if method in run.settings.methods}
    there = table.groupby("model", sort=False)["method"].unique()
    return [name for name, methods in there.items() if wanted <= set(methods)]


def groups(run: Run, table: pd.DataFrame) -> dict[str, tuple[list[str], list[str]]]:
    """Groups of models, each with the methods that are defined on all of its models and so can be compared.

    Parameters
    ----------
    run : Run
        Gives models and methods.
    table : pd.DataFrame
        From :func:`scores`.

    Returns
    -------
    dict[str, tuple[list[str], list[str]]]
        Group to (models, methods); a group may be empty.
    """
    found = {}
    for label, names in ((RELU, original_models(run, table)), ("all models", list(run.models))):
        seen = table[table["model"].isin(names)].groupby("method")["model"].nunique()
        found[label] = names, [m for m in run.settings.methods if seen.get(m, 0) == len(names) > 0]
    return found


def ranked(run: Run, table: pd.DataFrame) -> tuple[pd.DataFrame, dict[str, Interval]]:
    """Ranks of methods by metric, where all are defined, and how far the metrics agree.

    Parameters
    ----------
    run : Run
        Gives models, methods and seed.
    table : pd.DataFrame
        From :func:`scores`.

    Returns
    -------
    tuple[pd.DataFrame, dict[str, Interval]]
        Ranks with columns ``models``, ``variant``, ``metric``, ``method``, ``rank``, ``low``, ``high``, ``n``; and
        Kendall's W of the metrics by ``"models, variant"``. Groups of models without two methods, or without two
        images that count everywhere, are left out.
    """
    parts, agreement = [], {}
    for label, (names, methods) in groups(run, table).items():
        part = table[table["model"].isin(names) & table["method"].isin(methods)]
        for variant in VARIANTS:
            chosen = part[part["variant"] == variant]
            w = detectors.concordance(chosen, "metric", methods, run.settings.seed)
            if not np.isnan(w.mean):
                ranks = detectors.rank_table(chosen, "metric", methods, run.settings.seed)
                parts.append(ranks.assign(models=label, variant=variant))
                agreement[f"{label}, {variant}"] = w
    columns = ["models", "variant", "metric", "method", "rank", "low", "high", "n"]
    return pd.concat(parts, ignore_index=True) if parts else pd.DataFrame(columns=columns), agreement


# Relative model contrast.


def relative_data(settings: Any) -> Dataset:
    """Images of one object in one scene, labels of scenes.

    Parameters
    ----------
    settings : Any
        Gives ``dataset``, ``seed``, ``relative_pair`` and ``n_relative``.

    Returns
    -------
    Dataset
        At most ``n_relative`` images, with ``without_object``.

    Raises
    ------
    HarmonizeError
        No such object or scene.
    """
    thing, place = settings.relative_pair
    if settings.dataset == "shapes-on-scenes":
        blocks = -(-settings.n_relative // 10)
        data = load_dataset(
            "shapes-on-scenes", "test", 100 * blocks, settings.seed, labels="scene", commonality=ALL, object=thing
        )
        if place not in data.classes:
            raise unknown("scene", place, data.classes)
        chosen = (data.labels == data.classes.index(place)).nonzero().flatten()
    else:
        data = load_dataset(settings.dataset, "test", labels="scene", prefix=f"{thing}-{place}-")
        chosen = torch.arange(len(data))
    return data.select(chosen[: settings.n_relative])


class Relative(NamedTuple):
    """Maps of models of all commonalities.

    Attributes
    ----------
    data : Dataset
        From :func:`relative_data`.
    maps : dict[tuple[str, int, str], Tensor]
        (template, k, method) to maps (N, H, W).
    correct : dict[tuple[str, int], Tensor]
        (template, k) to (N) bool.
    drop : dict[tuple[str, int], Tensor]
        (template, k) to (N), correct with the object minus correct without it.
    logit_drop : dict[tuple[str, int], Tensor]
        (template, k) to (N), the label's logit with the object minus without it.
    """

    data: Dataset
    maps: dict[tuple[str, int, str], Tensor]
    correct: dict[tuple[str, int], Tensor]
    drop: dict[tuple[str, int], Tensor]
    logit_drop: dict[tuple[str, int], Tensor]


def relative_maps(run: Run) -> Relative:
    """Explain the models of all commonalities.

    Parameters
    ----------
    run : Run
        Gives the models' names, commonalities, methods and seed.

    Returns
    -------
    Relative
        Maps, and which images count; no maps where no models are named.
    """
    settings = run.settings
    result = Relative(relative_data(settings), {}, {}, {}, {})
    images, bare = result.data.images, result.data.extras["without_object"]
    for template, k in tqdm(_relative(settings), desc="commonalities", mininterval=1):
        model = load_model(template.replace("{k}", str(k)), device=settings.device)
        logits = [_logits(model, shown) for shown in (images, bare)]
        with_object, without = (values.argmax(1) == result.data.labels for values in logits)
        result.correct[template, k] = with_object
        result.drop[template, k] = with_object.double() - without.double()
        result.logit_drop[template, k] = pick(logits[0] - logits[1], result.data.labels)
        for method in (*settings.methods, *CONTROLS):
            if refusal(model, method) is None:
                result.maps[template, k, method] = _explain(model, result.data, method, settings, k)
    return result


def _logits(model: Model, images: Tensor, batch_size: int = 256) -> Tensor:
    with torch.inference_mode():
        return torch.cat([model(model.preprocess(part)).cpu() for part in images.split(batch_size)]).double()


def relative_scores(relative: Relative) -> pd.DataFrame:
    """RMCS of every image over commonality, and what each model loses when the object goes.

    Parameters
    ----------
    relative : Relative
        From :func:`relative_maps`.

    Returns
    -------
    pd.DataFrame
        ``SCHEMA`` with columns ``k``, ``drop`` (of accuracy) and ``logit_drop`` besides.
    """
    masks, parts = _masks(relative.data), []
    for variant, signed in VARIANTS.items():
        g = {key: bam.concept_attribution(values, masks, signed).values for key, values in relative.maps.items()}
        for (template, k, method), values in g.items():
            if k != ALL:
                both = relative.correct[template, k] & relative.correct[template, ALL]
                contrast = (values - g[template, ALL, method]).masked_fill(~both, torch.nan)
                cell = {"metric": "RMCS", "variant": variant, "model": template, "method": method}
                drops = {"drop": relative.drop[template, k], "logit_drop": relative.logit_drop[template, k]}
                rest = {"image": relative.data.ids, "value": contrast, "k": k}
                parts.append(pd.DataFrame(cell | rest | drops))
    columns = [*SCHEMA.columns, "k", "drop", "logit_drop"]
    return SCHEMA.validate(pd.concat(parts, ignore_index=True)) if parts else pd.DataFrame(columns=columns)


def harmonized_relative(run: Run, relative: Relative) -> pd.DataFrame:
    """RMCS of the consensus of the architectures that have models of all commonalities, and of its members.

    Parameters
    ----------
    run : Run
        Gives rules and ``harmonized_methods``.
    relative : Relative
        From :func:`relative_maps`.

    Returns
    -------
    pd.DataFrame
        Columns ``metric`` (RMCS), ``variant``, ``rule``, ``k``, ``method``, ``image``, ``consensus``, ``members``;
        empty for fewer than two architectures. Nobody is held out: all of them are members. Of two members the
        median is the mean, and has no rows of its own.
    """
    settings, names, parts = run.settings, run.settings.relative_models, []
    ks = (*settings.commonalities, ALL)
    methods = [m for m in settings.harmonized_methods if all((name, ALL, m) in relative.maps for name in names)]
    twice = {"median"} if len(names) == 2 and "mean" in settings.rules else set()
    for rule in [r for r in settings.rules if r not in twice] if len(names) > 1 else ():
        for method in methods:
            alone, together = {}, {}
            for k in ks:
                given = {name: _entering(relative.maps[name, k, method], False) for name in names}
                both = _alone_and_together(given, {"all": names}, rule, False)
                one, many = (
                    {key: bam.concept_attribution(m, _masks(relative.data)).values for key, m in part.items()}
                    for part in both
                )
                alone[k], together[k] = torch.stack([one[name] for name in names]), many["all"]
            for k in settings.commonalities:
                counted = torch.stack([relative.correct[name, j] for name in names for j in (k, ALL)]).all(0)
                cell = {"metric": "RMCS", "variant": "original", "rule": rule, "k": k, "method": method}
                values = {"consensus": together[k] - together[ALL], "members": (alone[k] - alone[ALL]).mean(0)}
                columns = {key: v.masked_fill(~counted, torch.nan).numpy() for key, v in values.items()}
                parts.append(pd.DataFrame(cell | {"image": relative.data.ids} | columns))
    return pd.concat(parts, ignore_index=True) if parts else pd.DataFrame(columns=["metric", "rule", "method"])


def relative_correlation(run: Run, relative: pd.DataFrame) -> pd.DataFrame:
    """Correlation of RMCS, over commonality, with what models lose when the object goes.

    Parameters
    ----------
    run : Run
        Gives the seed.
    relative : pd.DataFrame
        From :func:`relative_scores`.

    Returns
    -------
    pd.DataFrame
        Columns ``against`` (``"drop"`` of accuracy, as BAM has it, ``"logit_drop"``, which does not saturate),
        ``variant``, ``model`` (``"ReLU CNNs"``: mean of the correlations of :func:`original_models`), ``method``,
        ``mean``, ``low``, ``high``, ``n``.

    Notes
    -----
    The interval resamples images. It does not cover that there are few commonalities.
    """
    rows, judged = [], original_models(run, relative)
    cells = relative[~relative["method"].isin(CONTROLS)].groupby(["variant", "method"], sort=False)
    for (variant, method), part in cells:
        models = list(dict.fromkeys(part["model"]))
        wide = {
            name: np.stack(
                [
                    part[part["model"] == model].pivot(index="k", columns="image", values=name).to_numpy(float)
                    for model in models
                ]
            )
            for name in ("value", *DROPS)
        }
        places = {model: [i] for i, model in enumerate(models)}
        if cnns := [places[model][0] for model in models if model in judged]:
            places[RELU] = cnns
        for against in DROPS:
            for model, chosen in places.items():
                found = bam.contrast_correlation(wide["value"][chosen], wide[against][chosen], run.settings.seed)
                rows.append((against, variant, model, method, *found[:4]))
    return pd.DataFrame(rows, columns=["against", "variant", "model", "method", "mean", "low", "high", "n"])


# Harmonized maps.


def _entering(maps: Tensor, signed: bool) -> Tensor:
    """Maps as they enter a rule: on BAM's own scale; a map without scale is 0, which has no vote."""
    return bam.scaled_map(maps, signed).nan_to_num(0)


def _alone_and_together(
    scaled: Mapping[str, Tensor], pools: Mapping[str, Sequence[str]], rule: str, signed: bool
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The rule applied to every model's scaled maps alone, and to every pool.

    Signed maps keep their zero: rules of values divide by the sum of magnitudes instead of shifting the least value
    to 0.
    """
    normalization = "l1" if signed and RULES[rule].normalization is not None else None
    apply = partial(consensus, rule=rule, normalization=normalization)
    alone = {name: apply(values[None]) for name, values in scaled.items()}
    return alone, {name: apply(torch.stack([scaled[m] for m in pool])) for name, pool in pools.items()}


def held_out(names: Iterable[str], models: Mapping[str, Model]) -> dict[str, list[str]]:
    """Whose maps make the consensus for each model: those of all other architectures.

    Parameters
    ----------
    names : Iterable[str]
        Models that have maps.
    models : Mapping[str, Model]
        Models by name.

    Returns
    -------
    dict[str, list[str]]
        Model to its pool, where the pool has two members at least.
    """
    names = list(names)
    pools = {n: [m for m in names if models[m].architecture != models[n].architecture] for n in names}
    return {name: pool for name, pool in pools.items() if len(pool) > 1}


def harmonized_scores(run: Run, bench: Bench, maps: Maps) -> pd.DataFrame:
    """MCS, IDR and IIR of the consensus of all other architectures, and of its members alone under the same rule.

    Parameters
    ----------
    run : Run
        Gives rules, ``harmonized_methods`` and threshold.
    bench : Bench
        From :func:`prepare`.
    maps : Maps
        From :func:`all_maps`.

    Returns
    -------
    pd.DataFrame
        Columns ``metric``, ``variant``, ``rule``, ``target``, ``method``, ``image``, ``consensus``, ``members`` (their
        mean), ``object``, ``member_object`` (attribution of the object by models trained for objects), ``scene``,
        ``member_scene`` (by models trained for scenes). Only images that count for every member have values. The
        signed variant has the rule ``rule`` alone.
    """
    settings, masks = run.settings, _masks(run.dataset)
    methods = [method for method in settings.harmonized_methods if method in settings.methods]
    parts = []
    jobs = [(variant, method) for variant in VARIANTS for method in methods]
    for variant, method in tqdm(jobs, desc="harmonized maps", mininterval=1):
        signed = VARIANTS[variant]
        names = [name for name in run.models if (OBJECT, name, method) in maps]
        pools = held_out(names, run.models)
        scaled = {c: {name: _entering(maps[c, name, method], signed) for name in names} for c in CONDITIONS}
        for rule in [settings.rule] if signed else settings.rules:
            alone, together = {}, {}
            for condition in CONDITIONS:
                alone[condition], together[condition] = (
                    {name: bam.concept_attribution(values, masks, signed).values for name, values in part.items()}
                    for part in _alone_and_together(scaled[condition], pools, rule, signed)
                )
            for metric, (a, b) in PAIRS.items():
                for target, pool in pools.items():
                    counted = torch.stack([bench.correct[metric][name] for name in pool]).all(0)
                    members = torch.stack(
                        [_compare(metric, alone[a][m], alone[b][m], settings.threshold) for m in pool]
                    ).mean(0)
                    pooled = _compare(metric, together[a][target], together[b][target], settings.threshold)
                    values = {
                        "consensus": pooled,
                        "members": members,
                        "object": together[OBJECT][target],
                        "scene": together[SCENE][target],
                        "member_object": torch.stack([alone[OBJECT][m] for m in pool]).mean(0),
                        "member_scene": torch.stack([alone[SCENE][m] for m in pool]).mean(0),
                    }
                    cell = {"metric": metric, "variant": variant, "rule": rule, "target": target, "method": method}
                    columns = {k: v.masked_fill(~counted, torch.nan).numpy() for k, v in values.items()}
                    parts.append(pd.DataFrame(cell | {"image": run.dataset.ids} | columns))
    return pd.concat(parts, ignore_index=True)


def compare_harmonized(run: Run, table: pd.DataFrame, by: Sequence[str] = ()) -> pd.DataFrame:
    """Consensus minus members, paired by image.

    Parameters
    ----------
    run : Run
        Gives the seed.
    table : pd.DataFrame
        From :func:`harmonized_scores` or :func:`harmonized_relative`.
    by : Sequence[str]
        Columns to keep apart beside metric, variant and rule.

    Returns
    -------
    pd.DataFrame
        Columns ``metric``, ``variant``, ``rule``, ``by``, ``consensus`` and ``members`` (means), ``mean``, ``low``,
        ``high`` (of the difference), ``n``, ``p``, ``holm`` (over the rows of one metric and variant).
    """
    rows, keys = [], ["metric", "variant", "rule", *by]
    for key, part in table.groupby(keys, sort=False):
        means = part.groupby("image", sort=False)[["consensus", "members"]].mean()
        difference = paired_difference(means["consensus"], means["members"], run.settings.seed)
        rows.append((*key, *means.mean(), *difference))
    result = pd.DataFrame(rows, columns=[*keys, "consensus", "members", "mean", "low", "high", "n", "p"])
    result["holm"] = result.groupby(["metric", "variant"])["p"].transform(lambda p: holm(p.to_numpy(float)))
    return result


# Verdicts.


def _by_image(table: pd.DataFrame, metric: str, models: Sequence[str]) -> pd.DataFrame:
    """Original values, images x methods, mean over the models on which the image counts."""
    part = table[(table["metric"] == metric) & (table["variant"] == "original") & table["model"].isin(models)]
    return part.pivot_table(index="image", columns="method", values="value", aggfunc="mean", sort=False)


def best_other(wide: pd.DataFrame, methods: Sequence[str]) -> pd.Series:
    """For every image the value of the method that is best on the other half of the images.

    Parameters
    ----------
    wide : pd.DataFrame
        Images x methods, higher is better.
    methods : Sequence[str]
        The methods to choose from.

    Returns
    -------
    pd.Series
        One value per image.
    """
    parts = []
    for half in (0, 1):
        chosen = wide.iloc[1 - half :: 2][list(methods)].mean().idxmax()
        parts.append(wide.iloc[half::2][chosen])
    return pd.concat(parts).reindex(wide.index)


def measured(
    run: Run,
    table: pd.DataFrame,
    agreement: Mapping[str, Interval],
    correlation: pd.DataFrame,
    harmonized: pd.DataFrame,
) -> dict[str, Interval]:
    """What the notebook's claims are judged by.

    Parameters
    ----------
    run : Run
        Gives rule and seed.
    table : pd.DataFrame
        From :func:`scores`.
    agreement : Mapping[str, Interval]
        From :func:`ranked`.
    correlation : pd.DataFrame
        From :func:`relative_correlation`.
    harmonized : pd.DataFrame
        From :func:`harmonized_scores`.

    Returns
    -------
    dict[str, Interval]
        Claim id to interval; n = 0 where there is nothing to measure.
    """
    seed, nothing = run.settings.seed, Interval(np.nan, np.nan, np.nan, 0)
    found = dict.fromkeys(
        ("bam_grad_cam_contrast", "bam_smoothgrad_gradient", "bam_smoothgrad_ig", "bam_dependence", "bam_independence"),
        nothing,
    )
    models = original_models(run, table)
    first = ["grad_cam", "saliency"]
    wide = {metric: _by_image(table, metric, models) for metric in METRICS}
    judges = {*first, "smoothgrad_squared", "integrated_gradients", "integrated_gradients_smoothgrad"}
    if all(judges <= set(part) and len(part) > 3 for part in wide.values()):
        contrast = wide["MCS"]
        others = [method for method in run.settings.methods if method in contrast and method not in first]
        smooth = contrast["integrated_gradients_smoothgrad"], contrast["integrated_gradients"]
        best = best_other(contrast, [*others, "saliency"])
        found["bam_grad_cam_contrast"] = paired_difference(contrast["grad_cam"], best, seed)
        found["bam_smoothgrad_gradient"] = paired_difference(contrast["smoothgrad_squared"], contrast["saliency"], seed)
        found["bam_smoothgrad_ig"] = paired_difference(*smooth, seed)
        least = {metric: 1 - best_other(wide[metric], others) for metric in ("IDR", "IIR")}
        found["bam_dependence"] = paired_difference(1 - wide["IDR"][first].mean(1), least["IDR"], seed)
        found["bam_independence"] = bootstrap_interval(least["IIR"], seed)
    found["bam_rankings"] = agreement.get(f"{RELU}, original", nothing)
    row = correlation[
        (correlation["variant"] == "original") & (correlation["model"] == RELU) & (correlation["method"] == "grad_cam")
    ]
    found["bam_relative"] = Interval(*row.iloc[0][["mean", "low", "high", "n"]]) if len(row) else nothing
    judged = harmonized[(harmonized["rule"] == run.settings.rule) & (harmonized["variant"] == "original")]
    sides = {
        metric: part.groupby("image", sort=False)[["consensus", "members"]].mean()
        for metric, part in judged.groupby("metric")
    }
    for claim, metric in (("harmonized_dependence", "IDR"), ("harmonized_independence", "IIR")):
        found[claim] = paired_difference(sides[metric]["members"], sides[metric]["consensus"], seed)
    found["harmonized_inherits"] = neglect_left(judged[judged["metric"] == "MCS"], seed)
    return found


def neglect_left(table: pd.DataFrame, seed: int, n_resamples: int = 2000) -> Interval:
    """How much of its members' neglect of the object a consensus of models for scenes has left.

    Neglect is 1 - (attribution of the object by models for scenes) / (by models for objects), which does not change
    when a rule lifts both, as smoothing does.

    Parameters
    ----------
    table : pd.DataFrame
        From :func:`harmonized_scores`, of one metric, rule and variant.
    seed : int
        Seed of the bootstrap over images, which recomputes all means.
    n_resamples : int
        Bootstrap resamples.

    Returns
    -------
    Interval
        Neglect of the consensus over that of its members, means over images, methods and pools.
    """
    columns = ["scene", "object", "member_scene", "member_object"]
    values = table.groupby("image", sort=False)[columns].mean().dropna().to_numpy()
    n = len(values)
    if not n:
        return Interval(np.nan, np.nan, np.nan, 0)
    weights = np.random.default_rng(seed).multinomial(n, np.full(n, 1 / n), size=n_resamples)
    scene, thing, member_scene, member_object = (np.vstack([np.ones(n), weights]) @ values).T
    share = (1 - scene / thing) / (1 - member_scene / member_object)
    low, high = np.quantile(share[1:], [0.025, 0.975])
    return Interval(float(share[0]), float(low), float(high), n)


def facts(run: Run, bench: Bench, table: pd.DataFrame, relative: pd.DataFrame) -> dict[str, bool]:
    """What must hold whatever the methods are worth.

    Parameters
    ----------
    run : Run
        The run.
    bench : Bench
        From :func:`prepare`.
    table : pd.DataFrame
        From :func:`scores`.
    relative : pd.DataFrame
        From :func:`relative_scores`.

    Returns
    -------
    dict[str, bool]
        Statement to whether it holds.
    """
    center = table[table["method"] == "center"].groupby("metric")["value"]
    noise = {
        metric: bootstrap_interval(
            _by_image(table, metric, list(run.models)).get("random", []), run.settings.seed, 0.999
        )
        for metric in METRICS
    }
    accepted = bench.patch.change[bench.patch.accepted]
    methods = {name: len(_given(table, name, run.settings.methods)) for name in run.models}
    return {
        "at least 9 methods on every architecture": min(methods.values()) >= 9,
        "at least 12 methods on every ReLU CNN": min((methods[name] for name in original_models(run, table)), default=0)
        >= 12,
        "3 controls on every architecture": all(len(_given(table, name, CONTROLS)) == 3 for name in run.models),
        "at least 6 architectures": len({model.architecture for model in run.models.values()}) >= 6,
        "RMCS at 5 commonalities or more": relative["k"].nunique() >= 5,
        "every accepted patch changes the logits by no more than the bound": bool(
            (accepted <= run.settings.bound).all()
        ),
        "a map that ignores model and image has MCS 0, IDR 0 and IIR 1": bool(
            (center.min() == [0, 1, 0]).all() and (center.max() == [0, 1, 0]).all()
        ),
        "random maps: the 99.9 % interval of MCS holds 0": noise["MCS"].low <= 0 <= noise["MCS"].high,
        "random maps: the 99.9 % interval of IDR holds one half": noise["IDR"].low <= 0.5 <= noise["IDR"].high,
    }


# Figures.


def panels(run: Run, bench: Bench, maps: Maps, images: Sequence[int]) -> list[list[tuple[Tensor, str]]]:
    """What BAM shows to which model, and one method's map of each.

    Parameters
    ----------
    run : Run
        Gives the first model and the first method.
    bench : Bench
        From :func:`prepare`.
    maps : Maps
        From :func:`all_maps`.
    images : Sequence[int]
        Their places.

    Returns
    -------
    list[list[tuple[Tensor, str]]]
        One row per image for ``plots.gallery``.
    """
    name, method = next(iter(run.models)), run.settings.methods[0]
    titles = {
        OBJECT: "objects",
        SCENE: "scenes",
        BARE: "scenes,\nbare",
        SCENE_ONLY: "bare scenes,\nbare",
        PATCHED: "bare scenes,\npatch",
    }
    rows = []
    for row, i in enumerate(images):
        shown = [
            (bench.data[OBJECT].images[i], "with object"),
            (_masks(run.dataset)[i], "mask"),
            (bench.data[BARE].images[i], "bare"),
            (bench.data[PATCHED].images[i], "patch"),
            *((maps[condition, name, method][i], title) for condition, title in titles.items()),
        ]
        rows.append([(panel, "" if row else title) for panel, title in shown])
    return rows


def draw_patches(run: Run, table: pd.DataFrame) -> Figure:
    """Change of the logits by objects and by patches.

    Parameters
    ----------
    run : Run
        Gives the bound.
    table : pd.DataFrame
        From :func:`patch_table`.

    Returns
    -------
    Figure
        Boxes, one pair per model.
    """
    figure, ax = plt.subplots(figsize=(6.2, 2.8))
    shown = table.assign(model=table["model"].map(plots.label), change=table["change"].clip(lower=1e-4))
    sns.boxplot(shown, x="change", y="model", hue="shown", log_scale=True, fliersize=2, linewidth=0.8, ax=ax)
    ax.axvline(run.settings.bound, color="0.3", ls="--", lw=1)
    ax.set(title="What the object, and the patch made from it, do to the logits", ylabel="")
    ax.set_xlabel(f"change of the logits, share of their norm (dashed: bound {run.settings.bound:g})")
    ax.legend(title=None, loc="upper left", bbox_to_anchor=(1, 1))
    return figure


def draw_metrics(run: Run, table: pd.DataFrame, variant: str) -> tuple[Figure, pd.DataFrame]:
    """The three metrics of every method, mean over models, single models and controls beside it.

    Methods that are not defined on all models come last, below a line, and say on how many they are: their means are
    over other models than those above.

    Parameters
    ----------
    run : Run
        Gives methods and seed.
    table : pd.DataFrame
        From :func:`scores`.
    variant : str
        ``"original"`` or ``"signed"``.

    Returns
    -------
    tuple[Figure, pd.DataFrame]
        The figure and its numbers, single models included (``model`` is ``"mean"`` for the mean over the models on
        which an image counts, ``models`` their number).
    """
    part, seed = table[table["variant"] == variant], run.settings.seed
    means = summarize(part, ["metric", "method"], "value", seed)
    single = summarize(part, ["metric", "method", "model"], "value", seed)
    means["models"] = means["method"].map(single.groupby("method")["model"].nunique())
    top = means[(means["metric"] == "MCS") & means["method"].isin(run.settings.methods)].assign(
        everywhere=lambda rows: rows["models"] == len(run.models)
    )
    top = top.sort_values(["everywhere", "mean"], ascending=False)
    figure, axes = plt.subplots(1, 3, figsize=(7.4, 3.8))
    plots.small_forests(axes, means, single, "metric", "method", METRICS, list(top["method"]), CONTROLS)
    names = [
        plots.label(row.method) + ("" if row.everywhere else f" ({row.models} of {len(run.models)})")
        for row in top.itertuples()
    ]
    axes[0].set_yticklabels(names)
    for ax, unit in zip(axes, ("difference of attribution", "share of images", "share of images"), strict=True):
        ax.set_xlabel(unit, fontsize=7)
    note = f"images of IIR: {_images(part, 'IIR')}"
    if not top["everywhere"].all():
        for ax in axes:
            ax.axhline(top["everywhere"].sum() - 0.5, color="0.2", lw=1)
        note = f"below the line: not on all {len(run.models)} models, so not comparable with the rows above\n{note}"
    figure.supxlabel(note, fontsize=7)
    axes[0].figure.suptitle(
        f"BAM's metrics ({variant}), higher is better",
        fontsize=9,
        fontweight="bold",
        x=0.01,
        ha="left",
    )
    return figure, pd.concat([means.assign(model="mean"), single], ignore_index=True)


def _images(table: pd.DataFrame, metric: str, column: str = "model", value: str = "value") -> str:
    """On how many images each model's values rest, in words."""
    counted = table[(table["metric"] == metric) & table[value].notna()].groupby(column)["image"].nunique()
    return ", ".join(f"{plots.label(name)} {counted.get(name, 0)}" for name in dict.fromkeys(table[column]))


def draw_models(run: Run, table: pd.DataFrame, variant: str = "original") -> tuple[Figure, pd.DataFrame]:
    """The three metrics of every method on every model, with the number of images beside the model.

    Parameters
    ----------
    run : Run
        Gives methods and seed.
    table : pd.DataFrame
        From :func:`scores`.
    variant : str
        ``"original"`` or ``"signed"``.

    Returns
    -------
    tuple[Figure, pd.DataFrame]
        The figure and its numbers.
    """
    part = table[table["variant"] == variant]
    cells = summarize(part, ["metric", "method", "model"], "value", run.settings.seed)
    order = pd.CategoricalDtype([*run.settings.methods, *CONTROLS], ordered=True)
    cells = cells.astype({"method": order, "model": pd.CategoricalDtype(list(run.models), ordered=True)})
    figure, axes = plt.subplots(1, 3, figsize=(9.2, 4.4), sharey=True)
    limit = float(cells.loc[cells["metric"] == "MCS", "mean"].abs().max())
    looks = {"MCS": ((-limit, limit), "RdBu"), "IDR": ((0, 1), "viridis"), "IIR": ((0, 1), "viridis")}
    for ax, (metric, (limits, colors)) in zip(axes, looks.items(), strict=True):
        chosen = cells[cells["metric"] == metric]
        plots.matrix(ax, chosen, "method", "model", "mean", metric, limits, colors)
        counted = chosen.groupby("model", observed=True)["n"].max()
        ax.set_xticklabels([f"{plots.label(str(name))} ({n})" for name, n in counted.items()])
        ax.set(xlabel="", ylabel="")
        ax.set_facecolor("0.88")
        ax.grid(visible=False)
    figure.suptitle(f"{variant.capitalize()} scale of g", fontsize=9, fontweight="bold", x=0.01, ha="left")
    return figure, cells


def draw_ranks(ranks: pd.DataFrame, agreement: Mapping[str, Interval], variant: str = "original") -> Figure:
    """Ranks of methods by metric.

    Parameters
    ----------
    ranks : pd.DataFrame
        From :func:`ranked`.
    agreement : Mapping[str, Interval]
        From :func:`ranked`.
    variant : str
        ``"original"`` or ``"signed"``.

    Returns
    -------
    Figure
        One panel per group of models.
    """
    part = ranks[ranks["variant"] == variant]
    names = list(dict.fromkeys(part["models"]))
    figure, axes = plt.subplots(1, len(names), figsize=(7.2, 3.8), squeeze=False)
    for ax, name in zip(axes[0], names, strict=True):
        w = agreement[f"{name}, {variant}"]
        title = f"{name}: W = {w.mean:.2f} [{w.low:.2f}, {w.high:.2f}]"
        cells = part[part["models"] == name]
        order = cells.groupby("method")["rank"].mean().sort_values().index
        orders = {"method": list(order), "metric": list(METRICS)}
        cells = cells.astype({key: pd.CategoricalDtype(some, ordered=True) for key, some in orders.items()})
        plots.tiles(ax, cells.sort_values([*orders]), "method", "metric", "rank", title, cmap="viridis_r")
        ax.set_xticks(ax.get_xticks(), METRICS, rotation=0, ha="center")
        ax.set_title(title, fontsize=8)
    figure.suptitle(f"{variant.capitalize()} scale of g", fontsize=9, fontweight="bold", x=0.01, ha="left")
    return figure


def draw_relative(run: Run, relative: pd.DataFrame) -> tuple[Figure, pd.DataFrame]:
    """RMCS over commonality, and below it what the models lose when the object goes.

    Parameters
    ----------
    run : Run
        Gives methods and seed.
    relative : pd.DataFrame
        From :func:`relative_scores`.

    Returns
    -------
    tuple[Figure, pd.DataFrame]
        The figure and its numbers: all methods and controls; ``line`` is ``"RMCS"`` or one of ``DROPS``.
    """
    seed, part = run.settings.seed, relative[relative["variant"] == "original"]
    lines = summarize(part, ["model", "method", "k"], "value", seed).assign(line="RMCS")
    drops = pd.concat(
        [summarize(part, ["model", "k"], name, seed).assign(line=line, method=line) for name, line in DROPS.items()]
    )
    names = list(dict.fromkeys(part["model"]))
    wanted = ("grad_cam", "saliency", "smoothgrad_squared", "integrated_gradients", "occlusion", "guided_backprop")
    shown = [method for method in wanted if method in run.settings.methods]
    size = (3.1 * len(names) + 1.4, 5.2)
    ratios = {"height_ratios": [2, 1, 1]}
    figure, axes = plt.subplots(
        3, len(names), figsize=size, sharex=True, sharey="row", squeeze=False, gridspec_kw=ratios
    )
    for column, name in zip(axes.T, names, strict=True):
        chosen = lines[(lines["model"] == name) & lines["method"].isin([*shown, "random"])]
        plots.curves(column[0], chosen, "k", "method", pool_in_words([name]), ["random"], shown)
        for ax, line in zip(column[1:], DROPS.values(), strict=True):
            cells = drops[(drops["model"] == name) & (drops["line"] == line)]
            plots.curves(ax, cells, "k", "method", "", [line])
            ax.lines[0].set(color="0.1", linestyle="-")
            ax.axhline(0, color="0.5", lw=0.6)
        for ax in column[:2]:
            ax.set_xlabel("")
        column[2].set(xlabel="scene classes with the object (of 10)", xticks=sorted(set(part["k"])))
    for ax, line in zip(axes[:, 0], ("RMCS", *DROPS.values()), strict=True):
        ax.set_ylabel(line)
    entries = {name: line for ax in axes[0] for line, name in zip(*ax.get_legend_handles_labels(), strict=True)}
    axes[0, -1].legend(entries.values(), entries, fontsize=7, loc="upper left", bbox_to_anchor=(1, 1))
    return figure, pd.concat([lines, drops], ignore_index=True)


def pool_in_words(templates: Sequence[str]) -> str:
    """Architectures of models of all commonalities.

    Parameters
    ----------
    templates : Sequence[str]
        As the parameter ``relative_models`` has them.

    Returns
    -------
    str
        E.g. ``"ResNet and Swin"``.
    """
    return " and ".join(plots.label(name.partition("-")[0]) for name in templates)


def draw_harmonized(table: pd.DataFrame, y: str, title: str, hue: str | None = None) -> Figure:
    """Consensus minus members, one panel per metric.

    Parameters
    ----------
    table : pd.DataFrame
        From :func:`compare_harmonized`.
    y : str
        Column on the vertical axis.
    title : str
        What it shows.
    hue : str | None
        Column that tells groups apart.

    Returns
    -------
    Figure
        The figure.
    """
    metrics = list(dict.fromkeys(table["metric"]))
    size = (max(4.8, 1.4 + 2 * len(metrics)), 1.3 + 0.24 * table[y].nunique())
    figure, axes = plt.subplots(1, len(metrics), figsize=size, sharey=True, squeeze=False)
    for ax, metric in zip(axes[0], metrics, strict=True):
        part = table[table["metric"] == metric]
        plots.forest(ax, part, y, "", "", hue)
        n = "–".join(str(count) for count in sorted({part["n"].min(), part["n"].max()}))
        ax.set_title(f"{metric} (n = {n})", fontsize=8)
        ax.locator_params(axis="x", nbins=4)
        ax.tick_params(axis="x", labelsize=7)
    if hue:
        lines, texts = axes[0, 0].get_legend_handles_labels()
        figure.legend(lines, texts, loc="outside right upper", fontsize=7)
    figure.supxlabel("consensus − members (95 % interval)", fontsize=8)
    figure.suptitle(title, fontsize=9, fontweight="bold", x=0.01, ha="left")
    return figure


def shortcut_table(run: Run, harmonized: pd.DataFrame) -> pd.DataFrame:
    """How strongly single maps and their consensus mark the object, where models need it and where they do not.

    Parameters
    ----------
    run : Run
        Gives rule and seed.
    harmonized : pd.DataFrame
        From :func:`harmonized_scores`.

    Returns
    -------
    pd.DataFrame
        Columns ``maps`` (trained for what, single or consensus), ``method``, ``mean``, ``low``, ``high``, ``n``.
    """
    part = harmonized[
        (harmonized["rule"] == run.settings.rule)
        & (harmonized["variant"] == "original")
        & (harmonized["metric"] == "MCS")
    ]
    kinds = {
        "member_object": "objects, single",
        "object": "objects, consensus",
        "member_scene": "scenes, single",
        "scene": "scenes, consensus",
    }
    parts = [
        summarize(part, ["method"], column, run.settings.seed).assign(maps=label) for column, label in kinds.items()
    ]
    return pd.concat(parts, ignore_index=True)


def draw_correlation(run: Run, correlation: pd.DataFrame) -> tuple[Figure, pd.DataFrame]:
    """Correlation of RMCS with the loss of accuracy and of the logit, by method and model.

    Parameters
    ----------
    run : Run
        Gives methods.
    correlation : pd.DataFrame
        From :func:`relative_correlation`.

    Returns
    -------
    tuple[Figure, pd.DataFrame]
        The figure (original variant, single models) and its numbers (all).
    """
    part = correlation[(correlation["variant"] == "original") & (correlation["model"] != RELU)]
    part = part.assign(model=[pool_in_words([name]) for name in part["model"]])
    count = part["method"].nunique()
    figure, axes = plt.subplots(1, 2, figsize=(7.4, 1 + 0.26 * count), sharey=True)
    for ax, (against, line) in zip(axes, DROPS.items(), strict=True):
        plots.forest(ax, part[part["against"] == against], "method", "", "Pearson correlation", hue="model")
        ax.set_title(f"with {line}", fontsize=8)
        ax.set(xlim=(-1.05, 1.05), xticks=[-1, -0.5, 0, 0.5, 1], ylim=(count - 0.5, -0.5))
    axes[0].axvline(0.92, color="0.5", ls=":", lw=1)
    axes[1].legend(fontsize=7, loc="upper left", bbox_to_anchor=(1, 1))
    title = "Does relative contrast follow what models lose with the object?"
    figure.suptitle(title, fontsize=9, fontweight="bold", x=0.01, ha="left")
    return figure, correlation


def findings(
    run: Run,
    table: pd.DataFrame,
    agreement: Mapping[str, Interval],
    harmonized: pd.DataFrame,
    by_rule: pd.DataFrame,
) -> str:
    """Say what the tables of single and harmonized maps show, beyond the ledger.

    Parameters
    ----------
    run : Run
        Gives seed, models and methods.
    table : pd.DataFrame
        From :func:`scores`.
    agreement : Mapping[str, Interval]
        From :func:`ranked`.
    harmonized : pd.DataFrame
        From :func:`harmonized_scores`.
    by_rule : pd.DataFrame
        From :func:`compare_harmonized`.

    Returns
    -------
    str
        Markdown, one line per finding. Extremes are taken over methods that are defined on all models of a group.
    """
    given = {name: _given(table, name, run.settings.methods) for name in run.models}
    lines = [f"- Methods by model: {', '.join(f'{plots.label(name)} {len(some)}' for name, some in given.items())}."]
    for method in run.settings.methods:
        where = [plots.label(name) for name, some in given.items() if method in some]
        if len(where) < len(given):
            lines.append(f"- {plots.label(method)}: on {len(where)} of {len(given)} models ({', '.join(where)}).")
    grouped = groups(run, table)
    for variant in VARIANTS:
        for group, (names, methods) in grouped.items():
            part = table[(table["variant"] == variant) & table["model"].isin(names) & table["method"].isin(methods)]
            means = summarize(part, ["metric", "method"], "value", run.settings.seed)
            for metric in METRICS:
                cells = means[means["metric"] == metric].dropna(subset="mean")
                told = f"- {metric} ({group}, {variant}; {len(methods)} methods)"
                if not len(cells):
                    lines.append(f"{told}: no image counts.")
                    continue
                best, worst = (
                    f"{plots.label(row.method)} {row.mean:.3f} [{row.low:.3f}, {row.high:.3f}], n = {row.n}"
                    for row in cells.loc[[cells["mean"].idxmax(), cells["mean"].idxmin()]].itertuples()
                )
                rest = f" Images: {_images(part, metric)}." if metric == "IIR" else ""
                lines.append(f"{told}: highest {best}; lowest {worst}.{rest}")
    for name, w in agreement.items():
        images = _images(table[table["model"].isin(grouped[name.partition(", ")[0]][0])], "IIR")
        told = f"{w.mean:.2f} [{w.low:.2f}, {w.high:.2f}], n = {w.n}"
        lines.append(f"- Kendall's W of the metrics ({name}): {told}. Images of IIR: {images}.")
    images = _images(harmonized[harmonized["variant"] == "original"], "IIR", "target", "consensus")
    kinds = {"RMCS": f" of {pool_in_words(run.settings.relative_models)}, nobody held out,"}
    for row in by_rule[by_rule["n"] > 0].itertuples():
        rest = f" Images by the architecture held out: {images}." if row.metric == "IIR" else ""
        told = f"consensus{kinds.get(row.metric, '')} ({plots.label(row.rule)}) {row.consensus:.3f}"
        gain = f"{row.mean:+.3f} [{row.low:+.3f}, {row.high:+.3f}], n = {row.n}, Holm-corrected p = {row.holm:.4f}"
        lines.append(f"- {row.metric}, {told}, members {row.members:.3f}: {gain}.{rest}")
    return "\n".join(lines)


def relative_findings(relative: pd.DataFrame, correlation: pd.DataFrame) -> str:
    """Say, architecture by architecture, what relative contrast shows, beyond the ledger.

    Parameters
    ----------
    relative : pd.DataFrame
        From :func:`relative_scores`.
    correlation : pd.DataFrame
        From :func:`relative_correlation`.

    Returns
    -------
    str
        Markdown, one line per finding.
    """
    lines = []
    for model, part in relative.groupby("model", sort=False):
        name = pool_in_words([model])
        for against, line in DROPS.items():
            drops = part.groupby("k")[against].mean()
            lost = drops.index[drops != 0]
            zeros = f"- {name}: the {line} is exactly 0 at {(drops == 0).sum()} of {len(drops)} commonalities"
            if len(lost) == 1:
                lines.append(
                    f"{zeros}, all but k = {lost[0]}, so a correlation with it is one point against the rest, which an "
                    "interval over images does not cover."
                )
            elif len(lost) < len(drops):
                lines.append(f"{zeros}.")
            rows = correlation.query("against == @against and model == @model and variant == 'original'").dropna()
            for row in rows[rows["method"] == "grad_cam"].itertuples():
                lines.append(
                    f"- {name}, Grad-CAM's RMCS and {line}: r = {row.mean:+.3f} [{row.low:+.3f}, {row.high:+.3f}], "
                    f"n = {row.n}."
                )
            if len(rows):
                lines.append(
                    f"- {name}, RMCS and {line}: correlation above 0 for {(rows['low'] > 0).sum()} of {len(rows)} "
                    f"methods, below 0 for {(rows['high'] < 0).sum()}."
                )
    return "\n".join(lines)
