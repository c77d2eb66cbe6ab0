import pytest
import torch
from torch import nn

from harmonize_lib.errors import HarmonizeError
from harmonize_lib.faithfulness import area, deletion, insertion, road
from harmonize_lib.features import blur, feature_image

METRICS = [insertion, deletion, road]


class Small(nn.Module):
    """A random network that takes source pixels through its own preprocessing."""

    def __init__(self):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.weight = nn.Parameter(torch.randn(4, 3, 5, 5, generator=generator))
        self.head = nn.Parameter(torch.randn(5, 4, generator=generator))

    def preprocess(self, images):
        x = images.float() / 255 if images.dtype == torch.uint8 else images.float()
        return (x - 0.45) / 0.25

    def forward(self, x):
        return nn.functional.conv2d(x, self.weight, padding=2).relu().mean((2, 3)) @ self.head.T


class Plain(nn.Module):
    """Probability of class 1 is the sigmoid of one pixel, or of the sum of all."""

    def __init__(self, pixel=None):
        super().__init__()
        self.pixel = pixel

    def forward(self, x):
        score = x.sum((1, 2, 3)) if self.pixel is None else x[(slice(None), 0, *self.pixel)]
        return torch.stack([torch.zeros_like(score), score], 1)


@pytest.fixture
def case():
    generator = torch.Generator().manual_seed(1)
    images = torch.randint(0, 256, (3, 3, 12, 12), generator=generator, dtype=torch.uint8)
    return Small().eval(), images, torch.tensor([0, 3, 4]), torch.randn(3, 12, 12, generator=generator)


def literal_curve(model, image, target, values, steps, metric, order):
    pixels = sorted(range(values.numel()), key=lambda i: -values.flatten()[i].item())
    if order == "lerf":
        pixels.reverse()
    curve = []
    for t in range(steps + 1):
        keep = torch.full((values.numel(),), metric is not insertion)
        for i in pixels[: round(t * len(pixels) / steps)]:
            keep[i] = metric is insertion
        keep = keep.view(values.shape)
        if metric is road:
            x = model.preprocess(feature_image(image[None], keep[None], "road"))
        else:
            x = model.preprocess(image[None])
            fill = blur(x) if metric is insertion else 0 * x
            x = x * keep + fill * ~keep
        curve.append(model(x).softmax(1)[0, target].item())
    return curve


@pytest.mark.parametrize("order", ["morf", "lerf"])
@pytest.mark.parametrize("steps", [1, 7, 12])
@pytest.mark.parametrize("metric", METRICS)
def test_curves_equal_the_definition(metric, steps, order, case):
    model, images, targets, maps = case
    got = metric(model, images, targets, maps, steps=steps, order=order)
    samples = zip(images, targets, maps, strict=True)
    expected = [literal_curve(model, *sample, steps, metric, order) for sample in samples]
    assert torch.allclose(got, torch.tensor(expected), atol=1e-5)


@pytest.mark.parametrize("metric", METRICS)
def test_invariants(metric, case):
    model, images, targets, maps = case
    maps = maps.round()
    before = images.clone(), maps.clone(), [p.clone() for p in model.parameters()]
    got = metric(model, images, targets, maps, steps=9)
    assert got.shape == (3, 10) and got.dtype == torch.float32 and not got.requires_grad
    for size in (1, 4, 1000):
        assert torch.allclose(got, metric(model, images, targets, maps, steps=9, batch_size=size), atol=1e-6)
    for i in range(3):
        single = metric(model, images[i : i + 1], targets[i : i + 1], maps[i : i + 1], steps=9)
        assert torch.allclose(got[i : i + 1], single, atol=1e-6)
    reverse = metric(model, images.flip(0), targets.flip(0), maps.flip(0), steps=9)
    assert torch.allclose(got, reverse.flip(0), atol=1e-6)
    assert torch.equal(images, before[0]) and torch.equal(maps, before[1])
    assert not model.training and torch.is_grad_enabled()
    for p, q in zip(model.parameters(), before[2], strict=True):
        assert p.requires_grad and p.grad is None and torch.equal(p, q)
    assert metric(model, images[:0], targets[:0], maps[:0], steps=9).shape == (0, 10)


def test_ends_are_the_image_and_the_fill(case):
    model, images, targets, maps = case
    x = model.preprocess(images)
    whole, gray, soft = (model(v).softmax(1).gather(1, targets[:, None])[:, 0] for v in (x, 0 * x, blur(x)))
    inserted, deleted, imputed = (m(model, images, targets, maps, steps=5) for m in METRICS)
    for curve in (inserted[:, -1], deleted[:, 0], imputed[:, 0]):
        assert torch.allclose(curve, whole, atol=1e-6)
    assert torch.allclose(inserted[:, 0], soft, atol=1e-6) and torch.allclose(deleted[:, -1], gray, atol=1e-6)


def test_insertion_of_the_top_is_deletion_of_the_bottom_backwards(case):
    model, images, targets, maps = case
    inserted = insertion(model, images, targets, maps, steps=12, fill="mean")
    assert torch.allclose(inserted, deletion(model, images, targets, maps, steps=12, order="lerf").flip(1), atol=1e-6)


def test_one_pixel_decides():
    images = torch.full((1, 1, 4, 4), 3.0)
    right, wrong = torch.zeros(2, 1, 4, 4)
    right[0, 1, 2], wrong[0, 1, 2] = 1, -1
    model, target = Plain((1, 2)).eval(), torch.tensor([1])
    high, low = torch.tensor(3.0).sigmoid().item(), 0.5
    found = deletion(model, images, target, right, steps=16)
    missed = deletion(model, images, target, wrong, steps=16)
    shown = insertion(model, images, target, right, steps=16, fill="mean")
    blurred = insertion(model, images, target, right, steps=16)
    assert found[0].tolist() == pytest.approx([high] + [low] * 16)
    assert missed[0].tolist() == pytest.approx([high] * 16 + [low])
    assert shown[0].tolist() == pytest.approx([low] + [high] * 16)
    assert blurred[0].tolist() == pytest.approx([high] * 17)


def test_additive_model_is_ordered_best_by_its_own_contributions():
    images = torch.randn(2, 1, 6, 6, generator=torch.Generator().manual_seed(0))
    model, target = Plain().eval(), torch.tensor([1, 1])
    own = area(deletion(model, images, target, images[:, 0], steps=36))
    for maps in torch.randn(20, 2, 6, 6, generator=torch.Generator().manual_seed(1)):
        assert (own < area(deletion(model, images, target, maps, steps=36))).all()
    assert (own < area(deletion(model, images, target, images[:, 0], steps=36, order="lerf"))).all()


def test_correct_counts_the_top_class(case):
    model, images, _, maps = case
    labels = model(model.preprocess(images)).argmax(1)
    for metric in METRICS:
        curve = metric(model, images, labels, maps, steps=6, score="correct")
        probability = metric(model, images, labels, maps, steps=6)
        assert set(curve.unique().tolist()) <= {0.0, 1.0} and (probability[curve == 1] >= 0.2).all()
        assert (curve[:, -1 if metric is insertion else 0] == 1).all()
        assert (curve[probability > 0.5] == 1).all()


def test_maps_with_nan_are_undefined(case):
    model, images, targets, maps = case
    expected = deletion(model, images, targets, maps, steps=4)
    maps = maps.clone()
    maps[1, 0, 0] = torch.nan
    got = deletion(model, images, targets, maps, steps=4)
    assert got[1].isnan().all() and torch.allclose(got[[0, 2]], expected[[0, 2]])


def test_area():
    assert area(torch.tensor([[1.0, 1, 1], [0, 0.5, 1], [1, 0, 0]])).tolist() == [1, 0.5, 0.25]
    curves = torch.rand(4, 11)
    assert torch.allclose(area(curves), torch.trapezoid(curves, dx=0.1))
    with pytest.raises(HarmonizeError, match="two points or more"):
        area(torch.ones(3, 1))


class Wrong(nn.Module):
    def __init__(self, output):
        super().__init__()
        self.output = output

    def forward(self, x):
        return self.output(x)


FLOATS = torch.zeros(3, 3, 12, 12)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"fill": "gray"}, "unknown fill 'gray'"),
        ({"order": "mrof"}, "did you mean 'morf'"),
        ({"score": "logit"}, "unknown score 'logit'"),
        ({"steps": 0}, "steps=0 is out of range: give 1 to 144"),
        ({"steps": 145}, "steps=145 is out of range"),
        ({"batch_size": 0}, "batch_size=0"),
        ({"targets": torch.tensor([0, 1])}, "do not match"),
        ({"maps": torch.zeros(3, 6, 6)}, "do not match"),
        ({"targets": torch.tensor([0, 1, 5])}, r"targets run outside 0\.\.4"),
        ({"model": Small().train()}, "train mode"),
        ({"model": Plain().eval()}, r"a model without \.preprocess takes float input"),
        ({"model": Wrong(lambda x: (x,)).eval(), "images": FLOATS}, "the model gives tuple"),
        ({"model": Wrong(lambda x: x.sum((2, 3)) * torch.nan).eval(), "images": FLOATS}, "NaN logits"),
    ],
)
def test_mistakes_are_named(change, message, case):
    model, images, targets, maps = case
    arguments = {"model": model, "images": images, "targets": targets, "maps": maps, "steps": 4} | change
    with pytest.raises(HarmonizeError, match=message):
        deletion(**arguments)
