import json

import pytest
from pictures import noise

import separation
from analyses import probes

FEW = ["--train-limit", "300", "--test-limit", "100", "--depths", "2", "--threads", "1"]


@pytest.fixture(autouse=True)
def _quick(monkeypatch):
    monkeypatch.setattr(probes, "COSTS", (0.01,))


def found(out):
    return json.loads((out / "separation.json").read_text())["networks"]


def test_it_probes_each_network_and_draws_them_in_one_figure(digits_run, tmp_path):
    flags = ["--weights", str(digits_run), str(digits_run), *FEW, "--out", str(tmp_path)]
    assert separation.main(flags) == 0
    first, second = found(tmp_path)
    assert first == second
    assert [point["block"] for point in first["points"]] == [1, 3]
    assert [point["channels"] for point in first["points"]] == [16, 256]
    assert (first["train_images"], first["test_images"], first["blocks"]) == (300, 100, 3)
    assert first["points"][-1]["svm"]["accuracy"] > 0.5 > 0.2 > first["chance"]
    for ending in ("png", "pdf"):
        assert (tmp_path / f"separation.{ending}").stat().st_size > 1000


def test_images_of_other_classes_are_refused(digits_run, tmp_path, capsys):
    for part in ("train", "val"):
        (tmp_path / part / "only").mkdir(parents=True)
        noise(16, 16).save(tmp_path / part / "only/image.png")
    assert separation.main(["--weights", str(digits_run), "--data", str(tmp_path)]) == 1
    assert "the network tells 10 classes apart" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--depths", "0"], "error: --depths must be at least 1, got 0."),
        (["--train-limit", "1"], "error: --train-limit must be at least 3, got 1."),
        (["--weights", "nowhere"], "error: there is no nowhere"),
    ],
)
def test_what_is_wrong_is_told_in_one_line(flags, message, capsys):
    assert separation.main(flags) == 1
    assert message in capsys.readouterr().err
