import os
import pickle
import signal

import numpy as np
import pytest
import torch
from pictures import noise

from experiment.folder import RunError
from images.epochs import Epochs
from images.loading import Arrays, LoadedBatches, Squares

# Python 3.12 and later warn of processes that are forked beside threads, as torch has them.
pytestmark = pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")

CPU = torch.device("cpu")


def arrays(n=6):
    return Arrays(np.stack([np.array(noise(12, 10, seed=i)) for i in range(n)]), np.arange(n))


def squares(source=None, **options):
    return Squares(source or arrays(), **{"size": 8, "resize": 10} | options)


def loaded(source=None, train=False, workers=0, batch_size=4):
    epochs = Epochs(6, batch_size, train)
    return LoadedBatches(squares(source), epochs, workers=workers, device=CPU)


class Broken(Arrays):
    """A source with an image that cannot be read."""

    def read(self, index, mode):
        if index == 3:
            raise RunError("cannot read the image 3.")
        return super().read(index, mode)


class Deadly(Arrays):
    """A source that ends the process, as the kernel does when memory runs out."""

    def read(self, *_):
        os.kill(os.getpid(), signal.SIGKILL)


def test_images_become_squares_in_colour_or_grey():
    for grey, channels in ((False, 3), (True, 1)):
        pixels, labels = squares(grey=grey).__getitems__([(2, None), (4, 7)])
        assert pixels.shape == (2, 8, 8, channels)
        assert pixels.dtype == torch.uint8
        assert labels.tolist() == [2, 4]


def test_augmentation_depends_on_the_seed_alone():
    first, second = (squares().__getitems__([(0, 1), (0, 1), (0, 2)])[0] for _ in range(2))
    assert torch.equal(first, second)
    assert torch.equal(first[0], first[1])
    assert not torch.equal(first[0], first[2])


def test_a_worker_that_starts_afresh_can_read_the_images():
    keys = [(0, None), (1, 5)]
    sent = pickle.loads(pickle.dumps(squares()))
    assert torch.equal(sent.__getitems__(keys)[0], squares().__getitems__(keys)[0])


def test_an_epoch_is_the_same_with_and_without_workers():
    alone, helped = loaded(train=True), loaded(train=True, workers=2)
    for number, start in ((1, 0), (2, 0), (2, 1)):
        pairs = zip(alone.epoch(number, start), helped.epoch(number, start), strict=True)
        for (images, labels), (same_images, same_labels) in pairs:
            assert images.shape == (4, 3, 8, 8)
            assert images.is_contiguous()
            assert torch.equal(images, same_images)
            assert torch.equal(labels, same_labels)


def test_a_batch_may_be_empty():
    pixels, labels = squares().__getitems__([])
    assert pixels.shape == (0, 8, 8, 3)
    assert labels.dtype == torch.int64
    assert len(labels) == 0


@pytest.mark.parametrize("workers", [0, 1])
def test_an_epoch_may_be_left_but_not_mixed_with_another(workers):
    batches = loaded(workers=workers, batch_size=1)
    left = batches.epoch(0)
    next(left)
    assert len(next(batches.epoch(1))[0]) == 1
    with pytest.raises(RuntimeError, match="epoch 0 ended when another one was begun"):
        next(left)
    assert [labels.item() for _, labels in batches.epoch(2)] == list(range(6))


@pytest.mark.parametrize("workers", [0, 1])
def test_an_unreadable_image_ends_the_epoch_with_its_name(workers):
    broken = Broken(arrays().images, arrays().labels)
    with pytest.raises(RunError, match=r"^cannot read the image 3\.$"):
        list(loaded(broken, workers=workers).epoch())


def test_a_worker_that_is_killed_is_explained():
    deadly = Deadly(arrays().images, arrays().labels)
    with pytest.raises(RunError, match=r"died, perhaps out of memory: .* Try fewer --workers"):
        list(loaded(deadly, workers=1).epoch())
