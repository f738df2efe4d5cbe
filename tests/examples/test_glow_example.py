"""The example of images: a few steps, resumed, of other data, on two processes."""

import io
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from archives import pack, write
from PIL import Image
from processes import free_port, run_two

import glow
from multiscale import make_flow
from small_images import read_images, save_grid

TINY = ["--depth", "1", "--width", "8", "--batch-size", "16", "--warmup", "1"]


def run(out, *flags, steps=4):
    glow.main(["--out", str(out), "--steps", str(steps), *TINY, *flags])
    return json.loads((out / "record.json").read_text())


def weights(out):
    return torch.load(out / "checkpoint.pt")["flow"]


def test_digits_are_learned_coded_without_loss_and_drawn(tmp_path, capsys):
    record = run(tmp_path, "--lr", "0.01", steps=12)
    assert 0 < record["bits_per_dim"] < 4.6
    assert record["wrong_pixels_of_reconstructions"] == 0
    for name in ("samples", "reconstructions", "interpolation", "curve"):
        assert (tmp_path / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    history = torch.load(tmp_path / "checkpoint.pt")["history"]
    assert torch.stack(history[-3:]).mean() < torch.stack(history[:3]).mean()
    assert "step     12/12" in capsys.readouterr().out


@pytest.mark.parametrize("when", [1, 3])
def test_a_run_that_was_stopped_goes_on_as_if_it_had_not_been(when, tmp_path, monkeypatch):
    whole = tmp_path / "whole"
    expected = run(whole, "--save-every", "1", "--flip")
    stopped = tmp_path / "stopped"
    save = glow.save

    def stop(path, state):
        save(path, state)
        if state["step"] == when:
            raise KeyboardInterrupt

    monkeypatch.setattr(glow, "save", stop)
    with pytest.raises(KeyboardInterrupt):
        run(stopped, "--save-every", "1", "--flip")
    monkeypatch.setattr(glow, "save", save)
    record = run(stopped, "--save-every", "1", "--flip", "--resume")
    for name, tensor in weights(whole).items():
        assert torch.equal(weights(stopped)[name], tensor)
    assert record["bits_per_dim"] == expected["bits_per_dim"]


def test_a_run_is_resumed_with_its_own_settings_and_not_without_a_checkpoint(tmp_path):
    with pytest.raises(SystemExit, match=r"there is no .*checkpoint.pt to resume"):
        run(tmp_path, "--resume")
    run(tmp_path, steps=1)
    with pytest.raises(SystemExit, match="--resume takes the settings of the run"):
        run(tmp_path, "--resume", "--lr", "0.5", steps=1)


def test_rebuilt_activations_give_the_weights_of_stored_ones(tmp_path):
    run(tmp_path / "rebuilt")
    run(tmp_path / "stored", "--no-checkpoint")
    for name, tensor in weights(tmp_path / "stored").items():
        torch.testing.assert_close(
            weights(tmp_path / "rebuilt")[name], tensor, rtol=1e-3, atol=1e-4
        )


def test_networks_run_in_bfloat16_if_asked(tmp_path):
    assert run(tmp_path, "--amp")["bits_per_dim"] < 6


def parquet(folder):
    pyarrow = pytest.importorskip("pyarrow")
    import pyarrow.parquet as files

    folder.mkdir()
    for part, count in (("train", 16), ("test", 4)):
        rows = []
        for i in range(count):
            buffer = io.BytesIO()
            array = np.random.default_rng(i).integers(0, 256, (32, 32, 3), np.uint8)
            Image.fromarray(array).save(buffer, "PNG")
            rows.append({"bytes": buffer.getvalue(), "path": None})
        files.write_table(pyarrow.table({"img": rows}), folder / f"{part}-0.parquet")
    return folder


@pytest.mark.parametrize("kind", ["archive", "folder", "parquet"])
def test_cifar_10_is_read_in_all_its_forms(kind, tmp_path):
    folder = tmp_path / "cifar-10-batches-py"
    data = parquet(folder) if kind == "parquet" else write(folder)
    data = pack(data) if kind == "archive" else data
    train, test, shades = read_images(data)
    assert train.dtype == torch.uint8
    assert train.shape[1:] == test.shape[1:] == (3, 32, 32)
    assert shades == 256
    record = run(tmp_path / "run", "--data", str(data), "--batch-size", "8", steps=1)
    assert 0 < record["bits_per_dim"] < 12


def test_the_first_image_of_a_parquet_is_that_of_its_png(tmp_path):
    train, _, _ = read_images(parquet(tmp_path / "data"))
    expected = np.random.default_rng(0).integers(0, 256, (32, 32, 3), np.uint8)
    assert torch.equal(train[0].permute(1, 2, 0), torch.from_numpy(expected))


def test_what_is_no_cifar_10_is_refused(tmp_path):
    with pytest.raises(SystemExit, match="is not CIFAR-10: neither the archive"):
        read_images(tmp_path)
    with pytest.raises(SystemExit, match="--batch-size is more than the 1437 images there are"):
        run(tmp_path, "--batch-size", "2000")


def test_a_flow_has_a_stream_a_level_and_loses_nothing():
    flow = make_flow((3, 16, 16), 256, levels=3, depth=1, width=8, checkpoint=True)
    x = torch.randint(256, (4, 3, 16, 16))
    z = flow.layer(x)
    assert [part.shape[1:] for part in z] == [(24, 2, 2), (6, 8, 8), (12, 4, 4)] or len(z) == 3
    assert sum(part.shape[1:].numel() for part in z) == 3 * 16 * 16
    assert torch.equal(flow.layer.inverse(z), x.float())


def test_a_grid_has_a_white_line_around_each_image(tmp_path):
    save_grid([torch.zeros(3, 1, 8, 8), torch.zeros(3, 1, 8, 8)], 17, tmp_path / "grid.png")
    with Image.open(tmp_path / "grid.png") as image:
        grid = np.asarray(image)
    assert grid.shape == (2 * 10 * 6, 3 * 10 * 6)
    assert (grid[:6] == 255).all()
    assert (grid[6:54, 6:54] == 0).all()


@pytest.mark.slow
def test_two_processes_train_one_flow(tmp_path):
    flags = ["--out", str(tmp_path), "--steps", "3", *TINY]
    lines = [
        "import os, glow",
        f"os.environ['MASTER_PORT'] = '{free_port()}'",
        f"glow.main({flags!r})",
    ]
    for status, _, errors in run_two("-c", "; ".join(lines)):
        assert status == 0, errors
    record = json.loads((tmp_path / "record.json").read_text())
    assert 0 < record["bits_per_dim"] < 6
    assert len(list(Path(tmp_path).glob("*.png"))) == 4
