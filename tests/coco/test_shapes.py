import numpy as np
import pytest
from PIL import Image

import coco
from coco import shapes


def test_shapes_are_a_coco_data_set_with_all_its_cases(tmp_path):
    shapes.draw_data_set(tmp_path / "set", num_images={"train2017": 60})
    a = coco.read_annotations(tmp_path / "set/annotations/instances_train2017.json")
    assert set(a.category_ids.tolist()) == set(shapes.CATEGORIES)
    assert a.is_crowd.any()
    assert (np.diff(a.offsets) == 0).any()  # images without objects
    assert a.areas.min() < 32**2
    assert a.areas.max() > 96**2
    for row in range(len(a.image_ids)):
        assert coco.load_image(a, tmp_path / "set/train2017", row).shape[:2] == tuple(a.sizes[row])


def test_shapes_are_the_same_for_the_same_seed_and_are_drawn_once(tmp_path):
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        shapes.draw_data_set(tmp_path / name, seed=seed, num_images={"train2017": 3})
    files = [(tmp_path / name / "train2017/000002.jpg").read_bytes() for name in "abc"]
    assert files[0] == files[1] != files[2]
    shapes.draw_data_set(tmp_path / "a", seed=1, num_images={"train2017": 3})
    assert (tmp_path / "a/train2017/000002.jpg").read_bytes() == files[0]


@pytest.mark.parametrize("name", shapes.CATEGORIES.values())
def test_a_drawn_box_encloses_its_shape(name):
    picture, objects = Image.new("RGB", (120, 100)), []
    mask = shapes.shape_mask(picture.size, name, np.array([50.0, 40.0]), diameter=60, tilt=10)
    shapes.add_object(picture, objects, mask, category_id=1, rng=np.random.default_rng(0))
    (fields,) = objects
    painted = np.asarray(picture).sum(axis=2) > 0.5 * np.asarray(picture).sum(axis=2).max()
    columns, rows = painted.any(axis=0).nonzero()[0], painted.any(axis=1).nonzero()[0]
    expected = [columns[0], rows[0], columns[-1] + 1 - columns[0], rows[-1] + 1 - rows[0]]
    assert fields["bbox"] == pytest.approx(expected, abs=1)
    assert fields["area"] == pytest.approx(painted.sum(), rel=0.05)
