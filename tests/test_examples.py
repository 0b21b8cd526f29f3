"""What the examples compute themselves; .ci/run runs them as programs."""

import concurrent.futures
import hashlib
import http.server
import threading

import datasets
import flax_mnist
import jax
import nist_problems
import numpy as np
import optax
import pytest
import quickstart
import tensorboard
from tensorboardX import SummaryWriter
from tensorboardX.proto.event_pb2 import Event

from conftest import assert_close, assert_equal, refused

needs_mnist = pytest.mark.skipif(
    not (datasets.SHARED / "mnist").is_dir(), reason="no files of MNIST in ../shared"
)


def test_quickstart_gives_all_methods_the_same_problem_and_replicas(optax_promotion):
    setting = quickstart.Setting(
        dim=2, num_replicas=8, num_steps=3, report_seeds=range(2)
    )
    problem, methods = quickstart.make_problems(2)["Ackley"], quickstart.make_methods(3)

    def run(method):  # losses, [step, replica], and where they were
        run = quickstart.make_run(problem, methods[method], setting)
        return [x[0] for x in run(np.array([0]), np.array([0.1], "f"))[1:]]

    (adam, start), (ours, our_start) = run("Adam"), run("pranam + Adam")
    assert_equal(start[0], our_start[0])  # bit for bit
    assert_close(adam[0], ours[0], 1e-6)  # two programs round differently
    assert not np.array_equal(adam[1], ours[1])


@pytest.mark.slow
@pytest.mark.optimized
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
@pytest.mark.optimized
@needs_mnist
def test_four_elastic_replicas_learn_more_than_one_model(optax_promotion):
    data, model = flax_mnist.load_mnist(), flax_mnist.linen_model((10, 10))
    sizes = {"num_steps": 1000, "batch_size": 2048}

    def results(num_replicas, rate):
        tx = flax_mnist.make_optimizer(rate, 1000, elastic=num_replicas > 1)
        given = {"num_replicas": num_replicas, **sizes}
        seeds = range(100, 103)
        runs = [flax_mnist.train(model, data, tx, seed=seed, **given) for seed in seeds]
        numbers = [(run.train_loss, run.test_accuracy) for run in runs]
        return np.mean(numbers, axis=(0, 2))  # of seeds and replicas

    loss_of_one, accuracy_of_one = results(1, 1e-2)
    loss, accuracy = results(4, 3e-2)
    assert loss < 0.85 * loss_of_one
    assert accuracy > accuracy_of_one + 0.005


@pytest.mark.parametrize("make", [flax_mnist.linen_model, flax_mnist.nnx_model])
def test_both_models_of_flax_are_the_same_network(make):
    model = make((10, 10))
    params = jax.eval_shape(model.init, jax.random.key(0))
    sizes = sorted(x.size for x in jax.tree.leaves(params))
    assert sizes == [10, 10, 10, 100, 100, 7840]
    images = jax.ShapeDtypeStruct((3, 784), np.float32)
    assert jax.eval_shape(model.logits, params, images).shape == (3, 10)


def test_interval_of_the_mean():
    values = np.arange(10.0)
    low, high = quickstart.interval(values)
    assert 2.5 < low < 3.2
    assert 5.8 < high < 6.5
    assert quickstart.interval(np.ones(5)) == (1.0, 1.0)


@needs_mnist
def test_mnist_is_read():
    data = flax_mnist.load_mnist()
    assert data.train_x.shape == (60000, 784)
    assert data.test_y.shape == (10000,)
    assert data.train_x.min() == 0.0
    assert data.train_x.max() == 1.0
    # The first digits of the two sets are known: 5, 0, 4, 1, 9 and 7, 2, 1, 0, 4.
    assert_equal(data.train_y[:5], [5, 0, 4, 1, 9])
    assert_equal(data.test_y[:5], [7, 2, 1, 0, 4])


# Data: from folders, and from a server on the loopback address.


class Handler(http.server.BaseHTTPRequestHandler):
    """Sends what its server's `pages` say: (announced length, content) by path."""

    def do_GET(self):
        self.server.requested.append(self.path)
        if self.path not in self.server.pages:
            return self.send_error(404)
        length, content = self.server.pages[self.path]
        self.send_response(200)
        self.send_header("Content-Length", str(length))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *args):
        pass


@pytest.fixture
def server(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets, "SHARED", tmp_path / "nowhere")
    monkeypatch.setattr(datasets, "CACHE", tmp_path / "cache")
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        server.pages, server.requested = {}, []
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        yield server
        server.shutdown()
        thread.join()


CONTENT = b"1 2 3\n" * 1000


def source(server, *paths):
    urls = tuple(f"http://127.0.0.1:{server.server_port}{path}" for path in paths)
    return {"a.dat": datasets.Source(urls, hashlib.sha256(CONTENT).hexdigest())}


def files(folder):
    return sorted(path.name for path in folder.rglob("*") if path.is_file())


def test_downloads_are_cached(server, tmp_path):
    server.pages = {"/a.dat": (len(CONTENT), CONTENT)}
    # The first mirror does not have it.
    sources = source(server, "/gone.dat", "/a.dat")
    for _ in range(2):
        assert datasets.find("set", sources) == {"a.dat": CONTENT}
    assert server.requested == ["/gone.dat", "/a.dat"]
    assert files(tmp_path) == ["a.dat"]
    # What an older program or a full disk has left there is replaced.
    (tmp_path / "cache" / "set" / "a.dat").write_bytes(b"<html>")
    assert datasets.find("set", sources) == {"a.dat": CONTENT}
    assert (tmp_path / "cache" / "set" / "a.dat").read_bytes() == CONTENT


@pytest.mark.parametrize(
    ("length", "content", "message"),
    [
        (len(CONTENT), CONTENT[:500], "cut off after 500 bytes"),
        (18, b"<html>log in</html>"[:18], "sent a web page instead of the file"),
        (3, b"abc", "sent 3 bytes of another checksum instead of the file"),
        (None, None, "HTTP Error 404: Not Found"),
    ],
)
def test_a_failed_download_says_what_to_do(length, content, message, server, tmp_path):
    if content is not None:
        server.pages = {"/a.dat": (length, content)}
    with pytest.raises(SystemExit) as error:
        datasets.find("set", source(server, "/a.dat"))
    assert f"/a.dat: {message}" in str(error.value)
    assert "name that folder with --data-dir" in str(error.value)
    assert files(tmp_path) == []  # nothing is cached
    # Nor does it stay: the next run gets the file.
    server.pages = {"/a.dat": (len(CONTENT), CONTENT)}
    assert datasets.find("set", source(server, "/a.dat")) == {"a.dat": CONTENT}


def test_no_connection_says_what_to_do(server):
    nowhere = datasets.Source(("http://127.0.0.1:1/a.dat",), "0" * 64)
    sources, message = {"a.dat": nowhere}, r"refused.*\n.*--data-dir"
    refused(message, datasets.find, "set", sources, error=SystemExit)


def test_concurrent_downloads_do_not_mix(server, tmp_path):
    barrier = threading.Barrier(8)

    class Slow(Handler):
        def do_GET(self):
            barrier.wait()  # all of them download at the same time
            super().do_GET()

    server.RequestHandlerClass = Slow
    server.pages = {"/a.dat": (len(CONTENT), CONTENT)}
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        sources = [source(server, "/a.dat")] * 8
        found = list(pool.map(lambda source: datasets.find("set", source), sources))
    assert found == [{"a.dat": CONTENT}] * 8
    assert files(tmp_path) == ["a.dat"]


@pytest.mark.parametrize(
    ("load", "file"),
    [
        (flax_mnist.load_mnist, "train-images-idx3-ubyte.gz"),
        (lambda folder: nist_problems.load(folder, ["Misra1a"]), "Misra1a.dat"),
    ],
)
def test_missing_and_broken_files_are_named(load, file, server, tmp_path):
    refused(f"{file} is missing.* --data-dir", load, tmp_path, error=SystemExit)
    (tmp_path / file).write_bytes(b"no data")
    refused("its checksum differs", load, tmp_path, error=SystemExit)
    (tmp_path / "a.dat").write_bytes(CONTENT)
    found = datasets.find("set", source(server, "/a.dat"), tmp_path)
    assert found == {"a.dat": CONTENT}
    assert server.requested == []


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
    monkeypatch.setattr(datasets, "SHARED", tmp_path / "nowhere")
    data = tensorboard.load(None)  # what takes the place of MNIST
    assert data[0].shape == (10_000, 784)
    assert set(np.asarray(data[1])) == set(range(10))
    sizes = {"num_replicas": 3, "num_steps": 5, "batch_size": 8}
    setting = tensorboard.Setting(**sizes, scalars_every=2, histograms_every=3)
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
        assert_close(record.scalars["loss_mean"], record.values.mean(), 1e-6)
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
