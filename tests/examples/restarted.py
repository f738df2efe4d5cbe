"""Trains as one of the processes that torchrun starts; the second is killed once, at a step."""

import os
import signal
import sys

import train_imagenet
from trainer import training

train_on = training.Training._train_on


def main(step, *flags):
    def killed(self, *batch):
        first_start = os.environ["TORCHELASTIC_RESTART_COUNT"] == "0"
        if first_start and os.environ["RANK"] == "1" and self.iteration + 1 == int(step):
            os.kill(os.getpid(), signal.SIGKILL)
        train_on(self, *batch)

    training.Training._train_on = killed
    return train_imagenet.main(flags)


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
