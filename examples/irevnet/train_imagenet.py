"""Trains an i-RevNet, then decodes the test images from its last layer.

Without arguments a small i-RevNet on scikit-learn's handwritten digits: 96.7 to 99.2 % of the test
images right with the seeds 0 to 4, every image decoded bit for bit, half a minute of one CPU core.
With ``--data`` the paper's network (b) with the released code's recipe for ImageNet::

    python examples/irevnet/train_imagenet.py
    python examples/irevnet/train_imagenet.py --data DIR
    python examples/irevnet/train_imagenet.py --data DIR --recipe paper
    python examples/irevnet/train_imagenet.py --data DIR --preset resnet50
    torchrun --nproc-per-node 4 examples/irevnet/train_imagenet.py --data DIR
    python examples/irevnet/train_imagenet.py --data cifar-10-python.tar.gz --preset cifar10-small

where ``DIR`` holds ``train/<class>/<image>`` and ``val/<class>/<image>``. ``--help`` lists the
settings. Each run has a folder of its own, runs/irevnet/1, 2, ..., with its settings, a log, curves
and a checkpoint. Ctrl-C or SIGTERM saves the state behind the step in progress, from which
``--resume`` goes on to the same result as if never stopped.

Under torchrun the processes share each batch, and together see the images that one alone would see;
their batch statistics are each their own, unless ``--sync-batch-norm`` is given.
"""

import math
import os
import sys
import time
from collections.abc import Sequence
from contextlib import closing
from typing import Any

import torch
from rich.progress import Progress

from analysis import table
from curves import CURVES, draw_curves
from errors import RunError, writing
from experiment.folder import BOARD, CHECKPOINT, LOG, RUNS, RunFolder, make_folder
from experiment.settings import Config, parse
from images.batches import load_training, plain
from invert import CAPTION, decode, draw, some_decoded
from presets import is_invertible
from scripts import ending
from trainer.distributed import Team, join
from trainer.stopping import Signals, Stopped, Terminal
from trainer.training import DivergedError, Training
from trainer.weights import load_network

try:
    from torch.utils.tensorboard import SummaryWriter
except ImportError:
    SummaryWriter = None  # type: ignore[assignment, misc]

PICTURE = "reconstructions.png"
DIGITS = "scikit-learn's handwritten digits"
NEXT = """What next?
  --no-checkpoint          stores the activations instead of rebuilding them: the same numbers
  --preset resnet-digits   trains a ResNet of the same size
  --data DIR               trains on your own images, CIFAR-10 or ImageNet
docs/irevnet/training.rst has more, --help all flags."""


class Keeper:
    """Trains in a folder: with a log, and checkpoints now and then and when it is stopped."""

    def __init__(self, training: Training, folder: RunFolder, console: Terminal) -> None:
        self.training = training
        self.folder = folder
        self.console = console
        self.signals = Signals()
        self.board: Any = None
        if training.team.leads and SummaryWriter is not None:
            # What a killed run has written behind its checkpoint is hidden.
            self.board = SummaryWriter(folder.path / BOARD, purge_step=training.iteration + 1)
        self.saved = self.drawn = time.monotonic()
        self.progress = Progress(console=console, disable=not console.is_terminal)
        left = training.iterations - training.iteration
        self.task = self.progress.add_task("the first steps", total=left)

    def fit(self) -> None:
        """Trains to the last epoch, or until it is stopped: then the state is saved."""
        with self.signals, self.progress:
            try:
                while self.training.epoch < self.training.epochs:
                    self.training.train(self.after_step)
                    self.end_epoch()
            except Stopped:
                self.save()
                raise

    def after_step(self) -> None:
        """Writes what is due."""
        self.progress.advance(self.task)
        if self.training.iteration % self.training.config.log_every == 0:
            self.log_losses()
        self.stop_if_asked()
        due = time.monotonic() - self.saved >= 60 * self.training.config.save_every
        if self.training.team.highest(int(due)):
            self.save()

    def end_epoch(self) -> None:
        """Tests, and writes, draws and prints what the epoch has brought."""
        self.log_losses()
        record = self.measure()
        self.log(record)
        self.save(best=self.training.end_epoch(record["test_accuracy"]))
        # Drawing takes a fifth of a second.
        if self.training.team.leads and time.monotonic() - self.drawn > 10:
            draw_curves([self.folder.path], self.folder.path / CURVES)
            self.drawn = time.monotonic()
        self.console.print(
            f"epoch {record['epoch']:>{len(str(self.training.epochs))}}/{self.training.epochs}"
            f"  train {record['train_loss']:.3f} {record['train_accuracy']:.1%}"
            f"  test {record['test_loss']:.3f} {record['test_accuracy']:.1%}"
            f"  {record['images_per_second']:,.0f} images/s"
        )
        self.stop_if_asked()

    def measure(self) -> dict[str, Any]:
        """What the log says of an epoch whose training is done: this tests the network."""
        team, tally, epoch = self.training.team, self.training.tally, self.training.epoch + 1
        seconds = time.perf_counter() - tally.began
        record = {
            "epoch": epoch,
            **self.training.position,
            **{f"train_{name}": value for name, value in tally.read(team).items()},
            "images_per_second": team.ranks * tally.images / seconds,
            "seconds": seconds,
            "data_seconds": tally.waited,
            "peak_gpu_memory": torch.cuda.max_memory_allocated() / 2**20,  # MiB
        }
        for name, value in self.training.test(self.stop_if_asked).read(team).items():
            record[f"test_{name}"] = value
        if not math.isfinite(record["test_loss"]):
            raise DivergedError(f"the loss on the test images of epoch {epoch} isn't finite.")
        return record

    def stop_if_asked(self) -> None:
        """Raises :class:`Stopped` if a process has got a signal."""
        number = self.training.team.highest(self.signals.received or self.console.closed)
        if number:
            raise Stopped(number)

    def log_losses(self) -> None:
        """Writes the loss of each step since the last time; this waits for the device."""
        losses = self.training.read_losses()
        self.training.losses.clear()
        if losses:
            shown = [float(f"{loss:.6g}") for loss in losses]
            self.log({**self.training.position, "losses": shown})
            epoch = f"epoch {self.training.epoch + 1}/{self.training.epochs}"
            self.progress.update(self.task, description=f"{epoch}, loss {losses[-1]:.3f}")

    def log(self, record: dict[str, Any]) -> None:
        """Writes a line of the log, and its numbers for TensorBoard."""
        self.folder.log(record)
        if self.board is not None:
            losses = record.get("losses")
            shown = {"loss": sum(losses) / len(losses), "lr": record["lr"]} if losses else record
            for name, value in shown.items():
                self.board.add_scalar(name, value, record["iteration"])
            self.board.flush()

    def save(self, *, best: bool = False) -> None:
        """Writes a checkpoint."""
        self.folder.save(self.training.state(), best=best)
        self.saved = time.monotonic()


def run(config: Config, team: Team, console: Terminal) -> int:
    """Trains, or goes on training, and reports; returns the exit status."""
    if config.threads:
        torch.set_num_threads(config.threads)
    torch.backends.cudnn.benchmark = True  # all batches have one shape
    data = load_training(config, team.device, team.rank, team.ranks)
    train, test = (batches.images for batches in data)
    console.print(
        f"{'' if config.data else 'No --data given: '}training on {config.data or DIGITS}: "
        f"{len(train):,} images of {len(train.classes):,} classes, tested on {len(test):,}."
    )
    for note in filter(None, (train.note, test.note)):
        console.print(f"Note: {note}.")
    path = config.out or RUNS
    # One decides for all: it may be making the folder while the others look.
    found = config.resume != "no" and (path / CHECKPOINT).is_file()
    resumes = bool(team.highest(int(found and team.leads)))
    training = Training(config, data, team, begins=not resumes)
    if team.leads and not resumes:
        path = make_folder(config.out)
    with closing(RunFolder(path, writes=team.leads)) as folder:
        if resumes:
            training.restore(folder.resume())
        folder.write_settings(config.as_dict())
        return carry_on(training, folder, console)


def carry_on(training: Training, folder: RunFolder, console: Terminal) -> int:
    """Trains on from the present state and reports; returns the exit status."""
    done = f"{training.epoch} of {training.epochs} epochs"
    if training.step:
        done += f" and {training.step:,} of {training.steps:,} steps"
    console.print(f"The run's folder is {folder.path}, {done} done.")
    again = f"--resume --out {folder.path}"
    file = folder.path / CHECKPOINT
    try:
        Keeper(training, folder, console).fit()
        if training.team.leads:
            report(training, folder, console)
    except DivergedError as error:
        what = "Begin again with a lower --lr or --clip-norm, or another --quantum."
        if file.is_file():
            what = f"Go on with {again} --lr {training.config.lr / 10:g}."
        raise RunError(f"{error} {what}") from error
    except Stopped as stopped:
        state = f"{file} holds the state behind step {training.iteration:,}"
        console.print(f"Stopped. {state}: go on with {again}")
        return 128 + stopped.args[0]  # as shells count
    except KeyboardInterrupt:
        if file.is_file():
            console.print(f"Stopped at once. {file} holds the state saved last: go on with {again}")
        if training.team.joined or not file.is_file():
            raise  # the others may be waiting for this process
        return 130
    return 0


def report(training: Training, folder: RunFolder, console: Terminal) -> None:
    """Shows what the network has learnt, and decodes the test images if it can."""
    draw_curves([folder.path], folder.path / CURVES)
    model = load_network(folder.path, training.device).model
    if is_invertible(model):
        test = plain(training.test_batches.images, training.config, training.device)
        found = decode(model, test.epoch(), test.undo)
        figure = draw([some_decoded(model, test, "original", "decoded")])
        with writing(folder.path / PICTURE):
            figure.savefig(folder.path / PICTURE, dpi=150)
        console.print(table([found], CAPTION))
        console.print(f"Originals above their reconstructions: {folder.path / PICTURE}")
    else:
        console.print(f"Best test accuracy, top 1: {training.best_accuracy:.2%}")
    console.print(f"Log: {folder.path / LOG}, network: {folder.path / CHECKPOINT}")
    if training.config.preset == "digits":
        console.print(NEXT)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the script with these flags, or the command line's; returns the exit status."""
    leads = os.environ.get("RANK", "0") == "0"
    console = Terminal(highlight=False, soft_wrap=True, quiet=not leads)

    def body() -> int:
        config = parse(sys.argv[1:] if arguments is None else arguments, prints=leads)
        with join(config.device) as team:
            return run(config, team, console)

    return ending(body, prints=leads)


if __name__ == "__main__":
    sys.exit(main())
