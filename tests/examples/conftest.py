"""What tests of the example share: a trained network, and a folder to run in."""

import pytest

import train_imagenet


@pytest.fixture(scope="session")
def digits_run(tmp_path_factory):
    """The folder of a run: a tiny bijective i-RevNet, trained on the digits for an epoch."""
    folder = tmp_path_factory.mktemp("runs") / "digits"
    flags = ["--blocks", "1", "1", "1", "--epochs", "1", "--batch-size", "128"]
    assert train_imagenet.main([*flags, "--out", str(folder)]) == 0
    return folder


@pytest.fixture
def _in_a_folder_of_its_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
