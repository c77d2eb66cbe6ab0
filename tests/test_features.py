import numpy as np
import pytest
import torch
from scipy.sparse import lil_matrix
from scipy.sparse.linalg import spsolve

from harmonize_lib.errors import HarmonizeError
from harmonize_lib.features import (
    blur,
    feature_image,
    feature_mask,
    linear_imputation,
    patch_scores,
    rank_bounds,
    ranks,
    top_membership,
)


def seeded(seed):
    return torch.Generator().manual_seed(seed)


def random_maps(n=4, side=16, seed=0):
    return torch.randn(n, side, side, generator=seeded(seed))


def random_images(n=4, channels=3, side=16, seed=0):
    return torch.randint(0, 256, (n, channels, side, side), generator=seeded(seed), dtype=torch.uint8)


def test_patch_scores_are_means():
    maps = random_maps(2, 8)
    got = patch_scores(maps, 4)
    for n, i, j in np.ndindex(2, 2, 2):
        block = maps[n, 4 * i : 4 * i + 4, 4 * j : 4 * j + 4]
        assert got[n, i, j].item() == pytest.approx(block.mean().item(), abs=1e-6)


def test_ranks_equal_a_sort_and_break_ties_only():
    maps = random_maps()
    for m, r in zip(maps, ranks(maps), strict=True):
        assert [r.flatten()[i].item() for i in m.flatten().argsort(descending=True)] == list(range(256))
    tied = maps.round()
    for m, r in zip(tied.flatten(1), ranks(tied, seeded(3)).flatten(1), strict=True):
        assert (m[r.argsort()].diff() <= 0).all() and sorted(r.tolist()) == list(range(256))
    flat = torch.zeros(1, 16, 16)
    assert torch.equal(ranks(flat, seeded(3)), ranks(flat, seeded(3)))
    assert not torch.equal(ranks(flat, seeded(3)), ranks(flat, seeded(4)))


@pytest.mark.parametrize("patch", [1, 2, 4])
@pytest.mark.parametrize("fraction", [0.001, 0.1, 0.5, 1.0])
def test_feature_mask_keeps_the_top_patches(patch, fraction):
    maps = random_maps()
    mask = feature_mask(maps, fraction, patch)
    patches = (16 // patch) ** 2
    count = max(1, round(fraction * patches))
    for m, kept in zip(maps, mask, strict=True):
        scores = {}
        for i, j in np.ndindex(16 // patch, 16 // patch):
            block = np.s_[patch * i : patch * (i + 1), patch * j : patch * (j + 1)]
            assert kept[block].all() or not kept[block].any()
            scores[i, j] = m[block].mean().item()
        top = sorted(scores, key=scores.get, reverse=True)[:count]
        assert {(i, j) for i, j in scores if kept[patch * i, patch * j]} == set(top)


def test_feature_mask_counts_exactly_under_ties():
    maps = torch.zeros(3, 16, 16)
    maps[1, :4, :4] = 1
    maps[2] = -1
    mask = feature_mask(maps, 0.25, 4)
    assert (mask.sum((1, 2)) == 4 * 16).all() and mask[1, :4, :4].all()
    assert not torch.equal(feature_mask(maps, 0.25, 4, seeded(1)), feature_mask(maps, 0.25, 4, seeded(2)))


def test_ties_are_broken_evenly():
    flat = torch.zeros(1, 8, 8)
    on = torch.cat([feature_mask(flat, 0.25, 2, seeded(s))[:, ::2, ::2] for s in range(800)])
    assert (on.float().mean(0) - 0.25).abs().max() < 5 * (0.25 * 0.75 / 800) ** 0.5


def test_feature_mask_of_a_batch_equals_one_by_one():
    maps = random_maps().round()
    mask = feature_mask(maps, 0.3, 2)
    assert torch.equal(mask, torch.cat([feature_mask(m[None], 0.3, 2) for m in maps]))
    assert torch.equal(mask.flip(0), feature_mask(maps.flip(0), 0.3, 2))
    assert feature_mask(maps[:0], 0.3, 2).shape == (0, 16, 16)


@pytest.mark.parametrize("kind", ["uint8", "float"])
@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("fill", ["mean", "blur", "road"])
def test_feature_image_keeps_and_fills(fill, channels, kind):
    images = random_images(channels=channels)
    images = images if kind == "uint8" else images / 255
    mask = feature_mask(random_maps(), 0.3, 2)
    before = images.clone()
    got = feature_image(images, mask, fill)
    where = mask[:, None].expand_as(images)
    assert got.dtype == images.dtype and torch.equal(got[where], images[where])
    assert not torch.equal(got[~where], images[~where])
    assert torch.equal(images, before)
    assert torch.equal(got, feature_image(images, mask, fill))
    one_by_one = torch.cat([feature_image(i[None], m[None], fill) for i, m in zip(images, mask, strict=True)])
    assert torch.allclose(got.float(), one_by_one.float(), atol=1e-6)
    reverse = feature_image(images.flip(0), mask.flip(0), fill).flip(0)
    assert torch.allclose(got.float(), reverse.float(), atol=1e-6)
    other = feature_image(images, ~mask, fill)
    assert torch.equal(other[~where], images[~where])


def test_mean_fill_is_the_given_color():
    images, mask = random_images(), torch.zeros(4, 16, 16, dtype=torch.bool)
    assert feature_image(images, mask, mean=(10, 20.4, 30.6))[2, :, 5, 5].tolist() == [10, 20, 31]
    assert (feature_image(images, mask) == 128).all()
    assert (feature_image(images / 255, mask) == 0.5).all()
    assert torch.equal(feature_image(images, ~mask), images)


def test_blur_equals_a_literal_gaussian():
    image = torch.rand(1, 1, 16, 16, generator=seeded(0))
    weights = np.exp(-(np.arange(-5, 6) ** 2) / 50)
    weights /= weights.sum()
    padded = np.pad(image[0, 0].numpy(), 5, mode="reflect")
    kernel = np.outer(weights, weights)
    literal = [[(kernel * padded[i : i + 11, j : j + 11]).sum() for j in range(16)] for i in range(16)]
    assert np.allclose(blur(image)[0, 0], literal, atol=1e-6)
    assert blur(torch.rand(1, 1, 4, 3)).shape == (1, 1, 4, 3)


def literal_imputation(image, keep):
    channels, height, width = image.shape
    hidden = [tuple(p) for p in np.argwhere(~keep)]
    index = {p: i for i, p in enumerate(hidden)}
    system, right = lil_matrix((len(hidden), len(hidden))), np.zeros((len(hidden), channels))
    for (y, x), i in index.items():
        for dy, dx in np.ndindex(3, 3):
            v, u = y + dy - 1, x + dx - 1
            if (v, u) == (y, x) or not (0 <= v < height and 0 <= u < width):
                continue
            weight = 1 / 6 if v == y or u == x else 1 / 12
            system[i, i] += weight
            if keep[v, u]:
                right[i] += weight * image[:, v, u]
            else:
                system[i, index[v, u]] -= weight
    filled = image.copy()
    solution = spsolve(system.tocsc(), right).reshape(len(hidden), channels)
    for p, value in zip(hidden, solution, strict=True):
        filled[:, p[0], p[1]] = value
    return filled


@pytest.mark.parametrize(("height", "width"), [(12, 12), (7, 11), (1, 6), (5, 1)])
@pytest.mark.parametrize("part", [0.05, 0.5, 0.95])
def test_imputation_equals_the_sparse_direct_solution(height, width, part):
    images = torch.rand(3, 2, height, width, generator=seeded(0))
    keep = torch.rand(3, height, width, generator=seeded(1)) < part
    keep[:, height // 2, width // 2] = True
    got = linear_imputation(images, keep)
    for image, k, filled in zip(images, keep, got, strict=True):
        if not k.all():
            assert np.allclose(filled, literal_imputation(image.double().numpy(), k.numpy()), atol=1e-5)
    assert torch.equal(linear_imputation(images, torch.ones_like(keep)), images)


def test_imputation_at_full_size_from_one_patch():
    images, keep = torch.rand(2, 3, 64, 64, generator=seeded(0)), torch.zeros(2, 64, 64, dtype=torch.bool)
    keep[0, 8:12, 40:44] = True
    keep[1, -1, -1] = True
    got = linear_imputation(images, keep)
    assert np.allclose(got[0], literal_imputation(images[0].double().numpy(), keep[0].numpy()), atol=1e-5)
    assert torch.allclose(got[1], images[1, :, -1:, -1:].expand(3, 64, 64), atol=1e-5)


def test_imputation_leaves_an_affine_image_of_its_border(monkeypatch):
    ramp = torch.arange(16.0)[:, None] * 2 + torch.arange(16.0)
    keep = torch.ones(5, 16, 16, dtype=torch.bool)
    keep[:, 1:-1, 1:-1] = False
    images = ramp.expand(5, 1, 16, 16)
    assert torch.allclose(linear_imputation(images, keep), images, atol=1e-4)
    monkeypatch.setattr("harmonize_lib.features._SOLVER_BYTES", 4 * 16**3 * 2)
    assert torch.allclose(linear_imputation(images, keep), images, atol=1e-4)


def test_road_adds_noise_of_one_percent():
    images = torch.full((2, 3, 64, 64), 0.4)
    mask = torch.zeros(2, 64, 64, dtype=torch.bool)
    mask[:, :8] = True
    noise = (feature_image(images, mask, "road", generator=seeded(5)) - 0.4)[:, :, 8:]
    assert noise.std().item() == pytest.approx(0.01, rel=0.03) and abs(noise.mean().item()) < 5e-4
    assert not torch.equal(noise, (feature_image(images, mask, "road", generator=seeded(6)) - 0.4)[:, :, 8:])
    levels = feature_image((images * 255).to(torch.uint8), mask, "road")[:, :, 8:].float()
    assert levels.std().item() == pytest.approx(2.55, rel=0.05)


def test_road_with_nothing_kept_falls_back_to_the_mean():
    images, mask = random_images(), torch.zeros(4, 16, 16, dtype=torch.bool)
    mask[0, :4] = True
    got = feature_image(images, mask, "road", mean=(60, 120, 180)).float()
    assert torch.allclose(got[1:].mean((2, 3)), torch.tensor([60.0, 120, 180]).expand(3, 3), atol=1)
    assert torch.equal(got[0, :, :4], images[0, :, :4].float())


def test_rank_bounds_and_membership():
    low, high = rank_bounds(torch.tensor([[3.0, 1, 3, 2, -0.0, 0.0]]))
    assert low.tolist() == [[0, 3, 0, 2, 4, 4]] and high.tolist() == [[2, 4, 2, 3, 6, 6]]
    assert top_membership(low, high, 1).tolist() == [[0.5, 0, 0.5, 0, 0, 0]]
    assert top_membership(low, high, 5).tolist() == [[1, 1, 1, 1, 0.5, 0.5]]


MAPS = torch.zeros(2, 8, 8)
MASK = MAPS.bool()
IMAGES = torch.zeros(2, 3, 8, 8, dtype=torch.uint8)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: feature_mask(MAPS, 0, 4), "fraction=0 is out of range"),
        (lambda: feature_mask(MAPS, 1.5, 4), r"fraction=1\.5 is out of range"),
        (lambda: feature_mask(MAPS, float("nan"), 4), "fraction=nan"),
        (lambda: feature_mask(MAPS, 0.1, 3), "patch=3 does not divide maps of 8x8: use one of 1, 2, 4, 8"),
        (lambda: feature_mask(MAPS, 0.1, 0), "patch=0"),
        (lambda: feature_mask(MAPS, 0.1, 4.0), r"patch=4\.0"),
        (lambda: feature_mask(MAPS, 0.1, 4, 0), "generator must be a torch.Generator"),
        (lambda: feature_mask([MAPS], 0.1, 4), "the type list"),
        (lambda: feature_image(IMAGES, None), "mask is None: give torch.bool"),
        (lambda: feature_mask(MAPS[0], 0.1, 4), r"maps has shape \(8, 8\)"),
        (lambda: feature_mask(MAPS / 0, 0.1, 4), "2 of 2 maps hold NaN"),
        (lambda: feature_image(IMAGES, MASK, "blurr"), "did you mean 'blur'"),
        (lambda: feature_image(IMAGES, MASK[:1]), "does not match images"),
        (lambda: feature_image(IMAGES, MASK.float()), r"mask is torch\.float32"),
        (lambda: feature_image(IMAGES[0], MASK), "images has shape"),
        (lambda: feature_image(IMAGES.long(), MASK), r"images are torch\.int64"),
        (lambda: feature_image(IMAGES / 0, MASK), "images hold NaN"),
        (lambda: feature_image(IMAGES, MASK, mean=(1, 2)), r"mean has shape \(2,\)"),
        (lambda: linear_imputation(IMAGES.float(), MASK), "no kept pixel"),
    ],
)
def test_mistakes_are_named(call, message):
    with pytest.raises(HarmonizeError, match=message):
        call()
