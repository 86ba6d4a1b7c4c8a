"""All that only a GPU can show, in one command of eight minutes: what is right, how fast it is, and what bounds it.

    python benchmarks/on_gpu.py [--output-dir DIR] [--weights-backbone FILE] [--data-path DIR] [--minutes N]
    python benchmarks/on_gpu.py --rehearse        # all steps in miniature, on a CPU too, where nothing is compiled

Needs no network and no data; --weights-backbone (VGG16's) and --data-path (COCO's layout) make the training in it a
real one. Steps that only check run their commands beside each other, those that measure run alone, and each ends at its
limit; what would begin after --minutes is left out. As it comes, everything is written to DIR: log.txt has what the
commands printed, results.jsonl their figures. Last come a table and one JSON object, which report.json has too.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

ROOT = Path(__file__).parent.parent
LARGEST_TABLE = 9000  # characters


@dataclass(frozen=True)
class Step:
    """Commands that run beside each other: by name, what Python gets; and the seconds after which they are ended."""

    name: str
    limit: float
    commands: dict[str, list]


@dataclass(frozen=True)
class Scale:
    """How large everything is."""

    batches: tuple[int, ...]  # whose variants start all at once
    large_batches: tuple[int, ...]  # for which memory is too small for that
    postprocessed_batches: tuple[int, ...]
    modes: tuple[str, ...]
    graphs: str  # the mode for small batches
    step_model: str  # where torchvision's is not measured beside it
    step: tuple  # flags of train_step.py
    profiled_steps: int
    rounds: int
    test_workers: int
    files: int
    loader_workers: int
    steps_from_files: tuple[int, int]  # of the largest batch, and of the smallest
    training: tuple  # flags of train.py


FULL = Scale(
    batches=(4, 8, 32),
    large_batches=(64, 128),
    postprocessed_batches=(16, 128),
    modes=("eager", "default"),
    graphs="reduce-overhead",
    step_model="ssd300_vgg16",
    step=("--steps", 20),
    profiled_steps=10,
    rounds=3,
    test_workers=3,
    files=500,
    loader_workers=16,
    steps_from_files=(160, 400),
    training=("--model", "ssd300_vgg16", "--batch-size", 16),
)
MINIATURE = Scale(
    batches=(1,),
    large_batches=(2,),
    postprocessed_batches=(1,),
    modes=("eager",),
    graphs="eager",
    step_model="ssd300_resnet18",
    step=("--steps", 1),
    profiled_steps=1,
    rounds=1,
    test_workers=0,
    files=8,
    loader_workers=1,
    steps_from_files=(2, 2),
    training=("--model", "ssd300_resnet18", "--batch-size", 2, "--max-steps", 2),
)


def list_steps(scale: Scale, work: Path, weights_backbone: str, data_path: Path | None) -> list[Step]:
    """What is done in which order, in the folder ``work``."""
    small, large, compiled = scale.batches[0], scale.large_batches[-1], scale.modes[-1]
    modes = dict.fromkeys((*scale.modes, scale.graphs))
    train_step = ["benchmarks/train_step.py", "--precision", "bf16", *scale.step]
    alone = [*train_step, "--model", scale.step_model]
    only_compiled = [*alone, "--rounds", 0, "--warm-up", 1, "--at-once", 4]
    timed = ["--rounds", scale.rounds, "--at-once"]
    profiled = ["--profile", scale.profiled_steps]
    combined = ["--batch-size", small, "--modes", compiled, "--levers", "combo-kernels"]
    padded = ["--batch-size", large, "--modes", compiled, "--levers", "padded-heads"]
    tests = ["-m", "pytest", "-n", scale.test_workers, "tests/test_gpu.py", "-k"]
    data = ["--data-path", data_path] if data_path else ["--dataset", "shapes", "--data-path", work / "shapes"]
    training = ["train.py", *data, "--weights-backbone", weights_backbone, "--output-dir", work / "trained", "--amp"]
    training += ["--lr", 0.0005, "--workers", min(4, scale.loader_workers), "--print-freq", 5, *scale.training]
    from_files = ["benchmarks/end_to_end.py", "--drawn", work / "drawn", "--files", scale.files, "--amp"]
    from_files += ["--model", scale.step_model, "--workers", scale.loader_workers]

    def alone_with(*arguments) -> dict[str, list]:
        return {"": list(arguments)}

    return [
        Step(
            "machine",
            60,
            {
                "ceilings": ["benchmarks/ceilings.py"],
                "drawing": ["benchmarks/coco_like.py", work / "drawn", "--files", scale.files],
            },
        ),
        Step(
            "right, and compiled",
            170,
            {
                "tests": [*tests, "not compile"],
                "compiled tests": [*tests, "compile"],
                "training": [*training, "--epochs", 2, "--lr-steps", 2],
                "compiling": [
                    *only_compiled,
                    "--batch-size",
                    *scale.batches,
                    "--modes",
                    *dict.fromkeys((compiled, scale.graphs)),
                ],
                "compiling, large": [*only_compiled, "--batch-size", *scale.large_batches, "--modes", compiled],
                "compiling, combined": [*only_compiled, *combined],
                "compiling, padded": [*only_compiled, *padded],
            },
        ),
        Step("goes on", 40, alone_with(*training, "--epochs", 3, "--lr-steps", 2, "--resume", "auto")),
        Step("convolutions", 40, alone_with("benchmarks/ceilings.py", "--convolutions", "--batch-size", large)),
        Step(
            "step",
            120,
            alone_with(
                *(*train_step, "--batch-size", *scale.batches, *timed, 16, *profiled),
                *("--modes", *modes, "--peer", "fp32", "amp"),
            ),
        ),
        Step(
            "step, large batches",
            100,
            alone_with(
                *(*train_step, "--batch-size", *scale.large_batches, *timed, 3, *profiled),
                *("--modes", *scale.modes, "--peer", "amp"),
            ),
        ),
        Step("step in float32", 50, alone_with(*alone, "--batch-size", scale.batches[-1], "--precision", "fp32")),
        Step("combined kernels", 50, alone_with(*alone, *timed, 2, *combined)),
        Step("padded heads, all plans", 60, alone_with(*alone, *timed, 3, *padded, "benchmark-limit-0")),
        Step(
            "post-processing",
            60,
            alone_with(
                *("benchmarks/postprocess.py", "--batch-size", *scale.postprocessed_batches),
                *("--rounds", scale.rounds, "--predictions", "trained", "collapsed"),
            ),
        ),
        Step(
            "loss",
            60,
            alone_with("benchmarks/loss.py", "--batch-size", scale.batches[-1], "--rounds", scale.rounds),
        ),
        *(
            Step(
                f"files to weights, batch {size}",
                90,
                alone_with(
                    *(*from_files, "--batch-size", size, "--steps", number),
                    *(() if mode == "eager" else ("--compile", mode)),
                ),
            )
            for size, mode, number in zip((large, small), (compiled, scale.graphs), scale.steps_from_files, strict=True)
        ),
    ]


def run_step(step: Step, output_dir: Path, environment: dict[str, str], limit: float) -> list[dict]:
    """Runs the commands beside each other, until they or the ``limit`` in seconds end; returns what came of each."""
    begin = time.monotonic()
    running = {}
    for name, arguments in step.commands.items():
        output = tempfile.TemporaryFile("w+")  # noqa: SIM115
        command = [sys.executable, *map(str, arguments)]
        process = subprocess.Popen(
            command, cwd=ROOT, env=environment, stdout=output, stderr=subprocess.STDOUT, start_new_session=True
        )
        running[name] = process, output
    results = []
    for name, (process, output) in running.items():
        try:
            code = process.wait(max(0.0, begin + limit - time.monotonic()))
            outcome = "ok" if code == 0 else f"exit code {code}"
        except subprocess.TimeoutExpired:
            outcome = f"ended after {limit:.0f} s"
        end_group(process)
        output.seek(0)
        text = output.read()
        command = " ".join(map(str, step.commands[name]))
        title = f"{step.name}: {name}" if name else step.name
        with open(output_dir / "log.txt", "a") as log:
            log.write(f"\n$ python {command}\n{text}\n[{title}: {outcome}]\n")
        result = {"step": title, "command": command, "outcome": outcome, "seconds": time.monotonic() - begin}
        result["figures"] = last_json(text)
        if outcome != "ok":
            result["last lines"] = text.splitlines()[-5:]
        with open(output_dir / "results.jsonl", "a") as file:
            file.write(json.dumps(result) + "\n")
        print(f"{result['seconds']:6.1f} s  {title}: {outcome}", flush=True)
        results.append(result)
    return results


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
    """A line for each command, and for each group of its figures."""
    lines = []
    for result in results:
        lines.append(f"{result['step']:40} {result['seconds']:6.1f} s  {result['outcome']}")
        lines += [f"    {line}" for line in result.get("last lines", ())]
        lines += [f"    {line}" for line in lines_of(result["figures"] or {})]
    return "\n".join(lines)


def lines_of(figures: dict, path: str = "") -> Iterator[str]:
    """A line for each group of numbers, with where it stands."""
    numbers = {key: value for key, value in figures.items() if isinstance(value, (int, float))}
    if numbers:
        yield f"{path:50} " + "  ".join(f"{key} {value:.4g}" for key, value in numbers.items())
    for key, value in figures.items():
        if isinstance(value, dict):
            yield from lines_of(value, f"{path} / {key}" if path else key)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output-dir", type=Path, default=Path("out/on_gpu"))
    parser.add_argument("--weights-backbone", default="none", help="VGG16's, a file (default: random ones)")
    parser.add_argument("--data-path", type=Path, help="photographs, in COCO's layout (default: drawn shapes)")
    parser.add_argument("--minutes", type=float, default=8.0, help="after which no step begins (default: %(default)g)")
    parser.add_argument("--rehearse", action="store_true", help="all steps in miniature, without compilation")
    args = parser.parse_args()
    if not args.rehearse and not torch.cuda.is_available():
        parser.error("PyTorch finds no GPU here; --rehearse runs all steps in miniature")
    args.output_dir.mkdir(parents=True, exist_ok=True)
    begin, results = time.monotonic(), []
    with tempfile.TemporaryDirectory() as folder:
        environment = {
            **os.environ,
            "PYTHONUNBUFFERED": "1",
            "TORCHINDUCTOR_CACHE_DIR": f"{folder}/compiled",
            "TORCHINDUCTOR_COMPILE_THREADS": "4",
        }
        if args.rehearse:
            environment |= {"TORCHDYNAMO_DISABLE": "1", "OMP_NUM_THREADS": "1"}
        weights = args.weights_backbone if args.weights_backbone == "none" else Path(args.weights_backbone).resolve()
        data_path = args.data_path and args.data_path.resolve()
        for step in list_steps(MINIATURE if args.rehearse else FULL, Path(folder), weights, data_path):
            left = 60 * args.minutes - (time.monotonic() - begin)
            if left > 0:
                results += run_step(step, args.output_dir, environment, min(step.limit, max(left, 30)))
            else:
                print(f"left out, for want of time: {step.name}", flush=True)
    report = {
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "torch": torch.__version__,
        "rehearsal": args.rehearse,
        "seconds": time.monotonic() - begin,
        "failed": [result["step"] for result in results if result["outcome"] != "ok"],
        "results": results,
    }
    (args.output_dir / "report.json").write_text(json.dumps(report, indent=1) + "\n")
    print(table(results)[-LARGEST_TABLE:])
    print(json.dumps({key: value for key, value in report.items() if key != "results"}))
    sys.exit(bool(report["failed"]))


if __name__ == "__main__":
    main()
