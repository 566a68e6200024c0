"""Every benchmark runs in its shortest form, and the peers do the same work as the hand-written loop."""

import importlib
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import learnloop as ll

ROOT = Path(__file__).parents[1]
BENCHMARKS = ROOT / "benchmarks"


@pytest.fixture(scope="module")
def module():
    """Imports a benchmark by its name."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(BENCHMARKS)  # they import each other
        yield importlib.import_module


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def script(path, *args):
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.run([sys.executable, ROOT / path, *args], env=env, capture_output=True, text=True)


def weights(model):
    return torch.cat([p.detach().flatten() for p in model.parameters()])


PEERS = ("Ignite", "skorch", "accelerate", "Lightning", "Hugging Face Trainer", "fastai")


@pytest.mark.parametrize("name", PEERS)
def test_a_peer_comes_to_the_weights_of_the_hand_written_loop(module, name):
    loops, peers = module("loops"), module("peers")
    peer = next(peer for peer in peers.PEERS if peer.name == name)
    if not peer.is_installed:
        pytest.skip(f"needs {peer.package}")
    data = loops.make_batches(6)
    by_hand = loops.tiny_job(data)
    opt = by_hand.optimizer()
    for x, y in data:
        by_hand.loss_func(by_hand.model(x), y).backward()
        opt.step()
        opt.zero_grad()
    job = loops.tiny_job(data, valid=loops.make_batches(2), listeners=2 if peer.n_handlers else 0)
    peer.train(job)()
    assert torch.equal(weights(job.model), weights(by_hand.model))
    assert data.seconds > 0


def test_a_package_that_is_not_there_is_named_with_the_reason(module):
    assert module("peers").why_not("no_such_package") == "ModuleNotFoundError: No module named 'no_such_package'"


def test_the_bar_is_drawn_for_a_terminal_that_is_not_there(module, capsys):
    overhead, loops = module("overhead"), module("loops")
    drawn = []
    loop = overhead.learnloop_with_bar(loops.make_batches(3))
    learn = loop.run.__closure__[0].cell_contents
    learn.add_cb(ll.Callback(after_batch=lambda cb: drawn.append(cb.progress.pbar is not None)))
    loop.run()
    assert any(drawn)
    assert capsys.readouterr().out == ""


def test_the_picture_of_the_overhead_is_written(module, tmp_path):
    overhead = module("overhead")
    rows = [overhead.Row("train", f"loop {i}", 9.0, 1.0, 1.1, (1.0, 1.2), None) for i in range(4)]
    found = {
        "date": "2026-01-01",
        "cpu": "a processor",
        "versions": {"torch": "2.13.0"},
        "rows": [vars(r) for r in rows],
    }
    overhead.draw(found, tmp_path / "overhead.png")
    assert (tmp_path / "overhead.png").read_bytes()[:4] == b"\x89PNG"


def test_the_hand_written_training_and_ours_come_to_the_same_weights(module):
    trainings = module("trainings")
    task = trainings.text(96)
    jobs = [task.job(1, ll.TensorLoader) for _ in range(2)]
    fixed = [job._replace(train=[job.train.one_batch()] * 2) for job in jobs]
    trainings.by_hand(fixed[0])()
    trainings.learnloop(fixed[1])()
    assert torch.allclose(weights(fixed[0].model), weights(fixed[1].model), atol=1e-6)


def test_trainings_of_every_task_are_measured(module):
    trainings = module("trainings")
    for title, make in trainings.TASKS.items():
        rows = trainings.measure(title, make(96), rounds=2, epochs=1, with_peers=False)
        assert [row.name for row in rows] == list(trainings.OURS)
        assert all(row.seconds > 0 for row in rows)


def test_the_memory_of_a_training_is_measured(module):
    found = module("trainings").alone("tiny network", "hand-written", 1, 96)
    assert found["peak"] > 50
    assert found["tensors"] == 0  # plain SGD keeps nothing


def test_loaders_are_measured_without_workers(module):
    loaders = module("loaders")
    x, y = torch.rand(64, 1, 28, 28), torch.arange(64) % 10
    runs = {name: run for name, run in loaders.makers(x, y).items() if "2 workers" not in name}
    rows = loaders.measure(runs, 1, rounds=2)
    assert len(rows) == 5
    assert all(row.rate > 0 for row in rows)


def test_the_dataset_flips_and_crops_each_sample_as_the_batch_functions_do(module):
    loaders = module("loaders")
    x = torch.arange(36.0).view(1, 1, 6, 6)
    torch.manual_seed(0)
    single = {tuple(loaders.Augmented(x, torch.zeros(1))[0][0].flatten().tolist()) for _ in range(1500)}
    batch = x.expand(1500, 1, 6, 6)
    for function in loaders.FUNCTIONS:
        batch = function(batch)
    assert {tuple(image.flatten().tolist()) for image in batch} == single
    assert len(single) == 50  # flipped or not, five places each way


def test_the_loops_for_a_gpu_train_alike_in_every_precision(module):
    gpu = module("gpu")
    name = next(iter(gpu.NETWORKS))
    for mode in ("fp32", "bf16"):
        setting = gpu.Setting(name, mode, compiled=False, device="cpu", bs=4)
        jobs = [setting.job(2) for _ in range(2)]
        gpu.by_hand(setting, jobs[0])()
        gpu.learnloop(setting, jobs[1])()
        assert torch.allclose(weights(jobs[0].model), weights(jobs[1].model), atol=1e-4)


def test_without_a_gpu_its_benchmark_says_so():
    done = script("benchmarks/gpu.py")
    assert (done.returncode, done.stdout) == (0, "There is no GPU that torch can use: nothing was measured.\n")


def test_resnet18_has_the_parameters_of_the_paper_at_this_size(module):
    model = module("networks").resnet18()
    assert sum(p.numel() for p in model.parameters()) == 11_173_962  # kuangliu/pytorch-cifar, ResNet18
    assert model(torch.zeros(2, 3, 32, 32)).shape == (2, 10)


def test_an_import_is_timed_and_its_memory_read(module):
    found = module("import_time").imported("json")
    assert found.seconds > 0
    assert found.memory > 1


def test_the_speed_run_trains_and_gives_its_spread():
    try:
        ll.datasets.fashion_mnist(download=False)
    except FileNotFoundError:
        pytest.skip("needs Fashion-MNIST: apt-get install dataset-fashion-mnist")
    done = script(
        "examples/speedrun.py", *["--seeds", "2", "--epochs", "1", "--n", "100", "--bs", "50", "--width", "4"]
    )
    assert done.returncode == 0, done.stderr
    assert [line.split()[0] for line in done.stdout.splitlines()] == ["seed", "seed", "accuracy", "94"]
    assert "±" in done.stdout
