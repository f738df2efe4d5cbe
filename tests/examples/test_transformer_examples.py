"""The GPT and the vision transformer: a few steps, resumed, on two processes, beside others."""

import io
import json
import textwrap

import numpy as np
import pytest
import torch
from archives import batch, write
from PIL import Image
from processes import free_port, run_two

import gpt
import running
import vit
from blocks import transformer

PROGRAMS = {"gpt": gpt, "vit": vit}
TINY = {
    "gpt": ["--layers", "2", "--width", "16", "--length", "12", "--batch-size", "4"],
    "vit": ["--layers", "2", "--width", "16", "--batch-size", "8"],
}


@pytest.fixture(autouse=True)
def unmeasured(monkeypatch):
    """Memory is measured at no depth, which takes seconds."""
    for module in PROGRAMS.values():
        monkeypatch.setattr(module, "DEPTHS", ())


def run(name, out, *flags, steps=4):
    given = ["--out", str(out), "--steps", str(steps), "--warmup", "1", *TINY[name], *flags]
    PROGRAMS[name].main(given)
    return json.loads((out / "record.json").read_text())


def weights(out, name="reversible"):
    return torch.load(out / f"{name}.pt")["network"]


@pytest.mark.parametrize("name", PROGRAMS)
def test_both_networks_train_on_the_same_with_as_many_parameters(name, tmp_path, capsys):
    record = run(name, tmp_path, "--compare")
    ours, ordinary = record["reversible"], record["ordinary"]
    assert ours["parameters"] == ordinary["parameters"]
    assert len(ours["losses"]) == len(ordinary["losses"]) == 4
    np.testing.assert_allclose(ours["losses"][0], ordinary["losses"][0], rtol=0.1)
    assert ours["losses"] != ordinary["losses"]
    assert (tmp_path / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    assert "reversible: step      4/4" in capsys.readouterr().out


@pytest.mark.parametrize("name", PROGRAMS)
def test_memory_is_flat_in_depth(name, tmp_path, monkeypatch):
    monkeypatch.setattr(PROGRAMS[name], "DEPTHS", (2, 4))
    memory = run(name, tmp_path, steps=1)["memory"]
    assert memory["layers"] == [2, 4]
    (few, many), (stored, twice) = memory["rebuilt"], memory["stored"]
    assert many == few
    assert twice > 1.5 * stored


@pytest.mark.parametrize("name", PROGRAMS)
def test_a_run_that_was_stopped_goes_on_as_if_it_had_not_been(name, tmp_path, monkeypatch):
    flags = "--save-every", "1", "--dropout", "0.2"
    whole = tmp_path / "whole"
    run(name, whole, *flags)
    stopped = tmp_path / "stopped"
    save = running.Run._save

    def stop(self):
        save(self)
        if self.step == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(running.Run, "_save", stop)
    with pytest.raises(KeyboardInterrupt):
        run(name, stopped, *flags)
    monkeypatch.setattr(running.Run, "_save", save)
    run(name, stopped, *flags, "--resume")
    for key, tensor in weights(whole).items():
        assert torch.equal(weights(stopped)[key], tensor)


@pytest.mark.parametrize("name", PROGRAMS)
def test_rebuilt_activations_give_the_weights_of_stored_ones(name, tmp_path):
    run(name, tmp_path / "rebuilt")
    run(name, tmp_path / "stored", "--no-checkpoint")
    for key, tensor in weights(tmp_path / "stored").items():
        found = weights(tmp_path / "rebuilt")[key]
        torch.testing.assert_close(found, tensor, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("name", PROGRAMS)
def test_sub_networks_run_in_bfloat16_if_asked(name, tmp_path):
    assert np.isfinite(run(name, tmp_path, "--amp")["reversible"]["losses"]).all()


@pytest.mark.parametrize("name", PROGRAMS)
def test_a_run_is_neither_overwritten_nor_resumed_with_other_settings(name, tmp_path):
    with pytest.raises(SystemExit, match="there is no run in"):
        run(name, tmp_path, "--resume", steps=1)
    run(name, tmp_path, steps=1)
    with pytest.raises(SystemExit, match="has a run already: --resume goes on"):
        run(name, tmp_path, steps=1)
    with pytest.raises(SystemExit, match="--resume takes the settings of the run"):
        run(name, tmp_path, "--resume", "--lr", "0.5", steps=1)


@pytest.mark.slow
def test_two_processes_train_as_one(tmp_path):
    name = "gpt"  # whose step draws nothing
    run(name, tmp_path / "one", steps=3)
    script = tmp_path / "script.py"
    flags = ["--out", str(tmp_path / "two"), "--steps", "3", "--warmup", "1", *TINY[name]]
    script.write_text(
        textwrap.dedent(f"""
            import os
            os.environ["MASTER_PORT"] = "{free_port()}"
            import {name}
            {name}.DEPTHS = (2,)
            {name}.main({flags!r})
        """)
    )
    for status, _, error in run_two(str(script)):
        assert status == 0, error
    for key, tensor in weights(tmp_path / "one").items():
        found = weights(tmp_path / "two")[key]
        torch.testing.assert_close(found, tensor, rtol=1e-3, atol=1e-4)


# --- the GPT


def test_it_writes_a_sample_and_reads_any_text(tmp_path):
    text = tmp_path / "text.txt"
    text.write_bytes(b"abcd efgh " * 100)
    run("gpt", tmp_path / "run", "--data", str(text), steps=1)
    assert (tmp_path / "run" / "sample-reversible.txt").read_text()


def test_it_sees_no_byte_that_is_to_come():
    torch.manual_seed(0)
    network = gpt.GPT(gpt.Config(layers=2, width=16, length=8)).eval()
    one, other = torch.zeros(1, 8, dtype=torch.long), torch.zeros(1, 8, dtype=torch.long)
    other[0, 5] = 7
    with torch.no_grad():
        found = network.logits(one), network.logits(other)
    torch.testing.assert_close(found[0][:, :5], found[1][:, :5])
    assert not torch.allclose(found[0][:, 5], found[1][:, 5])


def test_texts_that_do_not_do_are_refused(tmp_path):
    with pytest.raises(SystemExit, match="there is no file"):
        run("gpt", tmp_path / "run", "--data", str(tmp_path / "none.txt"))
    (tmp_path / "short.txt").write_text("short")
    with pytest.raises(SystemExit, match="the text has 5 bytes, too few for --length 12"):
        run("gpt", tmp_path / "run", "--data", str(tmp_path / "short.txt"))


# --- the vision transformer


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
        table = pyarrow.table({"image": rows, "label": [i % 10 for i in range(count)]})
        files.write_table(table, folder / f"{part}.parquet")
    return folder


def test_it_reads_a_folder_of_parquet(tmp_path):
    data = parquet(tmp_path / "data")
    (x, y), test = vit.read_images(data)
    expected = np.random.default_rng(0).integers(0, 256, (32, 32, 3), np.uint8)
    assert torch.equal(x[0].permute(1, 2, 0), torch.from_numpy(expected))
    assert y.tolist() == [i % 10 for i in range(16)]
    assert len(test[0]) == 4
    flags = ["--data", str(data), "--patch", "8", "--flip"]
    assert run("vit", tmp_path / "run", *flags, steps=2)["reversible"]["test_accuracy"] <= 1
    with pytest.raises(SystemExit, match=r"has neither train\*.parquet nor CIFAR-10"):
        vit.read_images(tmp_path)


def test_it_reads_the_folder_of_cifar_10(tmp_path):
    (x, y), test = vit.read_images(write(tmp_path / "cifar-10-batches-py"))
    assert torch.equal(x[:2].flatten(1), torch.from_numpy(batch(0)[b"data"]))
    assert y[:2].tolist() == batch(0)[b"labels"]
    assert len(x) == 10
    assert len(test[0]) == 2


def test_images_move_by_whole_pixels():
    torch.manual_seed(0)
    x = torch.zeros(64, 1, 5, 5)
    x[:, :, 2, 2] = 1
    moved = vit.augment(x, vit.Config(shift=1))
    assert (moved.sum((1, 2, 3)) == 1).all()
    places = moved.flatten(1).argmax(1)
    assert set(places.tolist()) == {6, 7, 8, 11, 12, 13, 16, 17, 18}


def test_sizes_that_do_not_fit_are_refused(tmp_path):
    with pytest.raises(SystemExit, match="images of 8x8 have no patches of 3"):
        run("vit", tmp_path, "--patch", "3")
    with pytest.raises(SystemExit, match="--width 15 is not a multiple of --heads 4"):
        transformer(1, 15, 4, causal=False)
    with pytest.raises(SystemExit, match="not more than the 1437 images there are"):
        run("vit", tmp_path / "run", "--batch-size", "2000")
