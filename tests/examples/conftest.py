"""A trained network that the tests of the analyses share."""

import pytest

import train_imagenet


@pytest.fixture(scope="session")
def digits_run(tmp_path_factory):
    """The folder of a run: a tiny bijective i-RevNet, trained on the digits for an epoch."""
    folder = tmp_path_factory.mktemp("runs") / "digits"
    flags = ["--blocks", "1", "1", "1", "--epochs", "1", "--batch-size", "128"]
    assert train_imagenet.main([*flags, "--out", str(folder)]) == 0
    return folder
