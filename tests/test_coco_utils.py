import pickle

import numpy as np
import pytest
import torch
from PIL import Image

import coco
import coco_utils
from coco import DataError
from coco.shared_files import SharedFiles, read_files
from coco_utils import CocoEvalDataset, CocoTrainDataset, EpochBatchSampler
from engine import loading
from presets import DetectionPresetEval, DetectionPresetTrain
from tests.conftest import annotation, image


def train_dataset(path, images_dir="") -> CocoTrainDataset:
    preset = DetectionPresetTrain(data_augmentation="ssd", size=300)
    return CocoTrainDataset(coco.read_annotations(path), images_dir, preset, seed=0)


def test_what_is_trained_on(write):
    """Crowds, boxes without area and boxes outside the image are left out, others clipped; empty images are skipped."""
    dataset = train_dataset(
        write(
            [
                annotation(1, 1, 3, (-10, -10, 30, 30)),
                annotation(2, 1, 7, (90, 70, 50, 50)),
                annotation(3, 1, 7, (20, 20, 0, 10)),
                annotation(4, 1, 7, (200, 20, 10, 10)),
                annotation(6, 1, 7, (99.995, 20, 10, 10)),
                annotation(5, 2, 3, (0, 0, 50, 50), iscrowd=1),
            ]
        )
    )
    assert len(dataset) == 1
    assert dataset.num_boxes == dataset.max_boxes == 2
    boxes, labels = coco.objects_of_image(dataset.annotations, 0)
    assert boxes.tolist() == [[0, 0, 20, 20], [90, 70, 100, 80]]
    assert labels.tolist() == [3, 7]


def test_nothing_to_train_on(write):
    with pytest.raises(DataError, match="no image has a box to train on"):
        train_dataset(write([annotation(1, iscrowd=1)]))


def test_samples_follow_the_contract(data_path):
    dataset = train_dataset(data_path / "annotations/instances_train2017.json", data_path / "train2017")
    sample = dataset[0, 3]
    assert sample["image"].shape == (3, 300, 300)
    assert sample["image"].dtype == torch.uint8
    assert sample["boxes"].dtype == torch.float32
    assert sample["labels"].dtype == torch.int64
    assert len(sample["boxes"]) == len(sample["labels"]) > 0
    assert (sample["boxes"][:, 2:] > sample["boxes"][:, :2]).all()


def test_a_sample_depends_on_seed_epoch_and_index_alone(data_path):
    make = lambda: train_dataset(data_path / "annotations/instances_train2017.json", data_path / "train2017")  # noqa: E731
    first, second = make(), make()
    _ = [second[1, i] for i in range(len(second))]
    assert all(torch.equal(first[0, i]["image"], second[0, i]["image"]) for i in range(len(first)))
    assert not all(torch.equal(first[0, i]["image"], first[1, i]["image"]) for i in range(len(first)))


def test_collate_pads_and_marks_empty_slots():
    samples = [
        {"boxes": torch.ones(n, 4), "labels": torch.full((n,), 5), "image": torch.zeros(3, 2, 2), "image_id": n}
        for n in (2, 0, 1)
    ]
    batch = coco_utils.collate(samples)
    boxes, labels = coco_utils.split_objects(batch["objects"])
    assert labels.dtype == torch.int64
    assert labels.tolist() == [[5, 5], [0, 0], [5, 0]]
    assert boxes.shape == (3, 2, 4)
    assert boxes[2].sum(dim=1).tolist() == [4, 0]
    assert batch["image_id"] == [2, 0, 1]


def test_a_batch_has_few_tensors(data_path):
    """Each costs the process that takes it over from a worker. What is no tensor passes through pinning as it is."""
    dataset = train_dataset(data_path / "annotations/instances_train2017.json", data_path / "train2017")
    batch = coco_utils.collate([dataset[0, index] for index in range(3)])
    assert {key for key, value in batch.items() if isinstance(value, torch.Tensor)} == {
        "image",
        "parameters",
        "objects",
    }
    assert batch["image_id"] == [int(dataset.annotations.image_ids[row]) for row in dataset.rows[:3]]
    assert batch["fault"] == ["", "", ""]


def test_image_ids_and_labels_of_any_size_pass_through_a_batch():
    """Labels travel beside boxes, in float32."""
    samples = [{"boxes": torch.ones(1, 4), "labels": torch.tensor([n]), "image_id": n * 10**10} for n in (1, 2**24)]
    batch = coco_utils.collate(samples)
    assert coco_utils.split_objects(batch["objects"])[1].tolist() == [[1], [2**24]]
    assert batch["image_id"] == [10**10, 2**24 * 10**10]


def test_order_of_an_epoch():
    def keys(world_size, batch_size, epoch=0, **steps):
        samplers = [EpochBatchSampler(50, batch_size, 3, rank, world_size) for rank in range(world_size)]
        for sampler in samplers:
            sampler.select(epoch, **steps)
        # the global batch of each step: what the ranks see together
        return [[key for batch in batches for key in batch] for batches in zip(*samplers, strict=True)]

    whole = keys(1, 8)
    assert len(whole) == 6  # the last two images do not fill a batch
    assert len({key for batch in whole for key in batch}) == 48
    assert keys(2, 4) == keys(4, 2) == whole
    assert keys(1, 8, epoch=1) != whole
    assert {epoch for batch in keys(1, 8, epoch=1) for epoch, _ in batch} == {1}
    assert keys(2, 4, first_step=4) == whole[4:]
    assert keys(1, 8, first_step=1, last_step=3) == whole[1:3]
    assert keys(1, 8, last_step=99) == whole


def test_too_few_images_for_a_batch():
    with pytest.raises(DataError, match=r"7 training images do not fill 1 batch\(es\) of 4 on 2 process.*--batch-size"):
        EpochBatchSampler(7, 4, 0, 0, 2)
    with pytest.raises(DataError, match=r"7 training images do not fill 2 batch\(es\) of 4 on 1 .*--accumulate"):
        EpochBatchSampler(7, 4, 0, accumulate=2)
    assert EpochBatchSampler(7, 4, 0, accumulate=2, min_samples=8).steps_per_epoch == 1
    with pytest.raises(DataError, match=r"7 training images do not fill.*raise --epoch-samples"):
        EpochBatchSampler(7, 16, 0, min_samples=8)


@pytest.mark.parametrize(
    ("num_images", "passes", "steps"),
    [(5, 4, 5), (9, 3, 5), (19, 2, 5), (20, 1, 5), (21, 1, 5), (50, 1, 12), (1, 20, 5)],
)
def test_an_epoch_of_few_images_passes_over_them_until_it_has_enough_samples(num_images, passes, steps):
    """No sample comes twice, in this epoch or the next, and each pass is whole but for the last."""

    def keys(epoch: int, world_size: int = 1) -> list[tuple[int, int]]:
        samplers = [
            EpochBatchSampler(num_images, 4 // world_size, 3, rank, world_size, min_samples=20)
            for rank in range(world_size)
        ]
        for sampler in samplers:
            sampler.select(epoch)
        return [key for batches in zip(*samplers, strict=True) for batch in batches for key in batch]

    first, second = keys(0), keys(1)
    assert len(first) == len(second) == 4 * steps
    assert len({*first, *second}) == 8 * steps
    assert [one for one, _ in first] == [place // num_images for place in range(4 * steps)]
    assert {one // passes for one, _ in second} == {1}
    if passes > 1:
        assert sorted(index for one, index in first if one == 0) == list(range(num_images))
    assert keys(1, world_size=2) == second


@pytest.mark.parametrize(("world_size", "accumulate"), [(1, 8), (2, 4), (4, 2)])
def test_fewer_processes_that_accumulate_share_the_same_steps(world_size, accumulate):
    eight = [EpochBatchSampler(50, 2, 3, rank, 8) for rank in range(8)]
    fewer = [EpochBatchSampler(50, 2, 3, rank, world_size, accumulate) for rank in range(world_size)]
    for sampler in (*eight, *fewer):
        sampler.select(1, first_step=1)
    assert [sampler.steps_per_epoch for sampler in fewer] == [3] * world_size
    assert all(len(list(sampler)) == len(sampler) == 2 * accumulate for sampler in fewer)
    parts = [list(sampler) for sampler in fewer]
    steps = [[b for own in parts for b in own[n * accumulate : (n + 1) * accumulate]] for n in range(2)]
    assert steps == [list(batches) for batches in zip(*eight, strict=True)]


def test_evaluation_serves_every_image_with_its_objects(data_path):
    a = coco.read_annotations(data_path / "annotations/instances_val2017.json")
    dataset = CocoEvalDataset(a, data_path / "val2017", DetectionPresetEval(size=64))
    samples = [dataset[i] for i in range(len(dataset))]
    assert [sample["image_id"] for sample in samples] == a.image_ids.tolist()
    assert samples[1]["image"].shape == (3, 64, 64)
    assert samples[1]["size"].tolist() == a.sizes[1].tolist()
    boxes, labels = coco.objects_of_image(a, 1)
    height, width = a.sizes[1]
    np.testing.assert_allclose(samples[1]["boxes"] * torch.tensor([width, height] * 2) / 64, boxes, atol=1e-3)
    assert samples[1]["labels"].tolist() == labels.tolist()


@pytest.mark.parametrize("size", [(1, 1), (1, 3), (3, 2)])
def test_tiny_images_pass_through_the_pipeline(tmp_path, write, size):
    Image.new("RGB", size, (10, 200, 30)).save(tmp_path / "1.png")
    dataset = train_dataset(write([annotation(1, bbox=(0, 0, *size))], images=[image(1, *size)]), tmp_path)
    for epoch in range(40):
        sample = dataset[epoch, 0]
        assert sample["image"].shape == (3, 300, 300)
        (coverage,), _ = dataset.preset.split_parameters(sample["parameters"][None])
        covered = (coverage[0] > 0).nonzero().flatten(), (coverage[1] > 0).nonzero().flatten()
        if all(map(len, covered)):
            assert sample["image"][:, covered[0][0], covered[1][0]].tolist() == [10, 200, 30]


@pytest.mark.parametrize(("num_slots", "expected"), [(0, 2), (1, 2), (2, 2), (5, 5)])
def test_boxes_are_padded_to_the_slots_asked_for(num_slots, expected):
    samples = [
        {"boxes": torch.ones(n, 4), "labels": torch.ones(n, dtype=torch.int64), "size": n, "image_id": n}
        for n in (2, 0, 1)
    ]
    batch = coco_utils.collate(samples, num_slots)
    boxes, labels = coco_utils.split_objects(batch["objects"])
    assert boxes.shape == (3, expected, 4)
    assert labels.sum(dim=1).tolist() == boxes[..., 3].sum(dim=1).tolist() == [2, 0, 1]
    assert (labels[0, :2] == 1).all()
    assert batch["size"].tolist() == [2, 0, 1]


def test_skipping_serves_a_sample_without_objects(tmp_path, write):
    Image.new("RGB", (100, 80), "white").save(tmp_path / "2.png")
    path = write([annotation(1), annotation(2, image_id=2)])
    a, preset = coco.read_annotations(path), DetectionPresetTrain(data_augmentation="ssd", size=300)
    dataset = CocoTrainDataset(a, tmp_path, preset, seed=0, skip_bad_images=True)
    batch = coco_utils.collate([dataset[0, 0], dataset[0, 1]])
    assert batch["fault"] == [f"{tmp_path / '1.png'} (image id 1): no such file; check the image folder", ""]
    assert batch["image_id"] == [1, 2]
    assert coco_utils.split_objects(batch["objects"])[1].tolist() == [[0], [3]]
    assert batch["image"][0].max() == 0
    evaluated = CocoEvalDataset(a, tmp_path, DetectionPresetEval(size=64), skip_bad_images=True)
    assert [bool(evaluated[i]["fault"]) for i in range(3)] == [True, False, True]
    assert evaluated[0]["size"].tolist() == [80, 100]
    with pytest.raises(DataError, match="image id 3"):
        CocoEvalDataset(a, tmp_path, DetectionPresetEval(size=64))[2]


@pytest.mark.parametrize("workers", [0, 1, 3])
def test_batches_are_the_same_for_any_number_of_workers(data_path, workers):
    dataset = train_dataset(data_path / "annotations/instances_train2017.json", data_path / "train2017")
    sampler = EpochBatchSampler(len(dataset), 2, seed=0)

    def batches(workers: int) -> list[dict]:
        loader = loading.make_loader(
            dataset, workers, 60, batch_sampler=sampler, collate_fn=coco_utils.collate, persistent_workers=workers > 0
        )
        collected = []
        for epoch in range(3):
            sampler.select(epoch)
            collected += list(loader)
        return collected

    def same(one, other) -> bool:
        if isinstance(one, dict):
            return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
        return torch.equal(one, other) if isinstance(one, torch.Tensor) else one == other

    found, expected = batches(workers), batches(0)
    assert len(found) == len(expected) == 3 * (len(dataset) // 2)
    assert all(same(one, other) for one, other in zip(found, expected, strict=True))


def test_a_data_set_may_go_to_workers_that_are_started_anew(data_path, tmp_path):
    """What they get is the names of index and shared memory."""
    path = data_path / "annotations/instances_train2017.json"
    a = coco.read_annotations(path, tmp_path / "index")
    preset = DetectionPresetTrain(data_augmentation="ssd", size=300)
    files = SharedFiles(*read_files(a.image_paths(data_path / "train2017")))
    dataset = CocoTrainDataset(a, tmp_path / "nowhere", preset, seed=0, files=files)
    assert len(pickle.dumps(dataset)) < 10_000
    expected = train_dataset(path, data_path / "train2017")
    sampler = EpochBatchSampler(len(dataset), 4, seed=0)
    loader = loading.make_loader(dataset, 1, 60, batch_sampler=sampler, collate_fn=coco_utils.collate)
    for batch, keys in zip(loader, sampler, strict=True):
        assert torch.equal(batch["image"], coco_utils.collate([expected[key] for key in keys])["image"])


def test_an_error_in_a_loader_worker_stays_one_line(tmp_path, write):
    dataset = train_dataset(write([annotation(1)]), tmp_path)
    loader = loading.make_loader(dataset, 1, 60, batch_sampler=EpochBatchSampler(1, 1, 0))
    with pytest.raises(DataError) as error:
        next(iter(loader))
    assert str(error.value) == f"{tmp_path / '1.png'} (image id 1): no such file; check the image folder"
