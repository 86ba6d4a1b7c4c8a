"""Trains SSD on a data set in COCO format.

    python train.py --recipe demo                                  # the embedded data set, on any machine
    torchrun --nproc-per-node=8 train.py --data-path /data/coco    # the recipe of the published 25.1 mAP

Writes checkpoint.pth, best.pth, metrics.jsonl, args.json, report.html, pictures and TensorBoard events to --output-dir.
"""

import argparse
import math
from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import DataLoader

import coco
import coco_utils
import evaluate
import presets
import ssd
import utils
from coco_utils import CocoTrainDataset, EpochBatchSampler
from engine import averaging, checkpoints, execution, failures, flags, loading, optimization, output, resuming, summary
from engine.check_data import check_data
from engine.checkpoints import Checkpoints
from engine.divergence import Divergence
from engine.interruption import Interruption
from engine.run import Run
from engine.run_log import RunLog, StepLog
from engine.stopping import Stopping
from engine.training_state import TrainingState
from engine.validation import Validation
from presets import DetectionPresetTrain
from view import reports


class BatchLosses(nn.Module):
    """The way from a batch to its losses: one module, so that it is compiled and distributed as a whole."""

    def __init__(self, model: ssd.SSD, preset: DetectionPresetTrain, autocast: AbstractContextManager):
        super().__init__()
        self.model = model
        self.preset = preset
        self.autocast = autocast

    def forward(self, batch: dict) -> dict[str, Tensor]:
        """The losses of ``SSD.compute_loss``, and ``loss``, their sum."""
        images = self.preset.on_device(batch)
        with self.autocast:
            outputs = self.model(images)
        losses = self.model.compute_loss(outputs, *coco_utils.split_objects(batch["objects"]))
        return {"loss": sum(losses.values()), **losses}


def train_one_epoch(
    state: TrainingState,
    batch_losses: nn.Module,
    loader: DataLoader,
    log: StepLog,
    check_finite: Callable[[list[dict], list[Tensor], Tensor], None],
    after_step: Callable[[], None],
) -> None:
    """Trains on every batch of ``loader``; ``batch_losses`` is a ``BatchLosses`` or a wrapper of one.

    After each step ``check_finite`` gets its batches, their losses and the norm of the gradients.
    """
    state.model.train()
    step_batches, step_losses = [], []
    for batch in utils.moved_batches(log.watch(loader), state.model.device):
        completes_step = state.completes_step
        with utils.averaging_gradients(batch_losses, enabled=completes_step):
            losses = batch_losses(batch)
            state.backward(losses["loss"])
        step_batches.append(batch)
        step_losses.append(log.add(losses))
        if completes_step:
            lr = state.optimizer.param_groups[0]["lr"]
            gradient_norm = state.optimizer_step()
            check_finite(step_batches, step_losses, gradient_norm)
            log.update(lr, state.overflows)
            after_step()
            step_batches, step_losses = [], []


def train(
    run: Run, batch_losses: nn.Module, sampler: EpochBatchSampler, loader: DataLoader, log: RunLog, print_freq: int
) -> None:
    """Trains, evaluates and saves.

    Raises:
        Interrupted: a process was asked to stop; the state is saved.
        FloatingPointError: a loss or a gradient is not finite; what was saved is from before.
    """
    with run.saved_if_stopped():
        run.evaluate_if_due()  # if it was stopped between an epoch and its evaluation
        while not run.is_complete:
            epoch, first_step = divmod(run.state.global_step, sampler.steps_per_epoch)
            sampler.select(epoch, first_step, run.last_step - epoch * sampler.steps_per_epoch)
            run.step_log = StepLog(
                log=log,
                epoch=epoch,
                first_step=first_step,
                last_step=sampler.last_step,
                global_step=run.state.global_step,
                images_per_step=sampler.images_per_step,
                print_freq=print_freq,
                seconds_left=run.seconds_left,
            )
            train_one_epoch(run.state, batch_losses, loader, run.step_log, run.check_numbers, run.after_step)
            run.save()
            run.evaluate_if_due()
        run.save()  # with the evaluation of the last epoch


def make_model(args: argparse.Namespace, device: torch.device, num_classes: int, resumed: bool = False) -> ssd.SSD:
    """The model that the flags name. One to be ``resumed`` needs no weights, since its checkpoint has them.

    What the flags leave open, trainable layers, input scaling and default boxes, is written back into ``args``.

    Raises:
        ValueError: weights are missing, damaged, of another model, or needed.
    """
    config = {
        "num_classes": num_classes,
        "trainable_backbone_layers": args.trainable_backbone_layers,
        "input_scaling": args.input_scaling,
        "default_boxes": args.default_boxes,
        "weight_init": args.weight_init,
    }
    if resumed:
        config["weights_backbone"] = None
    else:
        if args.freeze_backbone and args.weights in (None, "none"):
            raise ValueError("--freeze-backbone needs --weights: what SSD adds to a backbone would stay random")
        config |= {"weights": args.weights, "weights_backbone": args.weights_backbone}
        config["subsample_fc"] = args.subsample_fc
    with utils.main_first():  # so that weights are downloaded once
        model = ssd.get_model(args.model, **config)
    if args.freeze_backbone:
        model.backbone.requires_grad_(False)
    args.trainable_backbone_layers = model.backbone.trainable_layers
    args.input_scaling, args.default_boxes = model.input_scaling, model.default_boxes_name
    model = model.to(device, memory_format=execution.memory_format(device))
    return utils.synchronise_batch_norm(model, device) if args.sync_bn else model


def make_dataset(
    args: argparse.Namespace, annotations: coco.CocoAnnotations, images_dir: Path, preset: DetectionPresetTrain
) -> CocoTrainDataset:
    files = coco.hold_in_memory(annotations.image_paths(images_dir)) if args.cache == "ram" else None
    return CocoTrainDataset(annotations, images_dir, preset, args.seed, args.on_bad_image == "skip", files)


def make_loader(
    args: argparse.Namespace, dataset: CocoTrainDataset, sampler: EpochBatchSampler, device: torch.device
) -> DataLoader:
    return loading.make_loader(
        dataset,
        args.workers,
        args.loader_timeout,
        pin_memory=device.type == "cuda",
        batch_sampler=sampler,
        # a compiled graph wants batches of one shape
        collate_fn=partial(coco_utils.collate, num_slots=dataset.max_boxes if args.compile else 0),
        persistent_workers=args.workers > 0,
    )


def base_lr(args: argparse.Namespace) -> float:
    """The learning rate after the warm-up: ``--lr``, with ``--scale-lr`` fitted to the images of a step."""
    return args.lr * optimization.lr_scale(args.opt, presets.batch_ratio(args))


def make_optimizer(args: argparse.Namespace, model: ssd.SSD) -> torch.optim.Optimizer:
    return optimization.make_optimizer(
        model,
        args.opt,
        lr=base_lr(args),
        momentum=args.momentum,
        weight_decay=args.weight_decay,
        norm_weight_decay=args.norm_weight_decay,
        fp16=args.amp == "fp16",
    )


def make_schedule(args: argparse.Namespace, steps_per_epoch: int) -> Callable[[int], float]:
    """The learning rate of a step, as a fraction of ``base_lr``; ``--scale-lr`` leaves the warm-up its images."""
    return optimization.lr_schedule(
        steps_per_epoch,
        args.lr_scheduler,
        epochs=args.epochs,
        milestones=args.lr_steps,
        gamma=args.lr_gamma,
        warmup_epochs=args.lr_warmup_epochs,
        warmup_steps=args.lr_warmup_steps and math.ceil(args.lr_warmup_steps / presets.batch_ratio(args)),
    )


def make_batch_losses(args: argparse.Namespace, model: ssd.SSD, preset: DetectionPresetTrain, log: RunLog) -> nn.Module:
    """The way from a batch to its losses, compiled and distributed as the flags say."""
    batch_losses = BatchLosses(model, preset, execution.make_autocast(model.device, args.amp))
    if args.compile:
        log.info("Compiling: the first step takes longer, up to minutes")
        execution.compile_whole(batch_losses, args.compile)
    return utils.distribute(batch_losses)


def main(args: argparse.Namespace) -> None:
    output_dir = Path(args.output_dir)
    with Interruption(output_dir, args.time_limit) as interruption:
        device = utils.init_distributed(args.device, args.dist_timeout)
        interruption.refuse_restart()
        output.prepare(output_dir)
        args.world_size = utils.world_size()
        torch.manual_seed(args.seed)
        torch.use_deterministic_algorithms(args.use_deterministic_algorithms)
        torch.backends.cudnn.benchmark = not args.use_deterministic_algorithms

        splits = evaluate.find_splits(args, "train", "val")
        annotations, val_annotations = coco.open_splits(splits, output_dir / "annotations")
        found = checkpoints.find_checkpoint(args.resume, output_dir)
        if found is not None:
            vars(args).update(resuming.agree(vars(args), found))

        model = make_model(args, device, annotations.num_classes, resumed=found is not None)
        preset = DetectionPresetTrain(data_augmentation=args.data_augmentation, size=model.size)
        dataset = make_dataset(args, annotations, splits["train"].images_dir, preset)
        sampler = EpochBatchSampler(
            len(dataset), args.batch_size, args.seed, utils.rank(), args.world_size, args.accumulate, args.epoch_samples
        )
        loader = make_loader(args, dataset, sampler, device)
        optimizer = make_optimizer(args, model)
        lr_scheduler = LambdaLR(optimizer, make_schedule(args, sampler.steps_per_epoch))
        scaler = torch.amp.GradScaler(device.type, enabled=args.amp == "fp16")
        ema = averaging.make_average(model, args.ema)
        state = TrainingState(model, optimizer, lr_scheduler, scaler, sampler.steps_per_epoch, args.accumulate, ema)

        latest_step = resuming.begin_or_continue(output_dir, state, found, annotations, len(dataset))
        del found  # as large as the model and its momenta
        origin = checkpoints.describe_origin(vars(args), annotations, len(dataset))
        saver = Checkpoints(output_dir, args.keep, origin, latest_step)

        log = RunLog(output_dir, state.last_steps)
        last_step = min(args.epochs * sampler.steps_per_epoch, args.max_steps or math.inf)
        lines = summary.describe_run(vars(args), base_lr(args), last_step, model, dataset, val_annotations)
        log.begin(lines, vars(args))
        if state.global_step > 0:
            log.info(f"Continuing after {state.global_step} steps")
        elif log.enabled:
            with loading.at_most(args.loader_timeout):
                samples = [dataset[0, i] for i in range(min(reports.NUM_INPUTS, len(dataset)))]
            log.image("inputs", reports.draw_inputs(samples, preset, annotations), 0)
        batch_losses = make_batch_losses(args, model, preset, log)
        val_dataset = evaluate.make_validation_set(args, model, val_annotations, splits["val"].images_dir)
        infer = evaluate.make_infer(args, device)
        # detects after an epoch, scores in a thread beside the next, and then saves best.pth
        validation = Validation(state, val_dataset, infer, log, output_dir, saver.save_best, dataset, vars(args))
        # signals and --time-limit, after which the state is saved; numbers that are not finite, after which it is not
        stopping = Stopping(interruption, Divergence(output_dir))
        run = Run(state, last_step, args.eval_freq, args.checkpoint_freq, validation, saver, stopping)
        train(run, batch_losses, sampler, loader, log, args.print_freq)
    folder = args.output_dir
    log.finish(f"Done: {state.global_step} steps; everything is in {folder} (tensorboard --logdir {folder})")
    utils.cleanup_distributed()


def get_args_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    flags.add_recipe(parser, presets.RECIPES, presets.DEFAULT_RECIPE)
    groups = flags.add_groups(parser)
    flags.add_common_flags(groups)
    flags.add_training_flags(groups, presets.DATA_AUGMENTATIONS)
    parser.set_defaults(output_dir="out")
    return parser


def parse_args(arguments: list[str] | None = None) -> argparse.Namespace:
    args = presets.parse_with_recipe(get_args_parser(), arguments)
    if args.freeze_backbone:
        args.trainable_backbone_layers = 0
    return args


if __name__ == "__main__":
    with failures.one_line_errors(flags.names_of(get_args_parser())):
        arguments = parse_args()
        if arguments.check_data:
            check_data(evaluate.find_splits(arguments, "train", "val"), arguments.workers, arguments.loader_timeout)
        elif arguments.test_only:
            evaluate.evaluate_as_trained(arguments)
        else:
            main(arguments)
