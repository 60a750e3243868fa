"""Detection against torchvision's SSD: boxes, matching, loss; and against counting by hand."""

from types import SimpleNamespace

import pytest
import torch
from small import require_traced_and_exported
from torch.nn.functional import softmax
from torchvision.models.detection import _utils as theirs
from torchvision.models.detection.ssd import SSD
from torchvision.ops import box_convert, box_iou

from lab.cli import BadInput
from lab.models import build, settings_of
from lab.models.ssdlite import SSDLite, anchors
from lab.tasks import boxes, detection
from mobilevit import VARIANTS

PAPER = ((20, 20), (10, 10), (5, 5), (3, 3), (2, 2), (1, 1))  # maps of 320x320 pixels
VARIANCES = (10.0, 10.0, 5.0, 5.0)  # as torchvision has them


@pytest.mark.parametrize(
    "variant, expected", [("xxs", 1_755_050), ("xs", 2_742_042), ("s", 5_738_826)]
)
def test_parameter_count(variant, expected):
    assert sum(p.numel() for p in SSDLite(variant, 80).parameters()) == expected


@pytest.mark.parametrize("first_stride, n", [(16, 3232), (8, 12832)])
def test_outputs_end_with_their_anchors(first_stride, n):
    model = SSDLite("xxs", 3, first_stride=first_stride).eval()
    outputs = model(torch.rand(2, 3, 320, 320))
    assert outputs.shape == (2, n, 4 + 4 + 4)
    sides = PAPER if first_stride == 16 else ((40, 40), *PAPER)
    expected = anchors(sides, {16: 0.1, 8: 0.05}[first_stride])
    assert torch.equal(outputs[0, :, -4:], expected) and torch.equal(outputs[1, :, -4:], expected)


def test_a_prediction_stands_beside_the_anchor_of_its_cell():
    """Outputs are in the order of the anchors: by cell, then by shape."""
    model = SSDLite("xxs", 2)
    head = model.heads[1][1]  # of the map of 10x10
    with torch.no_grad():
        head.weight.zero_()
        head.bias.copy_(torch.arange(6 * 7.0))
    found = model.eval()(torch.rand(1, 3, 320, 320))[0, 2400:3000, :7]
    assert torch.equal(found[5 * 60 + 2 * 6 + 3], torch.arange(21.0, 28))


def test_the_map_of_the_whole_image_has_no_values_below_0():
    torch.manual_seed(0)
    model, seen = SSDLite("xxs", 3).eval(), []
    model.heads[-1].register_forward_hook(lambda _, args, out: seen.append(args[0]))
    model(torch.randn(2, 3, 64, 64))
    assert seen[0].shape == (2, 64, 1, 1) and seen[0].min() == 0 < seen[0].max()


def test_anchors_by_hand():
    found = anchors(PAPER, 0.1)
    assert found.shape == (20 * 20 * 6 + 10 * 10 * 6 + 25 * 6 + 9 * 6 + 4 * 6 + 4, 4)
    s, t = 0.1, 0.1 + 0.95 / 6  # of the first two maps
    cell = found[(3 * 20 + 5) * 6 :][:6]  # fourth row, sixth column
    assert torch.allclose(cell[:, :2], torch.tensor([5.5 / 20, 3.5 / 20]))
    sides = [(s, s), ((s * t) ** 0.5,) * 2]
    sides += [(s * r**0.5, s / r**0.5) if wide else (s / r**0.5, s * r**0.5)
              for r in (2, 3) for wide in (True, False)]  # fmt: skip
    assert torch.allclose(cell[:, 2:], torch.tensor(sides), atol=1e-6)
    assert found[-4:].tolist()[0] == pytest.approx([0.5, 0.5, 0.8917, 0.8917], abs=1e-4)
    assert found.max() == 1  # the widest are cut


def scene(b=3, n=6, seed=0, n_classes=4):
    """Targets with padding, a crowd and an image without objects; outputs with the anchors."""
    generator = torch.Generator().manual_seed(seed)
    anchor = anchors(PAPER, 0.1)
    centres, sizes = torch.rand(2, b, n, 2, generator=generator)
    corners = torch.cat((centres, 0.05 + 0.5 * sizes), 2)
    corners = box_convert(corners, "cxcywh", "xyxy").clamp(0, 1)
    kinds = torch.randint(n_classes, (b, n, 1), generator=generator).float()
    targets = torch.cat((corners, kinds, torch.zeros(b, n, 1)), 2)
    targets[0, 4:, 4] = -1
    targets[-2, 2, 5] = 1
    targets[-1, :, 4] = -1
    outputs = torch.randn(b, len(anchor), 5 + n_classes, generator=generator)
    return torch.cat((outputs, anchor.expand(b, -1, -1)), 2), targets


def real(targets):
    return (targets[..., 4] >= 0) & (targets[..., 5] == 0)


def test_offsets_are_torchvisions():
    outputs, targets = scene()
    anchor = outputs[0, :6, -4:]
    corners = box_convert(anchor, "cxcywh", "xyxy")
    coder = theirs.BoxCoder(VARIANCES)
    offsets = boxes.encode(targets[0, :, :4], anchor)
    torch.testing.assert_close(offsets, coder.encode_single(targets[0, :, :4], corners))
    torch.testing.assert_close(boxes.decode(offsets, anchor), targets[0, :, :4])
    outside = coder.decode_single(2 * offsets, corners)
    torch.testing.assert_close(boxes.decode(2 * offsets, anchor), outside.clamp(0, 1))


@pytest.mark.parametrize("seed", range(3))
def test_matching_is_torchvisions(seed):
    outputs, targets = scene(seed=seed)
    anchor = outputs[0, :, -4:]
    found = boxes.match(targets[..., :4], real(targets), anchor)
    corners = box_convert(anchor, "cxcywh", "xyxy")
    for row, objects, keep in zip(found, targets, real(targets)):
        places = keep.nonzero().flatten()
        if len(places) == 0:
            assert (row == -1).all()
            continue
        matched = theirs.SSDMatcher(0.5)(box_iou(objects[places, :4], corners))
        expected = torch.where(matched >= 0, places[matched.clamp(min=0)], -1)
        assert torch.equal(row, expected) and set(row.tolist()) == {-1, *places.tolist()}


def test_of_two_objects_with_one_best_anchor_the_last_gets_it():
    anchor = torch.tensor([[0.5, 0.5, 0.4, 0.4], [0.1, 0.1, 0.1, 0.1]])
    small = torch.tensor([[[0.4, 0.4, 0.6, 0.6], [0.45, 0.45, 0.6, 0.6]]])
    there = torch.tensor([[True, True]])
    assert boxes.match(small, there, anchor).tolist() == [[1, -1]]
    assert boxes.match(small, torch.tensor([[True, False]]), anchor).tolist() == [[0, -1]]
    assert boxes.match(small[:, :0], there[:, :0], anchor).tolist() == [[-1, -1]]


def test_the_loss_is_torchvisions():
    outputs, targets = scene()
    outputs.requires_grad_()
    anchor = outputs[0, :, -4:].detach()
    corners = box_convert(anchor, "cxcywh", "xyxy")
    ssd = SimpleNamespace(box_coder=theirs.BoxCoder(VARIANCES), neg_to_pos_ratio=3)
    keep = real(targets)
    objects = [{"boxes": t[k, :4], "labels": t[k, 4].long() + 1} for t, k in zip(targets, keep)]
    matched = []
    for t in objects:
        none = torch.full((len(anchor),), -1)
        iou = box_iou(t["boxes"], corners)
        matched.append(theirs.SSDMatcher(0.5)(iou) if len(t["boxes"]) else none)
    head = {"bbox_regression": outputs[..., :4], "cls_logits": outputs[..., 4:-4]}
    expected = SSD.compute_loss(ssd, objects, head, [corners] * 3, matched)
    total = expected["bbox_regression"] + expected["classification"]
    loss, right = detection.loss(outputs, targets, 0.0)
    torch.testing.assert_close(loss, total)
    ours, same = (torch.autograd.grad(x, outputs, retain_graph=True)[0] for x in (loss, total))
    torch.testing.assert_close(ours, same)
    shares = []
    for image, t, m in zip(outputs, objects, matched):
        kinds = image[m >= 0, 4:-4].argmax(1)
        shares.append((kinds == t["labels"][m[m >= 0]]).float().mean() if (m >= 0).any() else 0)
    assert right.item() == pytest.approx(float(sum(shares)))


def test_an_empty_batch_has_a_finite_loss():
    outputs, targets = scene()
    targets[..., 4] = -1
    loss, right = detection.loss(outputs, targets, 0.0)
    assert loss.item() == 0 and right.item() == 0


def test_what_is_found_by_a_loop():
    outputs, _ = scene(b=2)
    outputs[..., 4:-4] *= 3
    found = boxes.detections(outputs)[0]
    corners = boxes.decode(outputs[0, :, :4], outputs[0, :, -4:])
    scores = softmax(outputs[0, :, 4:-4], 1)
    expected = []
    for kind in range(1, scores.shape[1]):
        order = scores[:, kind].argsort(descending=True)[:400]
        order = order[scores[order, kind] > 0.01]
        overlaps = (box_iou(corners[order], corners[order]) > 0.5).tolist()
        kept = []
        for i in range(len(order)):
            if not any(overlaps[i][j] for j in kept):
                kept.append(i)
        expected += [(scores[i, kind].item(), *corners[i].tolist(), kind - 1) for i in order[kept]]
    expected = torch.tensor(sorted(expected, reverse=True)[:200])
    torch.testing.assert_close(found, expected[:, [1, 2, 3, 4, 0, 5]])
    outputs[..., 4] += 100
    assert not boxes.detections(outputs).any()


def test_boxes_down_to_a_score_of_a_hundredth_are_found():
    scores = torch.tensor([0.5, 0.011, 0.009])
    logits = torch.stack((1 - scores, scores), 1).log()  # background and one class
    anchor = torch.tensor([[0.1, 0.5, 0.1, 0.1], [0.5, 0.5, 0.1, 0.1], [0.9, 0.5, 0.1, 0.1]])
    found = boxes.detections(torch.cat((torch.zeros(3, 4), logits, anchor), 1)[None])[0]
    assert found[:3, 4].tolist() == pytest.approx([0.5, 0.011, 0])


def found_in(*images):
    """Detections (box, score, class) of images, padded."""
    rows = torch.zeros(len(images), 200, 6)
    for row, found in zip(rows, images):
        for place, (box, score, kind) in zip(row, found):
            place[:] = torch.tensor((*box, score, kind))
    return rows


def test_average_precision_by_hand():
    pytest.importorskip("pycocotools")
    left, right = (0.0, 0.0, 0.4, 0.4), (0.5, 0.5, 1.0, 1.0)
    targets = torch.tensor([[(*left, 0, 0), (*right, 1, 0)], [(*left, 0, 0), (*right, 0, 1)]])
    none = (0.45, 0.0, 0.5, 0.05)
    half = (0.0, 0.0, 0.4, 0.25)  # overlaps `left` by 0.625
    inside = (0.6, 0.6, 0.9, 0.9)  # of the crowd: neither right nor wrong
    found = found_in(
        [(none, 0.9, 0), (left, 0.8, 0), (right, 0.7, 1)], [(half, 0.6, 0), (inside, 0.95, 0)]
    )
    precision = detection.average_precision(found, targets, 3)
    # Class 0, by falling score: wrong, right, right. Up to a recall of 1 the best is 2/3.
    assert precision[0, :3].tolist() == pytest.approx([2 / 3] * 3)
    # From 0.65 on `half` is wrong: half of the objects are found, at a precision of 1/2.
    assert precision[0, 3:].tolist() == pytest.approx([0.5 * 51 / 101] * 7)
    assert precision[1].tolist() == pytest.approx([1] * 10)
    assert precision[2].tolist() == [-1] * 10
    score = detection.score(found, targets, torch.tensor([3.0, 1]), torch.tensor([2, 0]), "abc")
    assert score["loss"] == 2 and score["ap50_pct"] == pytest.approx({"a": 200 / 3, "b": 100})
    assert score["map50_pct"] == pytest.approx(250 / 3)
    assert score["map_pct"] == pytest.approx(50 * (0.2 + 0.35 * 51 / 101 + 1))
    assert detection.written(score).startswith("83.33 % mAP@0.5 (a 66.67, b 100.00; ")
    assert detection.average_precision(torch.zeros(2, 200, 6), targets, 2)[0].tolist() == [0] * 10


def test_overlaps_go_up_to_095_and_a_hundred_boxes_of_an_image_count():
    pytest.importorskip("pycocotools")
    wide = found_in([((0.0, 0.0, 1.0, 0.92), 0.9, 0)])
    precision = detection.average_precision(wide, torch.tensor([[[0, 0, 1, 1, 0, 0.0]]]), 1)
    assert precision[0].tolist() == pytest.approx([1] * 9 + [0])
    x = torch.arange(100) / 100
    many = torch.stack((x, 0 * x, x + 0.009, 1 + 0 * x), 1)
    objects = torch.cat((many, torch.zeros(100, 2)), 1)[None]
    found = found_in([(tuple(box), 0.5, 0) for box in many.tolist()])
    assert detection.average_precision(found, objects, 1)[0].tolist() == pytest.approx([1] * 10)


def test_pictures_are_augmented_by_the_authors_numbers():
    _, *jitters, flip, _, _ = detection._transform("ssd", 64).transforms
    numbers = {"brightness": (0.8, 1.2), "contrast": (0.5, 1.5)}
    numbers |= {"saturation": (0.5, 1.5), "hue": (-0.05, 0.05)}
    for apply, (name, limits) in zip(jitters, numbers.items(), strict=True):
        (jitter,) = apply.transforms
        assert apply.p == 0.5 and getattr(jitter, name) == pytest.approx(limits)
        assert all(getattr(jitter, other) is None for other in numbers.keys() - {name})
    assert flip.p == 0.5


def test_pictures_without_an_object_are_no_scale():
    pytest.importorskip("pycocotools")
    with pytest.raises(BadInput, match="no picture that is judged has an object"):
        detection.score(found_in([]), -torch.ones(1, 2, 6), torch.ones(1), torch.zeros(1), "ab")


def test_fx_and_export_with_any_batch():
    torch.manual_seed(0)
    model = SSDLite("xxs", 3, first_stride=8).eval()
    example, x = torch.randn(2, 3, 96, 64), torch.randn(3, 3, 96, 64)
    expected = model(x)
    require_traced_and_exported(model, example, x, expected)


@pytest.mark.parametrize("variant", VARIANTS)
def test_settings_build_the_same_network(variant):
    name = f"ssdlite_mobilevit_{variant}"
    model = build(name, num_classes=3, heads=1, first_stride=8)
    again = build(name, **settings_of(model))
    assert settings_of(again) == settings_of(model)
    again.load_state_dict(model.state_dict())


@pytest.mark.parametrize(
    "settings, says", [({"num_classes": 0}, "num_classes"), ({"first_stride": 4}, "first_stride")]
)
def test_impossible_networks_are_refused(settings, says):
    with pytest.raises(ValueError, match=says):
        build("ssdlite_mobilevit_xxs", **settings)


def test_an_anchor_that_overlaps_by_just_enough_stands_for_the_object():
    anchors = torch.tensor([[0.25, 0.5, 0.5, 1], [0.5, 0.5, 1, 1], [0.75, 0.5, 0.5, 1]])
    box = torch.tensor([[[0, 0, 0.5, 1]]])
    assert boxes.match(box, torch.tensor([[True]]), anchors).tolist() == [[0, 0, -1]]
