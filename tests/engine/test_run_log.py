import gc
import json

import torch

from engine.run_log import RunLog, StepLog


def make_step_log(tmp_path, **settings) -> tuple[RunLog, StepLog]:
    log = RunLog(tmp_path)
    defaults = {"epoch": 2, "first_step": 0, "last_step": 5, "global_step": 10, "images_per_step": 4, "print_freq": 2}
    return log, StepLog(log=log, seconds_left=lambda: 3661.0, **(defaults | settings))


def test_log_lines_hold_means_and_come_at_the_right_steps(tmp_path, capsys):
    log, steps = make_step_log(tmp_path)
    for value in (1.0, 3.0, 5.0, 7.0, 9.0):
        losses = {"bbox_regression": torch.tensor(value), "classification": torch.tensor(1.0)}
        steps.add({"loss": sum(losses.values()), **losses})
        steps.update(lr=0.01)
    log.close()
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [(line["step"], line["bbox_regression"], line["loss"]) for line in lines] == [
        (12, 2, 3),
        (14, 6, 7),
        (15, 9, 10),
    ]
    printed = capsys.readouterr().out.splitlines()
    assert printed[1].startswith("Epoch: [2]  [4/5]  eta: 0:00:00 (run: 1:01:01)  lr: 0.010000  loss: 7.0000 (5.0000)")
    assert list(tmp_path.glob("events.out.tfevents*"))


def test_a_continued_log_drops_what_came_later_and_what_a_crash_cut(tmp_path):
    lines = [
        '{"kind": "train", "step": 2}',
        '{"kind": "val", "step": 2}',
        '{"kind": "train", "step": 4}',
        '{"kind": "tr',
    ]
    (tmp_path / "metrics.jsonl").write_text("\n".join(lines))
    log = RunLog(tmp_path, last_steps={"train": 3, "val": 1})
    log.metrics("train", 4, {"loss": 0.5})
    log.close()
    steps = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert steps == [{"kind": "train", "step": 2}, {"kind": "train", "step": 4, "loss": 0.5}]


def test_a_log_that_an_error_leaves_has_everything_and_no_file_open(tmp_path, recwarn):
    log = RunLog(tmp_path)
    log.metrics("train", 4, {"loss": 0.5})
    assert json.loads((tmp_path / "metrics.jsonl").read_text())["loss"] == 0.5
    del log
    gc.collect()
    assert not [warning.message for warning in recwarn if str(tmp_path) in str(warning.message)]


def test_watch_yields_everything_and_counts_the_wait(tmp_path):
    log, steps = make_step_log(tmp_path)
    assert list(steps.watch([{"n": i, "fault": ["", ""]} for i in range(3)])) == [{"n": 0}, {"n": 1}, {"n": 2}]
    assert steps.wait_time > 0
    log.close()


def test_a_step_of_several_batches_logs_their_mean(tmp_path):
    log, steps = make_step_log(tmp_path, print_freq=1)
    for values in ((1.0, 3.0), (10.0, 20.0)):
        for value in values:
            steps.add({"loss": torch.tensor(value)})
        steps.update(lr=0.1)
    log.close()
    records = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [(record["step"], record["loss"]) for record in records] == [(11, 2.0), (12, 15.0)]


def test_skipped_samples_are_counted_and_each_fault_is_named_once(tmp_path, capsys):
    log, steps = make_step_log(tmp_path)
    for _ in steps.watch([{"fault": [fault, ""]} for fault in ("a is bad", "b is bad", "a is bad", "")]):
        steps.add({"loss": torch.tensor(1.0)})
        steps.update(lr=0.1)
    assert log.num_skipped == 3
    log.close()
    assert [line for line in capsys.readouterr().out.splitlines() if "Skipped" in line] == [
        "Skipped a is bad",
        "Skipped b is bad",
    ]
    records = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [(r["samples"], r["faults"]) for r in records if r["kind"] == "skipped"] == [
        (2, ["a is bad", "b is bad"]),
        (3, []),
    ]
    assert [r["skipped"] for r in records if r["kind"] == "train"] == [2, 3]
