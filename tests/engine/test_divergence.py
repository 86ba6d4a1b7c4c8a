import pytest
import torch

from engine import divergence
from engine.divergence import NOT_FINITE, Divergence


class LateEvent:
    """An event of a device that has computed a step only when it is told so, or waited for."""

    def __init__(self):
        self.is_done = False

    def query(self) -> bool:
        return self.is_done

    def synchronize(self) -> None:
        self.is_done = True


def add(watch: Divergence, step: int, loss: float = 1.0, norm: float = 2.0, image_id: int = 7) -> None:
    batch = {"image_id": [image_id, image_id + 1], "objects": torch.zeros(2, 3, 5)}
    watch.add(step, [batch], ["loss", "classification"], [torch.tensor([1.0 + loss, loss])], torch.tensor(norm))


def test_finite_numbers_give_no_vote(tmp_path):
    watch = Divergence(tmp_path)
    for step in range(1, 5):
        add(watch, step)
        assert watch.vote() == 0
    assert not watch.pending


@pytest.mark.parametrize(
    ("numbers", "fault"),
    [
        ({"loss": torch.nan}, "the loss classification is nan"),
        ({"loss": -torch.inf}, "the loss classification is -inf"),
        ({"norm": torch.inf}, "the norm of the gradients is inf"),
    ],
)
def test_the_first_step_with_a_fault_is_named_and_kept(tmp_path, numbers, fault):
    watch = Divergence(tmp_path)
    add(watch, 1)
    add(watch, 2, **numbers, image_id=40)
    add(watch, 3, **numbers, image_id=50)
    assert watch.vote() == NOT_FINITE
    with pytest.raises(FloatingPointError) as error:
        watch.report()
    path = tmp_path / "not_finite_0.pth"
    assert f"step 2: {fault}, images [40, 41] (kept in {path})" in str(error.value)
    kept = torch.load(path, weights_only=True)
    assert kept["step"] == 2
    assert kept["batches"][0]["image_id"] == [40, 41]
    assert kept["losses"][0].keys() == {"loss", "classification"}


def test_only_the_batch_at_fault_is_kept(tmp_path):
    watch = Divergence(tmp_path)
    batches = [{"image_id": [i]} for i in (5, 6, 7)]
    losses = [torch.tensor([1.0, 1.0]), torch.tensor([torch.nan, torch.nan]), torch.tensor([1.0, 1.0])]
    watch.add(1, batches, ["loss", "classification"], losses, torch.tensor(torch.nan))
    assert watch.vote() == NOT_FINITE
    with pytest.raises(FloatingPointError, match=r"step 1: the loss classification is nan, images \[6\] "):
        watch.report()


def test_a_full_disk_does_not_hide_what_happened(tmp_path):
    (tmp_path / "not_finite_0.pth.tmp").symlink_to("/dev/full")
    watch = Divergence(tmp_path)
    add(watch, 1, loss=torch.nan)
    assert watch.vote() == NOT_FINITE
    with pytest.raises(FloatingPointError, match=r"classification is nan.*could not be written: No space left"):
        watch.report()


def test_steps_are_looked_at_when_the_device_has_computed_them(tmp_path):
    watch, events = Divergence(tmp_path), [LateEvent() for _ in range(3)]
    for step, event in enumerate(events, start=1):
        add(watch, step, loss=torch.nan if step == 2 else 1.0)
        watch.pending[-1].arrived = event
        assert watch.vote() == 0
    events[0].is_done = True
    assert watch.vote() == 0
    assert [numbers.step for numbers in watch.pending] == [2, 3]
    assert watch.vote(wait=True) == NOT_FINITE
    assert watch.found.step == 2


def test_the_host_waits_rather_than_keep_ever_more_batches(tmp_path):
    watch = Divergence(tmp_path)
    for step in range(1, 3 * divergence.MAX_PENDING):
        add(watch, step)
        watch.pending[-1].arrived = LateEvent()
        watch.vote()
        assert len(watch.pending) <= divergence.MAX_PENDING


def test_steps_share_the_memory_of_a_few(tmp_path):
    """Each new piece could make the host wait for a GPU; and what is late or at fault is not written over."""
    watch, events, places = Divergence(tmp_path), [LateEvent() for _ in range(100)], set()
    for step, event in enumerate(events):
        add(watch, step, loss=float(step))
        watch.pending[-1].arrived = event
        places.add(watch.pending[-1].values.data_ptr())
        assert [numbers.values[1].item() for numbers in watch.pending] == [one.step for one in watch.pending]
        events[max(0, step - step % 7)].is_done = True  # some come at once, others late
        assert watch.vote() == 0
    assert len(places) <= divergence.MAX_PENDING + 1
    add(watch, 100, loss=torch.nan)
    assert watch.vote(wait=True) == NOT_FINITE
    for step in range(101, 130):  # as other processes go on until they hear of it
        add(watch, step, loss=float(step))
    assert watch.found.losses_of_batches()[0]["classification"] != watch.found.losses_of_batches()[0]["classification"]
