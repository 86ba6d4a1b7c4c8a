"""All that only a GPU can show, in one command: what is right, how fast it is, and what bounds it.

    python -m benchmarks.on_gpu [--output-dir DIR] [--weights-backbone FILE] [--data-path DIR] [--minutes N]
                                [--only STEP ...]
    python -m benchmarks.on_gpu --rehearse        # all steps in miniature, on a CPU too, where nothing is compiled

Needs no network and no data; --weights-backbone (VGG16's) and --data-path (COCO's layout) make the training in it a
real one. What checks, and what is not decided, comes first; each step ends at its limit, and all of it after --minutes.
As it comes, everything is written to DIR: log.txt has what the commands printed, results.jsonl their figures. Last come
a table and one JSON object, which report.json has too.
"""

import argparse
import contextlib
import importlib.util
import json
import math
import os
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from coco import shapes

ROOT = Path(__file__).parent.parent
LONGEST_TABLE = 10_000  # characters
SECONDS_TO_END = 5  # for a command that is asked to
NEEDED = ("pycocotools", "hotcoco", "tensorboard", "matplotlib", "pytest", "xdist")


@dataclass(frozen=True)
class Step:
    """A command for Python, and the seconds after which it is ended."""

    name: str
    limit: float
    command: str


@dataclass(frozen=True)
class Scale:
    """How large everything is. Texts are what stands on a command line."""

    batches: str  # whose variants start all at once
    large_batches: str  # for which memory is too small for that
    postprocessed_batches: str
    smallest: int
    middle: int
    largest: int
    precision: str
    peers: tuple[str, ...]  # torchvision's precisions, the last of which large batches get
    compiled: str  # modes of train_step.py
    graphs: str
    step_model: str  # where torchvision's is not measured beside it
    steps: int
    rounds: int
    test_workers: int
    files: int
    loader_workers: int
    steps_from_files: tuple[int, int]  # of the largest batch, and of the smallest
    training: str
    trained_steps: tuple[int, int]  # until it is stopped, and until its end
    learning: str  # flags of side_by_side.py
    drawn_images: tuple[int, int]  # to train on and to validate on, where there are no photographs
    patience: int  # by which the limits of all steps are multiplied


FULL = Scale(
    batches="4 8 32",
    large_batches="64 128",
    postprocessed_batches="16 128",
    smallest=4,
    middle=32,
    largest=128,
    precision="bf16",
    peers=("fp32", "amp"),
    compiled="default",
    graphs="reduce-overhead",
    step_model="ssd300_vgg16",
    steps=20,
    rounds=3,
    test_workers=8,
    files=500,
    loader_workers=16,
    steps_from_files=(160, 400),
    training="--model ssd300_vgg16 --batch-size 16",
    trained_steps=(60, 90),
    learning="--seeds 3 --at-once 2 --workers 4",
    drawn_images=(160, 40),
    patience=1,
)
MINIATURE = Scale(
    batches="1",
    large_batches="1",
    postprocessed_batches="1",
    smallest=1,
    middle=1,
    largest=2,
    precision="fp32",  # which no CPU need emulate
    peers=("fp32",),
    compiled="eager",
    graphs="eager",
    step_model="ssd300_resnet18",
    steps=1,
    rounds=1,
    test_workers=0,
    files=8,
    loader_workers=1,
    steps_from_files=(2, 2),
    training="--model ssd300_resnet18 --batch-size 2",
    trained_steps=(2, 3),
    learning="--seeds 1 --epochs 1 --epoch-samples 0 --lr-warmup-steps 0 --batch-size 2 --workers 0",
    drawn_images=(4, 2),
    patience=6,  # where a CPU is slow or busy, the rehearsal only takes longer
)


def list_steps(scale: Scale, work: Path, weights_backbone: str, data: str) -> list[Step]:
    """What is done, in its order, in the folder ``work``; ``data`` are the flags of train.py that name photographs."""
    training = f"train.py {data} {scale.training} --weights-backbone {weights_backbone} --lr 0.0005"
    training += f" --output-dir {work}/trained --workers 1 --print-freq 5 {amp_flag(scale)} --max-steps"
    learning = f"-m benchmarks.side_by_side {data} --weights-backbone {weights_backbone} --output-dir {work}/learned"
    learning += f" --recipe small {amp_flag(scale)} --eval-freq 20 {scale.learning}"
    return [
        Step("machine", 60, "-m benchmarks.ceilings"),
        Step("tests", 240, f"-m pytest -n {scale.test_workers} --maxprocesses 99 -vv tests/test_gpu.py"),
        *list_other_measurements(scale, work),
        Step("trains", 60, f"{training} {scale.trained_steps[0]}"),
        Step("goes on", 60, f"{training} {scale.trained_steps[1]} --resume auto"),
        Step("learns", 300, learning),
        *list_lever_measurements(scale),
        *list_step_measurements(scale),
    ]


def amp_flag(scale: Scale) -> str:
    return "" if scale.precision == "fp32" else f"--amp {scale.precision}"


def list_step_measurements(scale: Scale) -> list[Step]:
    """Steps of both sides with their profiles."""
    train_step = f"-m benchmarks.train_step --precision {scale.precision} --steps {scale.steps} --rounds {scale.rounds}"
    train_step += f" --profile {min(10, scale.steps)}"
    modes = " ".join(dict.fromkeys(("eager", scale.compiled, scale.graphs)))
    small = f"--batch-size {scale.batches} --modes {modes} --peer {' '.join(scale.peers)} --at-once 16"
    large = f"--batch-size {scale.large_batches} --modes eager {scale.compiled} --peer {scale.peers[-1]} --at-once 6"
    return [
        Step("step", 240, f"{train_step} {small}"),
        Step("step, large batches", 120, f"{train_step} {large}"),
    ]


def list_lever_measurements(scale: Scale) -> list[Step]:
    """What is not decided."""
    alone = f"-m benchmarks.train_step --steps {scale.steps} --rounds {scale.rounds} --model {scale.step_model}"
    small = f"--precision {scale.precision} --batch-size {scale.smallest} --modes {scale.graphs}"
    large = f"--precision {scale.precision} --batch-size {scale.largest} --modes {scale.compiled} --at-once 4"
    large += " --levers separate-heads pooled-convs benchmark-limit-0 none"
    return [
        Step("levers, small batch", 100, f"{alone} {small} --levers combo-kernels none"),
        Step("levers, large batch", 150, f"{alone} {large}"),
        Step("step in float32", 50, f"{alone} --batch-size {scale.middle} --precision fp32"),
        Step("convolutions", 60, f"-m benchmarks.ceilings --convolutions --batch-size {scale.largest}"),
    ]


def list_other_measurements(scale: Scale, work: Path) -> Iterator[Step]:
    """Post-processing, the loss, and training from files."""
    rounds = f"--rounds {scale.rounds}"
    postprocess = f"-m benchmarks.postprocess {rounds} --predictions trained collapsed"
    yield Step("drawing", 60, f"-m benchmarks.coco_like {work}/drawn --files {scale.files}")
    yield Step("post-processing", 60, f"{postprocess} --batch-size {scale.postprocessed_batches}")
    yield Step("loss", 100, f"-m benchmarks.loss {rounds} --batch-size {scale.middle}")
    from_files = f"-m benchmarks.end_to_end --drawn {work}/drawn --files {scale.files} --model {scale.step_model}"
    from_files += f" --workers {scale.loader_workers} {amp_flag(scale)}"
    sizes, modes = (scale.largest, scale.smallest), (scale.compiled, scale.graphs)
    for size, mode, number in zip(sizes, modes, scale.steps_from_files, strict=True):
        compiles = "" if mode == "eager" else f"--compile {mode}"
        command = f"{from_files} --batch-size {size} --steps {number} {compiles}"
        yield Step(f"files to weights, batch {size}", 90, command)


def run_step(step: Step, output_dir: Path, environment: dict[str, str], limit: float) -> dict:
    """What came of a step, which ends at the latest after ``limit`` seconds; it is also written."""
    result, text = run_command(step.command, environment, limit)
    with open(output_dir / "log.txt", "a") as log, open(output_dir / "results.jsonl", "a") as file:
        log.write(f"\n$ python {step.command}\n{text}\n[{step.name}: {result['outcome']}]\n")
        file.write(json.dumps({"step": step.name, **result}) + "\n")
    print(f"{result['seconds']:6.1f} s  {step.name}: {result['outcome']}", flush=True)
    return {"step": step.name, **result}


def run_command(command: str, environment: dict[str, str], limit: float) -> tuple[dict, str]:
    """What came of a command, at the latest after ``limit`` seconds, and all that it printed."""
    begin = time.monotonic()
    with tempfile.TemporaryFile("w+") as output:
        process = subprocess.Popen(
            [sys.executable, *shlex.split(command)],
            cwd=ROOT,
            env=environment,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            code = process.wait(limit)
            outcome = "ok" if code == 0 else f"exit code {code}"
        except subprocess.TimeoutExpired:
            outcome = f"ended after {limit:.0f} s"
            interrupt(process)
        end_group(process)
        output.seek(0)
        text = output.read()
    result = {"command": command, "outcome": outcome, "seconds": time.monotonic() - begin, "figures": last_json(text)}
    if outcome != "ok":
        result["last lines"] = text.splitlines()[-5:]
    return result, text


def interrupt(process: subprocess.Popen) -> None:
    """As Ctrl-C does, after which pytest still tells of the tests that have failed."""
    os.killpg(process.pid, signal.SIGINT)
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(SECONDS_TO_END)


def end_group(process: subprocess.Popen) -> None:
    """Ends what a command has started and left, and the command itself."""
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        return
    process.wait()


def last_json(text: str) -> dict | None:
    """The last line that is a JSON object, as all benchmarks print one; of one that was cut short, the one before."""
    for line in reversed(text.splitlines()):
        if line.startswith("{"):
            try:
                return json.loads(line)
            except json.JSONDecodeError:
                continue
    return None


def table(results: list[dict]) -> str:
    """A line for each command, then one for each group of their figures."""
    lines = []
    for result in results:
        lines.append(f"{result['step']:40} {result['seconds']:6.1f} s  {result['outcome']}")
        lines += [f"    {line}" for line in result.get("last lines", ())]
    for result in results:
        lines += [f"{result['step']}: {line}" for line in lines_of(result["figures"] or {})]
    return "\n".join(lines)


def lines_of(figures: dict, path: str = "") -> Iterator[str]:
    """A line for each group of numbers, with where it stands."""
    numbers = {key: value for key, value in figures.items() if isinstance(value, (int, float))}
    if numbers:
        yield f"{path}  " + "  ".join(f"{key} {value:.4g}" for key, value in numbers.items())
    for key, value in figures.items():
        if isinstance(value, dict):
            yield from lines_of(value, f"{path} / {key}" if path else key)


def get_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output-dir", type=Path, default=Path("out/on_gpu"))
    parser.add_argument("--weights-backbone", default="none", help="VGG16's, a file (default: random ones)")
    parser.add_argument("--data-path", type=Path, help="photographs, in COCO's layout (default: drawn shapes)")
    parser.add_argument("--minutes", type=float, default=math.inf, help="after which all ends (default: never)")
    parser.add_argument("--only", nargs="+", metavar="STEP", help="leave out all other steps")
    parser.add_argument("--rehearse", action="store_true", help="all steps in miniature, without compilation")
    args = parser.parse_args()
    if not args.rehearse and not torch.cuda.is_available():
        parser.error("PyTorch finds no GPU here; --rehearse runs all steps in miniature")
    missing = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        parser.error(f"{', '.join(missing)}: not installed (requirements.txt)")
    return args


def environment_for(folder: Path, is_rehearsal: bool) -> dict[str, str]:
    """What all commands share: above all what they have compiled."""
    shared = {
        "PYTHONUNBUFFERED": "1",
        "TORCHINDUCTOR_CACHE_DIR": os.environ.get("TORCHINDUCTOR_CACHE_DIR", f"{folder}/compiled"),
        "TORCHINDUCTOR_COMPILE_THREADS": "4",
    }
    in_miniature = {"TORCHDYNAMO_DISABLE": "1", "OMP_NUM_THREADS": "1"} if is_rehearsal else {}
    return {**os.environ, **shared, **in_miniature}


def data_flags(args: argparse.Namespace, scale: Scale, folder: Path) -> tuple[str, str]:
    """The weights, and what names the photographs, for a command line."""
    weights = args.weights_backbone
    if weights != "none":
        weights = shlex.quote(str(Path(weights).resolve()))
    data = args.data_path
    if data is None:
        data = folder / "shapes"
        shapes.draw_data_set(data, num_images=dict(zip(("train2017", "val2017"), scale.drawn_images, strict=True)))
    return weights, f"--data-path {shlex.quote(str(data.resolve()))}"


def write_report(output_dir: Path, results: list[dict], is_rehearsal: bool, seconds: float) -> dict:
    report = {
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "torch": torch.__version__,
        "rehearsal": is_rehearsal,
        "seconds": seconds,
        "failed": [result["step"] for result in results if result["outcome"] != "ok"],
        "results": results,
    }
    (output_dir / "report.json").write_text(json.dumps(report, indent=1) + "\n")
    return report


def main() -> None:
    args = get_args()
    args.output_dir.mkdir(parents=True, exist_ok=True)
    for name in ("log.txt", "results.jsonl"):
        (args.output_dir / name).unlink(missing_ok=True)
    scale = MINIATURE if args.rehearse else FULL
    begin, results = time.monotonic(), []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        environment = environment_for(folder, args.rehearse)
        steps = list_steps(scale, folder, *data_flags(args, scale, folder))
        unknown = set(args.only or ()) - {step.name for step in steps}
        if unknown:
            sys.exit(f"--only: no step is called {', '.join(sorted(unknown))}; all: {', '.join(s.name for s in steps)}")
        for step in steps:
            if args.only and step.name not in args.only:
                continue
            left = 60 * args.minutes - (time.monotonic() - begin)
            if left > 0:
                limit = min(left, scale.patience * step.limit)
                results.append(run_step(step, args.output_dir, environment, limit))
                report = write_report(args.output_dir, results, args.rehearse, time.monotonic() - begin)
            else:
                print(f"left out, for want of time: {step.name}", flush=True)
    print(table(results)[:LONGEST_TABLE])
    print(json.dumps({key: value for key, value in report.items() if key != "results"}))
    sys.exit(bool(report["failed"]))


if __name__ == "__main__":
    main()
