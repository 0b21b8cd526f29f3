"""What the examples compute themselves; .ci/run runs them as programs."""

import sys
from pathlib import Path

import numpy as np
import optax
import pytest
from tensorboardX import SummaryWriter
from tensorboardX.proto.event_pb2 import Event

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "examples"))

import flax_mnist  # noqa: E402
import quickstart  # noqa: E402
import tensorboard  # noqa: E402


def test_quickstart_gives_all_methods_the_same_problem_and_replicas(optax_promotion):
    setting = quickstart.Setting(
        dim=2, num_replicas=8, num_steps=3, report_seeds=range(2)
    )
    problem = quickstart.make_problems(2)["Ackley"]
    first = [
        quickstart.make_run(problem, link, setting)(
            np.array([0]), np.array([0.1], "f")
        )[1][0]
        for link in quickstart.make_methods(3).values()
    ]
    # Losses of the initial replicas, [step, replica].
    np.testing.assert_array_equal(first[0][0], first[1][0])
    np.testing.assert_array_equal(first[0][0], first[2][0])
    assert not np.array_equal(first[0][1], first[2][1])


@pytest.mark.slow
@pytest.mark.parametrize(("name", "rate"), [("Schwefel", 0.3), ("Ackley", 0.01)])
def test_quickstart_reaches_minima_that_adam_does_not(name, rate, optax_promotion):
    setting = quickstart.Setting(tuning_seeds=range(1))
    problem = quickstart.make_problems(setting.dim)[name]
    methods = quickstart.make_methods(setting.num_steps)

    def result(method, rates):
        run = quickstart.make_run(problem, methods[method], setting)
        rate = quickstart.tune(run, setting._replace(learning_rates=rates))
        return quickstart.report(problem, run, rate, setting)

    adam = result("Adam", quickstart.LEARNING_RATES)
    ours = result("pranam + Adam", (rate,))
    assert adam.mean.mean() > 10 * ours.mean.mean()
    assert np.sum(ours.best < 1) >= 8
    assert np.sum(adam.best < 1) == 0


@pytest.mark.slow
def test_mnist_is_learned_better_than_by_adam(optax_promotion):
    if not flax_mnist.SHARED.is_dir():
        pytest.skip(f"no MNIST at {flax_mnist.SHARED}")
    data, rate, num_steps = flax_mnist.load_mnist(), 1.5e-2, 2000
    loss, accuracy = {}, {}
    for method in ("Adam", "pranam + Adam"):
        runs = [
            flax_mnist.train(
                flax_mnist.MLP((10, 10)),
                data,
                flax_mnist.make_optimizer(method, rate, num_steps),
                num_replicas=16,
                num_steps=num_steps,
                batch_size=128,
                seed=seed,
            )
            for seed in range(100, 103)
        ]
        loss[method] = np.mean([run.train_loss for run in runs])
        accuracy[method] = np.mean([run.test_accuracy for run in runs])
    assert loss["pranam + Adam"] < 0.85 * loss["Adam"]
    assert accuracy["pranam + Adam"] > accuracy["Adam"] + 0.005


def test_interval_of_the_mean():
    values = np.arange(10.0)
    low, high = quickstart.interval(values)
    assert 2.5 < low < 3.2
    assert 5.8 < high < 6.5
    assert quickstart.interval(np.ones(5)) == (1.0, 1.0)


def test_mnist_is_read():
    if not flax_mnist.SHARED.is_dir():
        pytest.skip(f"no MNIST at {flax_mnist.SHARED}")
    data = flax_mnist.load_mnist()
    assert data.train_x.shape == (60000, 784)
    assert data.test_y.shape == (10000,)
    assert data.train_x.min() == 0.0
    assert data.train_x.max() == 1.0
    # The first digits of the two sets are known: 5, 0, 4, 1, 9 and 7, 2, 1, 0, 4.
    np.testing.assert_array_equal(data.train_y[:5], [5, 0, 4, 1, 9])
    np.testing.assert_array_equal(data.test_y[:5], [7, 2, 1, 0, 4])


def test_missing_and_broken_data_are_named(tmp_path):
    with pytest.raises(SystemExit, match=r"train-images-idx3-ubyte.gz is missing"):
        flax_mnist.load_mnist(tmp_path)
    (tmp_path / "train-images-idx3-ubyte.gz").write_bytes(b"no images")
    with pytest.raises(SystemExit, match="its checksum differs"):
        flax_mnist.load_mnist(tmp_path)


def test_downloads_are_checked_and_cached(tmp_path, monkeypatch):
    name = "train-labels-idx1-ubyte.gz"
    mirror = tmp_path / "mirror"
    mirror.mkdir()
    (mirror / name).write_bytes(b"labels")
    monkeypatch.setattr(
        flax_mnist, "MIRRORS", ("file:///nowhere/", f"file://{mirror}/")
    )
    cache = tmp_path / "cache"
    with pytest.raises(SystemExit, match=r"could not be downloaded from .* --data-dir"):
        flax_mnist._download(name, cache)
    assert not (cache / name).exists()

    digest = flax_mnist.hashlib.sha256(b"labels").hexdigest()
    monkeypatch.setitem(flax_mnist.FILES, name, digest)
    flax_mnist._download(name, cache)
    assert (cache / name).read_bytes() == b"labels"
    monkeypatch.setattr(flax_mnist, "MIRRORS", ())
    flax_mnist._download(name, cache)  # from the cache


def read_events(folder):
    """The events of the one file in a folder, a sequence of TFRecords."""
    (file,) = folder.glob("events.out.tfevents.*")
    data, events = file.read_bytes(), []
    while data:  # length, its checksum, the event, its checksum
        length = int.from_bytes(data[:8], "little")
        events.append(Event.FromString(data[12 : 12 + length]))
        data = data[16 + length :]
    return events


def test_event_files_hold_the_metrics_and_the_embedding(
    tmp_path, monkeypatch, optax_promotion
):
    monkeypatch.setattr(flax_mnist, "SHARED", tmp_path / "nowhere")
    data = tensorboard.load(None)  # what takes the place of MNIST
    assert data[0].shape == (10_000, 784)
    assert set(np.asarray(data[1])) == set(range(10))
    setting = tensorboard.Setting(
        num_replicas=3,
        num_steps=5,
        batch_size=8,
        scalars_every=2,
        histograms_every=3,
    )
    coupling = optax.linear_schedule(1.0, 0.0, 4)
    with SummaryWriter(str(tmp_path)) as writer:
        records = tensorboard.train(data, setting, coupling, writer)
    scalars, histograms = {}, {}
    for event in read_events(tmp_path):
        for value in event.summary.value:
            if value.HasField("histo"):
                histograms[event.step, value.tag] = value.histo
            else:
                scalars[event.step, value.tag] = value.simple_value

    assert [record.step for record in records] == [0, 2, 4]
    assert [record.scalars["coupling"] for record in records] == [1, 0.5, 0]
    for record in records:
        assert record.values.shape == (3,)
        np.testing.assert_allclose(
            record.scalars["loss_mean"], record.values.mean(), rtol=1e-6
        )
        assert {"slope", "curvature", "saturation"} < record.scalars.keys()
    assert scalars == {
        (record.step, f"replicas/{name}"): number
        for record in records
        for name, number in record.scalars.items()
    }

    layers = {"Dense_0": (784, 10), "Dense_1": (10, 10), "Dense_2": (10, 10)}
    sizes = {"embedding/table": 3 * 4}
    for layer, (n_in, n_out) in layers.items():
        for part, rows in (("heads", 4), ("bias", 1)):
            name = f"embedding/{part}/params/{layer}"
            sizes[f"{name}/kernel"] = rows * n_in * n_out
            sizes[f"{name}/bias"] = rows * n_out
    assert histograms.keys() == {(step, tag) for step in (0, 3) for tag in sizes}
    for (_, tag), histogram in histograms.items():
        assert sum(histogram.bucket) == histogram.num == sizes[tag]

    tensorboard.plot(tmp_path / "watch.png", {"pranam": records})
    assert (tmp_path / "watch.png").read_bytes().startswith(b"\x89PNG")
