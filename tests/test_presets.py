"""The two stages of the training pipeline together."""

import shutil

import numpy as np
import pytest
import torch

import coco_utils
import presets


def make_batch(preset: presets.DetectionPresetTrain) -> dict:
    samples = []
    for seed in range(4):
        rng = np.random.default_rng(seed)
        image = rng.integers(0, 256, (80, 100, 4), dtype=np.uint8)
        boxes, labels = np.array([[10, 10, 60, 60], [40, 20, 90, 70]], np.float32), np.array([1, 2])
        samples.append(preset(image, boxes, labels, rng) | {"image_id": seed})
    return coco_utils.collate(samples)


@pytest.mark.parametrize("name", list(presets.DATA_AUGMENTATIONS))
def test_every_pipeline_gives_what_the_network_takes(name):
    preset = presets.DetectionPresetTrain(data_augmentation=name, size=64)
    images = preset.on_device(make_batch(preset))
    assert images.shape == (4, 3, 64, 64)
    assert images.dtype == torch.float32
    assert images.min() >= 0
    assert images.max() <= 255


@pytest.mark.parametrize("name", list(presets.DATA_AUGMENTATIONS))
def test_what_is_drawn_for_the_second_stage_arrives_there(name, monkeypatch):
    """Under its name, and unchanged, though all of it travels in one tensor."""
    preset = presets.DetectionPresetTrain(data_augmentation=name, size=64)
    drawn, expected_coverage = [], []
    if preset.photometric is not None:
        draw = preset.photometric.draw
        kind = type(preset.photometric)
        monkeypatch.setattr(kind, "draw", lambda _, *args: drawn.append(draw(*args)) or drawn[-1])
    resample = presets.T.resample
    monkeypatch.setattr(
        presets.T, "resample", lambda *args: (found := resample(*args), expected_coverage.append(found[1]))[0]
    )
    coverage, arrived = preset.split_parameters(make_batch(preset)["parameters"])
    assert torch.equal(coverage, torch.stack(expected_coverage))
    assert arrived.keys() == (drawn[0].keys() if drawn else set())
    for i, one in enumerate(drawn):
        for key, value in one.items():
            assert arrived[key][i].tolist() == np.ravel(value).tolist(), key


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_the_device_stage_compiles_to_one_graph_with_the_same_result(backend):
    if backend == "inductor" and shutil.which("g++") is None:
        pytest.skip("needs a compiler")
    preset = presets.DetectionPresetTrain(data_augmentation="ssd", size=64)
    batch = make_batch(preset)
    compiled = torch.compile(preset.on_device, fullgraph=True, backend=backend)
    torch.testing.assert_close(compiled(batch), preset.on_device(batch), rtol=0, atol=1e-3)
