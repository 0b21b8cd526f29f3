"""The problems of other fields, against other programs and published values."""

import csv

import boehm
import datasets
import jax
import jax.numpy as jnp
import numpy as np
import peaks
import pytest
import thin_films

from conftest import assert_close

needs_boehm = pytest.mark.skipif(
    not (datasets.SHARED / "boehm").is_dir(), reason="no files of Boehm in ../shared"
)


@pytest.mark.filterwarnings("ignore")  # of PyMoosh itself
@pytest.mark.parametrize("num_layers", [1, 7, 40])
def test_thin_films_reflect_what_pymoosh_says(num_layers, x64, optax_promotion):
    moosh = pytest.importorskip("PyMoosh")
    rng = np.random.default_rng(num_layers)
    index, thickness = rng.uniform(1.2, 3, num_layers), rng.uniform(0, 250, num_layers)
    substrate = 4.0 + 0.5j
    structure = moosh.Structure(
        [1.0, *(index**2), substrate**2],
        list(range(num_layers + 2)),
        [0, *thickness, 0],
        verbose=False,
    )
    expected = moosh.coefficient(structure, 600.0, 0.0, 0)[2]
    result = thin_films.reflectance(jnp.asarray(thickness), index, substrate, 600.0)
    assert_close(result, np.asarray(expected), rtol=1e-10)


def test_quarter_wave_stacks_have_the_published_cost(x64, optax_promotion):
    costs = [thin_films.bragg(num, 1).best_known for num in (10, 20, 40)]
    np.testing.assert_allclose(costs, [0.16486, 0.01448, 9.57e-5], rtol=3e-4)


@pytest.mark.filterwarnings("ignore")
def test_bare_silicon_takes_in_what_it_does_not_reflect(x64, optax_promotion):
    pytest.importorskip("PyMoosh")
    stack = thin_films.photovoltaics(2, 1)
    _, photons, silicon = thin_films.sunlight()
    bare = photons @ np.abs((1 - silicon) / (1 + silicon)) ** 2
    assert_close(stack.cost(jnp.zeros(2)), np.asarray(bare), rtol=1e-12)
    assert 0.3 < bare < 0.5


@needs_boehm
def test_stat5_has_the_likelihood_of_the_collection(x64, optax_promotion):
    folder = datasets.SHARED / "boehm"

    def rows(kind):
        text = (folder / f"{kind}_Boehm_JProteomeRes2014.tsv").read_text()
        return list(csv.DictReader(text.splitlines(), delimiter="\t"))

    names = [*boehm.RATES, *(f"sd_{name}" for name in boehm.OBSERVABLES)]
    nominal = {r["parameterId"]: float(r["nominalValue"]) for r in rows("parameters")}
    params = jnp.log10(jnp.array([nominal[name] for name in names]))
    data = boehm.load()
    fun = boehm.make_likelihood(data)
    value, grad = jax.jit(lambda p: (fun(p), jax.jacfwd(fun)(p)))(params)
    assert abs(value - boehm.LOWEST) < 1e-3
    assert jnp.abs(grad).max() < 0.1
    simulated = [
        [float(r["simulation"]) for r in rows("simulatedData") if name in r.values()]
        for name in boehm.OBSERVABLES
    ]
    computed = jax.jit(lambda p: boehm.simulate(p, data.times))(params)
    np.testing.assert_allclose(computed, simulated, atol=1e-3)


@pytest.mark.slow
@pytest.mark.optimized
def test_the_peaks_of_the_sample_are_found_in_order(x64, optax_promotion):
    x, spectra = peaks.load(peaks.SAMPLE)
    assert spectra.shape == (20, 201)
    with jax.numpy_rank_promotion("allow"):  # positions against peaks, as in NumPy
        result = peaks.fit(x, spectra[0], 4)
    errors = peaks.errors_of(result, "center")
    found = np.asarray(result.params["center"])
    assert np.all(np.abs(found - [425, 433, 444, 472]) < 4 * errors)
    assert 0.8 < result.reduced_chi_square / peaks.NOISE**2 < 1.25
