import json

import numpy as np
import pytest
import torch
from scipy.sparse.linalg import aslinearoperator
from starting import start
from torch import nn

import spectrum
from analysis import images, in_mode
from invertible import AdditiveCoupling, InvertibleSequential, Merge, PixelUnshuffle, Split, Swap
from networks.irevnet import IRevNet
from spectrum import Settings, draw, energies, growth, leading
from spectrum import jacobian as jacobian_of
from spectrum import spectrum as spectrum_of
from trainer.weights import load_network

CPU = torch.device("cpu")


@pytest.fixture
def rng():
    return np.random.default_rng(0)


@pytest.fixture(scope="module")
def trained(digits_run):
    return load_network(digits_run, CPU)


@pytest.fixture(scope="module")
def model(trained):
    return in_mode(trained, "float64").requires_grad_(False)


@pytest.fixture(scope="module")
def x(trained):
    return images(trained, "test").at_most(1).joined()


@pytest.fixture(scope="module")
def jacobian(model, x):
    return jacobian_of(model.features, x.double())


@pytest.fixture(scope="module")
def inverse(model, x):
    return jacobian_of(model.inverse, model.features(x.double()))


@pytest.fixture(scope="module")
def full(jacobian):
    return jacobian @ np.eye(256)


@pytest.fixture
def injective():
    torch.manual_seed(0)
    shape = {"blocks": (2,), "strides": (1,), "widths": (8,), "downsampling": 1}
    model = IRevNet(10, **shape, quantum=None, checkpoint=False)
    return model.double().eval().requires_grad_(False)


def full_spectrum_of(jacobian):
    return spectrum_of(jacobian, Settings(), rng=None)


def linear_network():
    couplings = [AdditiveCoupling(nn.Conv2d(6, 6, 3, padding=1, bias=False)) for _ in range(2)]
    return InvertibleSequential(
        PixelUnshuffle(2), Split(), couplings[0], Swap(), couplings[1], Merge()
    ).double()


def test_the_spectrum_of_a_linear_network_is_that_of_its_matrix():
    network = linear_network()
    units = torch.eye(48, dtype=torch.float64)
    with torch.no_grad():
        explicit = network(units.view(48, 3, 4, 4)).flatten(1).T
    x = torch.randn(1, 3, 4, 4, dtype=torch.float64)
    found = full_spectrum_of(jacobian_of(network, x))
    np.testing.assert_allclose(found["values"], torch.linalg.svdvals(explicit))
    assert found["values"][0] > 1.1


def test_the_matrix_is_the_derivative(model, x, full):
    expected = torch.autograd.functional.jacobian(model.features, x.double())
    np.testing.assert_allclose(full, expected.view(256, 256), atol=1e-12)


def test_products_with_the_matrix_and_its_transpose_are_those_of_the_matrix(jacobian, full, rng):
    v = rng.standard_normal((256, 40))
    np.testing.assert_allclose(jacobian @ v, full @ v, atol=1e-12)
    np.testing.assert_allclose(jacobian.T @ v, full.T @ v, atol=1e-12)
    np.testing.assert_allclose(jacobian @ v[:, 0], full @ v[:, 0], atol=1e-12)
    np.testing.assert_allclose(jacobian.T @ v[:, 0], full.T @ v[:, 0], atol=1e-12)


def test_the_leading_singular_values_are_those_of_the_full_matrix(jacobian, full, rng):
    values, residual, vectors = leading(jacobian, 20, rng)
    np.testing.assert_allclose(values, np.linalg.svdvals(full)[:20])
    np.testing.assert_allclose(vectors.T @ vectors, np.eye(20), atol=1e-10)
    assert residual < 1e-10


def test_the_residual_tells_when_singular_values_are_wrong(jacobian, rng, monkeypatch):
    def wrong(*args, **kwargs):
        left, values, right = svds(*args, **kwargs)
        return left, values + 0.01, right

    svds = spectrum.svds
    monkeypatch.setattr(spectrum, "svds", wrong)
    np.testing.assert_allclose(leading(jacobian, 5, rng)[1], 0.01, rtol=1e-6)


def test_energies_estimate_the_sum_of_squares(jacobian, full, rng):
    found = energies(jacobian, 200, rng)
    error = found.std(ddof=1) / np.sqrt(200)
    assert abs(found.mean() - np.square(full).sum()) < 4 * error < 0.1 * found.mean()


def test_energies_without_the_leading_vectors_estimate_the_rest(jacobian, full, rng):
    *_, vectors = leading(jacobian, 20, rng)
    found = energies(jacobian, 200, rng, without=vectors)
    error = found.std(ddof=1) / np.sqrt(200)
    assert abs(found.mean() - np.square(np.linalg.svdvals(full)[20:]).sum()) < 4 * error


def test_shares_of_the_energy_are_those_of_the_full_spectrum(jacobian, rng):
    exact = full_spectrum_of(jacobian)
    found = spectrum_of(jacobian, Settings(full_up_to=255, leading=30, samples=100), rng)
    error = 4 * found["energy_error"] / found["energy"]
    assert 0 < error < 0.1
    for key in exact:
        if key.startswith("share_of_first") and found[key] is not None:
            assert found[key] == pytest.approx(exact[key], rel=error)


def test_values_and_shares_are_counted(monkeypatch):
    monkeypatch.setattr(spectrum, "PARTS", (0.4, 0.001))
    monkeypatch.setattr(spectrum, "SHARES", (0.5, 0.6))
    found = full_spectrum_of(aslinearoperator(np.diag([3.0, 2.0, 1.0, 1.0, 1.0])))
    assert found["energy"] == pytest.approx(16)
    assert (found["values_with_50%"], found["values_with_60%"]) == (1, 2)
    assert found["share_of_first_40.00%"] == pytest.approx(13 / 16)
    assert found["share_of_first_0.10%"] == pytest.approx(9 / 16)


def test_what_the_leading_values_do_not_tell_is_left_open(jacobian, rng):
    found = spectrum_of(jacobian, Settings(full_up_to=255, leading=10, samples=10), rng)
    open_ones = ("values_with_97%", "share_of_first_6.64%", "log_det")
    assert [found[name] for name in open_ones] == [None] * 3


def test_a_bijective_network_preserves_volume_though_it_stretches(jacobian):
    found = full_spectrum_of(jacobian)
    assert abs(found["log_det"]) < 1e-10
    assert found["values"][0] > 1.2


def test_the_inverse_has_the_inverse_spectrum(inverse, jacobian):
    values = full_spectrum_of(inverse)["values"]
    np.testing.assert_allclose(values, 1 / full_spectrum_of(jacobian)["values"][::-1])


def test_an_injective_network_has_as_many_singular_values_as_the_image(injective, rng):
    x = torch.randn(1, 3, 4, 4, dtype=torch.float64)
    jacobian = jacobian_of(injective.features, x)
    found = full_spectrum_of(jacobian)
    full = jacobian @ np.eye(48)
    expected = torch.autograd.functional.jacobian(injective.features, x)
    np.testing.assert_allclose(full, expected.view(256, 48), atol=1e-12)
    assert (found["outputs"], found["inputs"]) == (256, 48)
    np.testing.assert_allclose(found["values"][::-1] ** 2, np.linalg.eigvalsh(full.T @ full))
    assert found["log_det"] is None
    values, residual, _ = leading(jacobian, 5, rng)
    np.testing.assert_allclose(values, found["values"][:5])
    assert residual < 1e-10


def test_what_decoding_does_to_errors_is_the_spectrum_of_the_inverse(inverse, full, rng):
    found = growth(inverse, 300, rng)
    values = 1 / np.linalg.svdvals(full)
    assert found["worst"] == pytest.approx(values[-1])
    assert found["random"] == pytest.approx(np.sqrt(np.square(values).mean()), rel=0.05)


def test_decoding_amplifies_a_real_error_as_told(model, inverse, x, full, rng):
    found = growth(inverse, 2, rng)
    phi = model.features(x.double())
    worst = torch.from_numpy(np.linalg.svd(full)[0][:, -1]).view_as(phi)
    moved = model.inverse(phi + 1e-6 * worst) - x.double()
    assert moved.norm().item() / 1e-6 == pytest.approx(found["worst"], rel=1e-3)


def test_the_figure_has_a_curve_for_each_image(jacobian):
    spectra = {name: full_spectrum_of(jacobian) for name in ("one", "other")}
    values, energy = draw(spectra).axes
    assert len(values.lines) == len(energy.lines) == 2
    np.testing.assert_allclose(values.lines[0].get_ydata()[0], 1)
    np.testing.assert_allclose(
        energy.lines[0].get_ydata()[[0, -1]],
        [spectra["one"]["values"][0] ** 2 / spectra["one"]["energy"], 1],
    )


@pytest.mark.slow
@pytest.mark.parametrize(("flags", "count"), [([], 256), (["--full-up-to", "255"], 12)])
def test_the_script_takes_the_full_or_the_leading_spectrum(digits_run, tmp_path, flags, count):
    flags = [*flags, "--leading", "12", "--samples", "8", "--threads", "1", "--limit", "2"]
    assert start(spectrum.main, "--weights", digits_run, "--out", tmp_path, *flags) == 0
    assert (tmp_path / "spectrum.png").exists()
    assert (tmp_path / "spectrum.pdf").exists()
    found = json.loads((tmp_path / "spectrum.json").read_text())["images"]
    assert [image["image"] for image in found] == ["test image 0", "test image 180"]
    assert [len(image["values"]) for image in found] == [count, count]
    if count == 256:
        assert all(abs(image["log_det"]) < 1e-10 for image in found)
        assert found[0]["worst"] == pytest.approx(1 / found[0]["values"][-1])
        condition = found[0]["values"][0] / found[0]["values"][-1]
        assert found[0]["condition_number"] == pytest.approx(condition)
    else:
        assert all(0 < image["residual"] < 1e-9 < image["energy_error"] for image in found)


@pytest.mark.parametrize(("flag", "least"), [("--leading", 2), ("--samples", 2), ("--limit", 1)])
def test_too_few_are_an_error(capsys, flag, least):
    assert start(spectrum.main, flag, least - 1) == 1
    expected = f"error: {flag} must be at least {least}, got {least - 1}."
    assert expected in capsys.readouterr().err
