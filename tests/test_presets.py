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
        samples.append(preset(image, boxes, labels, rng))
    return coco_utils.collate(samples)


@pytest.mark.parametrize("name", list(presets.DATA_AUGMENTATIONS))
def test_every_pipeline_gives_what_the_network_takes(name):
    preset = presets.DetectionPresetTrain(data_augmentation=name, size=64)
    images = preset.on_device(make_batch(preset))
    assert images.shape == (4, 3, 64, 64)
    assert images.dtype == torch.float32
    assert images.min() >= 0
    assert images.max() <= 255


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_the_device_stage_compiles_to_one_graph_with_the_same_result(backend):
    if backend == "inductor" and shutil.which("g++") is None:
        pytest.skip("needs a compiler")
    preset = presets.DetectionPresetTrain(data_augmentation="ssd", size=64)
    batch = make_batch(preset)
    compiled = torch.compile(preset.on_device, fullgraph=True, backend=backend)
    torch.testing.assert_close(compiled(batch), preset.on_device(batch), rtol=0, atol=1e-3)
