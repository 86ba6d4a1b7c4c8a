"""Trains SSD on a data set in COCO format.

    python train.py --recipe demo                                  # the embedded data set, on any machine
    torchrun --nproc-per-node=8 train.py --data-path /data/coco    # the recipe of the published 25.1 mAP

Writes checkpoint.pth, best.pth, metrics.jsonl, args.json, pictures and TensorBoard events to --output-dir.
"""

import argparse
import json
import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import DataLoader

import check_data
import checkpoints
import coco_annotations
import coco_utils
import evaluate
import execution
import failures
import flags
import loading
import optimization
import pictures
import presets
import shared_files
import ssd
import utils
from checkpoints import Checkpoints
from coco_annotations import CocoAnnotations
from coco_utils import CocoTrainDataset, EpochBatchSampler
from divergence import NOT_FINITE, Divergence
from failures import Interrupted
from interruption import Interruption
from presets import DetectionPresetTrain
from run_log import RunLog, StepLog
from shared_files import SharedFiles
from training_state import TrainingState
from validation import Validation

NUM_LOGGED_IMAGES = 8


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
    check: Callable[[list[dict], list[Tensor], Tensor], None],
    after_step: Callable[[], None],
) -> None:
    """Trains on every batch of ``loader``; ``batch_losses`` is a ``BatchLosses`` or a wrapper of one.

    After each step ``check`` gets its batches, their losses and the norm of the gradients.
    """
    state.model.train()
    step_batches, step_losses = [], []
    for batch in utils.moved_batches(log.watch(loader), state.model.default_boxes.device):
        completes_step = state.completes_step
        with utils.averaging_gradients(batch_losses, enabled=completes_step):
            losses = batch_losses(batch)
            state.add_gradients(losses["loss"])
        step_batches.append(batch)
        step_losses.append(log.add(losses))
        if completes_step:
            lr = state.optimizer.param_groups[0]["lr"]
            gradient_norm = state.update()
            check(step_batches, step_losses, gradient_norm)
            log.update(lr, state.overflows)
            after_step()
            step_batches, step_losses = [], []


@dataclass
class Training:
    """A run from its first step to its last, or to where it is stopped."""

    args: argparse.Namespace
    state: TrainingState
    batch_losses: nn.Module
    sampler: EpochBatchSampler
    loader: DataLoader
    validation: Validation
    checkpoints: Checkpoints
    interruption: Interruption
    log: RunLog

    def __post_init__(self):
        self.last_step = min(self.args.epochs * self.sampler.steps_per_epoch, self.args.max_steps or math.inf)
        self.divergence = Divergence(Path(self.args.output_dir))
        self.votes = utils.Votes()
        self.step_log: StepLog | None = None

    def run(self) -> None:
        """Trains, evaluates and saves.

        Raises:
            Interrupted: a process was asked to stop; the state is saved.
            FloatingPointError: a loss or a gradient is not finite; what was saved is from before.
        """
        try:
            self.stop_if_asked(wait=True)
            # Evaluation comes first, so that a run resumed between an epoch and its evaluation makes up for it.
            while True:
                if self.evaluation_is_due:
                    self.validation.begin(after_batch=self.stop_if_asked)
                if self.state.global_step >= self.last_step:
                    break
                self.train_epoch()
                self.save()
            self.save()  # with the evaluation of the last epoch
        except Interrupted as reason:
            self.save()
            text = f"{reason}; everything is saved after {self.state.global_step} steps, go on with --resume auto"
            raise utils.common(Interrupted(text)) from None

    @property
    def evaluation_is_due(self) -> bool:
        step, steps_per_epoch, eval_freq = self.state.global_step, self.sampler.steps_per_epoch, self.args.eval_freq
        if eval_freq == 0 or self.state.evaluated_step == step:
            return False
        return step >= self.last_step or step % (steps_per_epoch * eval_freq) == 0

    def train_epoch(self) -> None:
        """Trains to the end of the epoch, or of the run."""
        args, global_step = self.args, self.state.global_step
        epoch, first_step = divmod(global_step, self.sampler.steps_per_epoch)
        self.sampler.select(epoch, first_step, self.last_step - epoch * self.sampler.steps_per_epoch)
        self.step_log = StepLog(
            log=self.log,
            epoch=epoch,
            first_step=first_step,
            last_step=self.sampler.last_step,
            global_step=global_step,
            images_per_step=optimization.global_batch(args),
            print_freq=args.print_freq,
        )
        train_one_epoch(self.state, self.batch_losses, self.loader, self.step_log, self.check_numbers, self.after_step)

    def check_numbers(self, batches: list[dict], losses: list[Tensor], gradient_norm: Tensor) -> None:
        """Ends the run on all processes if a number of the step, or of one before, is not finite.

        Those that the device has not computed yet are waited for only where a line, which shows them, is due.
        """
        self.divergence.add(self.state.global_step, batches, self.step_log.names, losses, gradient_norm)
        self.stop_if_asked(wait=self.step_log.line_is_due)

    def stop_if_asked(self, wait: bool = False) -> None:
        """Ends the run on all processes alike, if one of them has a reason. If not ``wait``, a call later."""
        vote = max(self.interruption.vote(), self.divergence.vote(wait))
        vote = self.votes.cast(vote, wait)
        if vote >= NOT_FINITE:
            self.divergence.report()
        self.interruption.obey(vote)

    def after_step(self) -> None:
        self.validation.settle(wait=False)
        if self.args.checkpoint_freq and self.state.global_step % self.args.checkpoint_freq == 0:
            self.save()

    def save(self) -> None:
        """Saves the latest checkpoint, once it is certain that nothing in it is wrong and nothing amiss."""
        if self.votes.cast(self.divergence.vote(wait=True), wait=True) >= NOT_FINITE:
            self.divergence.report()
        if self.step_log is not None:
            self.step_log.report_skipped()
        self.validation.settle()
        self.checkpoints.save(self.state)


def make_model(args: argparse.Namespace, num_classes: int, resumed: bool = False) -> ssd.SSD:
    """The model that the flags name. One to be ``resumed`` needs no weights, since its checkpoint has them.

    What the flags leave open about it, they tell afterwards.

    Raises:
        ValueError: weights are missing, damaged, of another model, or needed.
    """
    keywords = {
        "num_classes": num_classes,
        "trainable_backbone_layers": args.trainable_backbone_layers,
        "input_scaling": args.input_scaling,
        "weight_init": args.weight_init,
    }
    if resumed:
        keywords["weights_backbone"] = None
    else:
        if args.freeze_backbone and args.weights in (None, "none"):
            raise ValueError("--freeze-backbone needs --weights: what SSD adds to a backbone would stay random")
        keywords |= {"weights": args.weights, "weights_backbone": args.weights_backbone}
    model = ssd.MODELS[args.model](**keywords)
    if args.freeze_backbone:
        model.backbone.requires_grad_(False)
    args.trainable_backbone_layers = model.backbone.trainable_layers
    args.input_scaling = model.input_scaling
    return model


def make_dataset(
    args: argparse.Namespace, annotations: CocoAnnotations, images_dir: Path, preset: DetectionPresetTrain
) -> CocoTrainDataset:
    files = None
    if args.cache == "ram":
        utils.print_on_main(f"Reading {len(annotations.image_ids)} images into memory")
        paths = annotations.image_paths(images_dir)
        files = SharedFiles(*utils.from_first_of_machine(lambda: shared_files.read_files(paths)))
    skips = args.on_bad_image == "skip"
    return CocoTrainDataset(annotations, images_dir, preset, args.seed, skip_bad_images=skips, files=files)


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


def log_inputs(dataset: CocoTrainDataset, preset: DetectionPresetTrain, log: RunLog, patience: float) -> None:
    """Shows augmented training images with their boxes, as the network sees them."""
    if not log.enabled:
        return
    with loading.at_most(patience):
        batch = coco_utils.collate([dataset[0, i] for i in range(min(NUM_LOGGED_IMAGES, len(dataset)))])
    images = preset.on_device(batch).round().byte().permute(0, 2, 3, 1).numpy()
    names = {one["label"]: one["name"] for one in dataset.annotations.classes}
    drawn = []
    for image, boxes, labels in zip(images, *coco_utils.split_objects(batch["objects"]), strict=True):
        is_object = labels > 0
        texts = [names[label] for label in labels[is_object].tolist()]
        drawn.append(pictures.draw_boxes(image, boxes[is_object].numpy(), labels[is_object].tolist(), texts, "input"))
    log.image("inputs", pictures.grid(drawn, columns=4), 0)


def describe_run(
    args: argparse.Namespace, model: ssd.SSD, dataset: CocoTrainDataset, val: CocoAnnotations, log: RunLog
) -> None:
    """Says what is trained on what, and writes the flags to args.json."""
    train = dataset.annotations
    log.info(
        f"Training on {len(dataset)} of {len(train.image_ids)} images ({train.path}) with {dataset.num_boxes} boxes"
    )
    log.info(f"Evaluating on {len(val.image_ids)} images ({val.path}) with {len(val.boxes)} boxes")
    names = list(train.categories.values())
    log.info(f"Classes ({len(names)}): {', '.join(names[:10])}{', ...' if len(names) > 10 else ''}")
    for line in (*describe_model(args, model), describe_lr(args)):
        log.info(line)
    if args.aspect_ratio_group_factor is not None:
        log.info("--aspect-ratio-group-factor has no effect: SSD resizes every image to a square")
    if log.enabled:
        (Path(args.output_dir) / "args.json").write_text(json.dumps(vars(args), indent=2) + "\n")


def describe_model(args: argparse.Namespace, model: ssd.SSD) -> Iterator[str]:
    """Lines on its size, on what trains, and on what comes from ``--weights``."""
    sizes = [(parameter.numel(), parameter.requires_grad) for parameter in model.parameters()]
    total, trainable = sum(size for size, _ in sizes), sum(size for size, trains in sizes if trains)
    yield f"Model {args.model}: {total:,} parameters, of which {trainable:,} train; input scaling {args.input_scaling}"
    if model.initialised_anew == []:
        yield f"Kept from {args.weights}: all weights, for {model.num_classes} classes (background included)"
    elif model.initialised_anew:
        yield (
            f"Kept from {args.weights}: all weights but those for its classes; initialised anew, for "
            f"{model.num_classes} classes (background included): {', '.join(model.initialised_anew)}"
        )
    if not optimization.norm_layers(model):
        for flag, value in (("--sync-bn", args.sync_bn), ("--norm-weight-decay", args.norm_weight_decay is not None)):
            if value:
                yield f"{flag} has no effect: {args.model} has no batch norm"


def describe_lr(args: argparse.Namespace) -> str:
    batch = optimization.global_batch(args)
    parts = f"{args.world_size} x {args.batch_size} images" + (f" x {args.accumulate}" if args.accumulate > 1 else "")
    scaled = f" = {args.lr:g} x {batch} / {args.tuned_for_batch} (--scale-lr)" if args.scale_lr else ""
    return (
        f"Learning rate {optimization.base_lr(args):g}{scaled} for a global batch of {batch} ({parts}); "
        f"the recipe {args.recipe} is tuned for {args.tuned_for_batch}"
    )


def get_args_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--recipe",
        choices=[*presets.RECIPES, "list"],
        default=presets.DEFAULT_RECIPE,
        metavar="NAME",
        help="defaults for the other flags; 'list' shows all",
    )
    flags.add_common_arguments(parser)
    flags.add_training_arguments(parser)
    parser.set_defaults(output_dir="out")
    return parser


def parse_args(arguments: list[str] | None = None) -> argparse.Namespace:
    """Flags over the values of the recipe over the values of the default recipe."""
    parser = get_args_parser()
    parser.set_defaults(**presets.RECIPES[presets.DEFAULT_RECIPE].values)
    recipe = parser.parse_known_args(arguments)[0].recipe
    if recipe == "list":
        print(presets.list_recipes())
        parser.exit()
    parser.set_defaults(**presets.RECIPES[recipe].values)
    args = parser.parse_args(arguments)
    if args.freeze_backbone:
        args.trainable_backbone_layers = 0
    if args.lr_warmup_epochs and args.lr_warmup_epochs >= args.epochs:
        parser.error(f"--lr-warmup-epochs {args.lr_warmup_epochs} must be less than --epochs, {args.epochs}")
    return args


def main(args: argparse.Namespace) -> None:
    with Interruption(Path(args.output_dir), args.time_limit) as interruption:
        device = utils.init_distributed(args.device, args.dist_timeout)
        interruption.refuse_restart()
        args.world_size = utils.world_size()
        torch.manual_seed(args.seed)
        torch.use_deterministic_algorithms(args.use_deterministic_algorithms)
        torch.backends.cudnn.benchmark = not args.use_deterministic_algorithms
        training = make_training(args, device, interruption)
        training.run()
    log = training.log
    if log.num_skipped:
        log.info(f"Skipped {log.num_skipped} samples, whose images could not be read")
    steps, output_dir = training.state.global_step, args.output_dir
    log.info(f"Done: {steps} steps; everything is in {output_dir} (tensorboard --logdir {output_dir})")
    log.close()
    utils.cleanup_distributed()


def make_training(args: argparse.Namespace, device: torch.device, interruption: Interruption) -> Training:
    """Everything that the flags name, brought to where ``--resume`` was."""
    train_annotations, train_images = flags.open_data(args, "train")
    val_annotations, val_images = flags.open_data(args, "val")
    coco_annotations.check_same_classes(train_annotations.classes, train_annotations.path, val_annotations)
    found = checkpoints.find_checkpoint(args)
    with utils.main_first():  # so that weights are downloaded once
        model = make_model(args, train_annotations.num_classes, resumed=found is not None)
    model = model.to(device, memory_format=execution.memory_format(device))
    if args.sync_bn:
        model = utils.synchronise_batch_norm(model, device)
    preset = DetectionPresetTrain(data_augmentation=args.data_augmentation, size=model.size)
    dataset = make_dataset(args, train_annotations, train_images, preset)
    sampler = EpochBatchSampler(
        len(dataset), args.batch_size, args.seed, utils.rank(), utils.world_size(), args.accumulate
    )
    loader = make_loader(args, dataset, sampler, device)
    optimizer = optimization.make_optimizer(args, model)
    lr_scheduler = LambdaLR(optimizer, optimization.lr_schedule(args, sampler.steps_per_epoch))
    scaler = torch.amp.GradScaler(device.type, enabled=args.amp == "fp16")
    state = TrainingState(model, optimizer, lr_scheduler, scaler, sampler.steps_per_epoch, args.accumulate)
    saved = checkpoints.begin_or_continue(args, state, found, dataset)
    last_steps = {"train": state.global_step, "skipped": state.global_step, "val": state.evaluated_step}
    log = RunLog(Path(args.output_dir), last_steps)
    describe_run(args, model, dataset, val_annotations, log)
    if state.global_step == 0:
        log_inputs(dataset, preset, log, args.loader_timeout)
    else:
        log.info(f"Continuing after {state.global_step} steps")
    batch_losses = BatchLosses(model, preset, execution.make_autocast(device, args.amp))
    if args.compile:
        log.info("Compiling: the first step takes longer, up to minutes")
        execution.compile_whole(batch_losses, args.compile)
    batch_losses = utils.distribute(batch_losses)
    validation = Validation(args, state, val_annotations, val_images, log, saved.save_best)
    return Training(args, state, batch_losses, sampler, loader, validation, saved, interruption, log)


def test_only(args: argparse.Namespace) -> None:
    """Evaluates ``--resume`` or ``--weights`` as evaluate.py would."""
    checkpoint = args.resume or args.weights
    if checkpoint is None:
        raise ValueError("--test-only needs --resume or --weights, to know what to evaluate")
    if checkpoint == "auto":
        found = checkpoints.newest_sound(Path(args.output_dir))
        if found is None:
            raise ValueError(f"--test-only --resume auto: there is no checkpoint in {args.output_dir}")
        checkpoint = str(found.path)
    defaults = evaluate.get_args_parser().parse_args(["--checkpoint", checkpoint])
    evaluate.main(argparse.Namespace(**vars(defaults) | vars(args)))


if __name__ == "__main__":
    with failures.one_line_errors():
        arguments = parse_args()
        run = check_data.check_data if arguments.check_data else test_only if arguments.test_only else main
        run(arguments)
