"""A network in training: what moves, and what a step does to it."""

import copy
import math
import random
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint import state_dict as states
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

from errors import RunError, meaning
from experiment.settings import Config
from images.batches import Batches
from images.dataset import difference
from invertible import RebuildError
from trainer.distributed import Team, sharing_gradients
from trainer.optimisation import autocast, build_optimizer, compile_blocks, move_average
from trainer.tally import Tally
from trainer.weights import build_model, fill, read_weights

# States as they are on one process; all processes must call for them, and the leading one saves.
WHOLE = states.StateDictOptions(full_state_dict=True)
SAVED = states.StateDictOptions(full_state_dict=True, cpu_offload=True)


class DivergedError(RunError):
    """What was computed has left all bounds."""


class Training:
    """A network in training: everything that a checkpoint keeps, and what moves it on.

    The learning rate and the images are functions of the step, so that they need no state. A run
    ``begins``, with the weights of ``--weights`` if there are any; or :meth:`restore` follows.
    """

    def __init__(
        self, config: Config, data: tuple[Batches, Batches], team: Team, *, begins: bool = True
    ) -> None:
        torch.manual_seed(config.seed)
        self.config = config
        self.team = team
        self.device = team.device
        self.train_batches, self.test_batches = data
        self.classes = self.train_batches.images.classes
        self.steps = len(self.train_batches)  # in a whole epoch
        self.iterations = config.iterations or config.epochs * self.steps  # steps in the run
        self.epochs = math.ceil(self.iterations / self.steps)  # of which the last may be cut short
        sharded = team.joined and config.parallel == "fsdp"
        self.autocast = autocast(config.precision, self.device)
        halved = self.autocast.fast_dtype is torch.float16
        # Gradients below 6e-8 would become 0 in float16; bfloat16 has the range of float32.
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=halved)
        if sharded and halved:
            raise RunError("--parallel fsdp does not take --precision float16: take bfloat16.")
        if config.sync_batch_norm and self.device.type != "cuda":
            raise RunError("--sync-batch-norm is for NVIDIA GPUs only.")
        self.model: nn.Module = build_model(config, len(self.classes))
        if begins and config.weights is not None:
            fill(self.model, read_weights(config.weights), config.preset, self.classes)
        if config.sync_batch_norm:
            self.model = nn.SyncBatchNorm.convert_sync_batchnorm(self.model)
        # 15 to 30 % less time on a CPU. fully_shard refuses weights in this layout.
        layout = torch.contiguous_format if sharded else torch.channels_last
        self.model.to(self.device, memory_format=layout)  # type: ignore[call-overload]
        # What is tested: the average of the weights if there is one.
        self.tested = copy.deepcopy(self.model) if config.ema else self.model
        for model in dict.fromkeys((self.model, self.tested)):
            if config.compile:
                compile_blocks(model)
            if sharded:
                team.shard(model)
        self.net = self.model  # what stands for it in training
        if team.joined and not sharded:
            index = [self.device] if self.device.type == "cuda" else None
            self.net = DistributedDataParallel(self.model, device_ids=index)
        fused = self.device.type in ("cpu", "cuda") and not sharded
        self.optimizer = build_optimizer(self.model, config, fused=fused)
        torch.manual_seed(config.seed + team.rank)  # dropout differs from process to process
        self.epoch = 0  # how many are done
        self.step = 0  # how many are done of the next epoch
        self.best_accuracy, self.best_epoch = 0.0, 0
        self.tally = Tally(self.device, len(self.classes))
        self.losses: list[Tensor] = []  # of the steps since they were taken last

    @property
    def iteration(self) -> int:
        """How many steps are done in the whole run."""
        return self.epoch * self.steps + self.step

    @property
    def position(self) -> dict[str, Any]:
        """How far it is, with the learning rate of the last step, for the log."""
        lr = self.config.learning_rate(self.iteration - 1, self.steps)
        return {"iteration": self.iteration, "lr": lr}

    def train(self, after_step: Callable[[], object]) -> None:
        """Trains to the end of the epoch; what a call after each step raises ends it."""
        self.net.train()
        if self.step == 0:
            self.tally = Tally(self.device, len(self.classes))
        batches = self.train_batches.epoch(self.epoch, self.step)
        while self.step < self.steps and self.iteration < self.iterations:
            asked = time.perf_counter()
            x, labels = next(batches)
            self.tally.waited += time.perf_counter() - asked
            with self._explaining():
                self._train_on(x, labels)
            self.step += 1
            after_step()

    def _train_on(self, x: Tensor, labels: Tensor) -> None:
        """A step."""
        for group in self.optimizer.param_groups:
            group["lr"] = self.config.learning_rate(self.iteration, self.steps)
        self.optimizer.zero_grad()
        parts, total = self.config.accumulate, torch.zeros((), device=self.device)
        chunks = zip(x.chunk(parts), labels.chunk(parts), strict=True)
        for number, chunk in enumerate(chunks, start=1):
            with sharing_gradients(self.net, number == parts):
                loss = self._loss(*chunk) / parts
                self.scaler.scale(loss).backward()
            total += loss.detach()
        if self.config.clip_norm:
            self.scaler.unscale_(self.optimizer)
            nn.utils.clip_grad_norm_(self.model.parameters(), self.config.clip_norm)
        self.scaler.step(self.optimizer)  # not if scaled gradients have left float16's range
        self.scaler.update()
        if self.config.ema:
            move_average(self.tested, self.model, self.config.ema, self.iteration + 1)
        self.losses.append(total)

    def _loss(self, x: Tensor, labels: Tensor) -> Tensor:
        """The mean loss of some images, each mixed with another if ``--mixup`` is given."""
        mixup, smoothing = self.config.mixup, self.config.label_smoothing
        x = x.contiguous(memory_format=torch.channels_last)
        if mixup:
            rng = random.Random(f"{self.config.seed} mixup {self.iteration}")
            share = rng.betavariate(mixup, mixup)  # what each keeps of itself
            x = torch.lerp(x.flip(0), x, share)
        with self.autocast:
            logits = self.net(x).float()
            loss = F.cross_entropy(logits, labels, label_smoothing=smoothing)
            if mixup:
                other = F.cross_entropy(logits, labels.flip(0), label_smoothing=smoothing)
                loss = torch.lerp(other, loss, share)
        self.tally.add(loss.detach(), logits.detach(), labels)
        return loss

    @torch.no_grad()
    def test(self, after_batch: Callable[[], object]) -> Tally:
        """Goes through the test images; what a call after each batch raises ends it."""
        self.tested.eval()
        tally = Tally(self.device, len(self.classes))
        with self._explaining():
            self.team.follow(self.tested.buffers())
            for x, labels in self.test_batches.epoch():
                if len(labels):
                    with self.autocast:
                        x = x.contiguous(memory_format=torch.channels_last)
                        logits = self.tested(x).float()
                        tally.add(F.cross_entropy(logits, labels), logits, labels)
                after_batch()
        return tally

    @contextmanager
    def _explaining(self) -> Iterator[None]:
        """Says what it means that a step has failed."""
        try:
            yield
        except RebuildError as error:
            raise DivergedError(
                f"activations can't be rebuilt in epoch {self.epoch + 1}, as they can with a "
                f"--quantum or --no-checkpoint. {error}"
            ) from error
        except ValueError as error:
            if str(error).startswith("Expected more than 1 value per channel"):
                raise RunError(
                    "a part of 1 image leaves batch statistics one value to a channel, of "
                    "which there is no deviation: give each process and part more images by a "
                    "larger --batch-size or a smaller --accumulate, or take a larger --image-size."
                ) from error
            # Features beyond the range of exact sums.
            raise DivergedError(
                f"training stops after {self.epoch} whole epochs: {error}"
            ) from error

    def end_epoch(self, accuracy: float) -> bool:
        """Turns to the next epoch; whether the accuracy is the best so far."""
        self.epoch, self.step = self.epoch + 1, 0
        if accuracy <= self.best_accuracy:
            return False
        self.best_accuracy, self.best_epoch = accuracy, self.epoch
        return True

    def read_losses(self) -> list[float]:
        """The loss of each step since the list was cleared; it waits for the device."""
        if not self.losses:
            return []
        losses = self.team.total(torch.stack(self.losses)) / self.team.ranks
        if not losses.isfinite().all():
            raise DivergedError(f"the loss is no longer finite in epoch {self.epoch + 1}.")
        return losses.tolist()

    def state(self) -> dict[str, Any]:
        """What :meth:`restore` needs to go on as if never stopped; all processes must call it."""
        on_gpu = self.device.type == "cuda"
        average = (
            states.get_model_state_dict(self.tested, options=SAVED) if self.config.ema else None
        )
        model, optimizer = states.get_state_dict(self.model, self.optimizer, options=SAVED)
        rng = torch.get_rng_state(), torch.cuda.get_rng_state(self.device) if on_gpu else None
        return {
            "config": self.config.as_dict(),
            "classes": list(self.classes),
            "images": self._images_of_the_run(),
            "epoch": self.epoch,
            "step": self.step,
            "model": model,
            "average": average,
            "optimizer": optimizer.get("state"),  # its settings are those of the run
            "scaler": self.scaler.state_dict(),
            "best_accuracy": self.best_accuracy,
            "best_epoch": self.best_epoch,
            "tally": self.team.total(self.tally.sums),
            "losses": self.read_losses(),
            "rng": self.team.gather(rng),
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Takes over a state that was saved under the same settings and on the same images."""
        # What is not whole fails in many ways.
        with meaning("the checkpoint is not whole, or of another version", Exception):
            self._check(state)
            self.epoch, self.step = int(state["epoch"]), int(state["step"])
            if self.config.ema:
                states.set_model_state_dict(self.tested, state["average"], options=WHOLE)
            if any(state["optimizer"].values()):  # as SGD without momentum has none
                moves = states.get_optimizer_state_dict(self.model, self.optimizer)
                moves["state"] = state["optimizer"]
                states.set_optimizer_state_dict(self.model, self.optimizer, moves, options=WHOLE)
            states.set_model_state_dict(self.model, state["model"], options=WHOLE)
            self.scaler.load_state_dict(state["scaler"])
            self.best_accuracy, self.best_epoch = state["best_accuracy"], state["best_epoch"]
            if self.team.leads:  # the sums are those of all processes
                self.tally.sums.copy_(state["tally"])
            self.losses = list(torch.tensor(state["losses"], device=self.device))
            if self.team.rank < len(state["rng"]):
                cpu, cuda = state["rng"][self.team.rank]
                torch.set_rng_state(cpu)
                if self.device.type == "cuda" and cuda is not None:
                    torch.cuda.set_rng_state(cuda, self.device)

    def _check(self, state: dict[str, Any]) -> None:
        settings = self.config.differences(state["config"])
        if settings:
            raise RunError(f"the run to resume has other settings: {'; '.join(settings)}.")
        changes = [difference(state["classes"], self.classes)]
        for part, (count, names) in self._images_of_the_run().items():
            old_count, old_names = state["images"][part]
            if old_count != count:
                changes.append(f"{part} images were {old_count:,}, are {count:,}")
            elif old_names != names:
                changes.append(f"{part} images have other names or classes")
        if any(changes):
            raise RunError(
                f"the run was on other images: {'; '.join(filter(None, changes))}. Give it the "
                "same again; or begin a new one on these, with --weights of this one."
            )

    def _images_of_the_run(self) -> dict[str, tuple[int, int]]:
        parts = {"train": self.train_batches, "test": self.test_batches}
        return {part: (len(b.images), b.images.fingerprint()) for part, b in parts.items()}
