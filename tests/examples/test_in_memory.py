from types import SimpleNamespace

import pytest
import torch

from images.epochs import Epochs, Share
from images.in_memory import TensorBatches, shifted


@pytest.fixture
def small():
    images = torch.randint(1, 256, (7, 3, 6, 5), dtype=torch.uint8)
    return SimpleNamespace(images=images, labels=torch.arange(7))


def batches(small, batch_size=3, train=True, share=None, **options):
    epochs = Epochs(7, batch_size, train, share=share or Share())
    return TensorBatches(small.images, small.labels, epochs, **options)


def test_a_test_shows_the_images_in_order_as_they_are(small):
    test = batches(small, train=False, padding=2, flip=True)
    assert len(test) == 3
    images, labels = (torch.cat(parts) for parts in zip(*test.epoch(), strict=True))
    assert torch.equal(images, small.images)
    assert torch.equal(labels, small.labels)


def test_training_shuffles_images_together_with_their_labels(small):
    train = batches(small)
    found = list(train.epoch(1))
    assert len(train) == len(found) == 2
    assert torch.cat([labels for _, labels in found]).tolist() != list(range(6))
    for images, labels in found:
        assert torch.equal(images, small.images[labels])


def test_mirroring_is_done_to_about_half_of_the_images(small):
    mirrored = 0
    for number in range(20):
        [(images, labels)] = batches(small, 7, flip=True).epoch(number)
        for image, original in zip(images, small.images[labels], strict=True):
            assert torch.equal(image, original) or torch.equal(image, original.flip(-1))
            mirrored += torch.equal(image, original.flip(-1))
    assert 40 < mirrored < 100


def cut(image, row, column, mirror):
    """The plain way to one image of :func:`shifted`."""
    framed = torch.nn.functional.pad(image, (2,) * 4)
    cut = framed[:, row : row + image.shape[1], column : column + image.shape[2]]
    return cut.flip(-1) if mirror else cut


def test_each_image_is_moved_and_mirrored_by_itself(small):
    corners = torch.tensor([[0, 0], [4, 4], [0, 4], [4, 0], [2, 2], [1, 3], [3, 0]])
    mirrored = torch.tensor([True, False, True, False, True, False, True])
    found = shifted(small.images, 2, corners, mirrored)
    for image, original, corner, mirror in zip(
        found, small.images, corners.tolist(), mirrored.tolist(), strict=True
    ):
        assert torch.equal(image, cut(original, *corner, mirror))


def test_training_moves_images_every_way(small):
    moves = set()
    for number in range(30):
        [(images, labels)] = batches(small, 7, padding=2).epoch(number)
        for image, original in zip(images, small.images[labels], strict=True):
            [move] = [
                (row, column)
                for row in range(5)
                for column in range(5)
                if torch.equal(cut(original, row, column, False), image)
            ]
            moves.add(move)
    assert len(moves) == 25


def test_processes_augment_as_one_alone(small):
    options = {"batch_size": 6, "padding": 2, "flip": True}
    [(whole, _)] = batches(small, **options).epoch(4)
    parts = [next(batches(small, share=Share(r, 3), **options).epoch(4))[0] for r in range(3)]
    assert torch.equal(torch.cat(parts), whole)
