"""`python -m learnloop`: what it prints, what it writes, and how it ends."""

import os
import re
import signal
import subprocess
import sys

import pytest
import torch

from learnloop import RunRecord
from learnloop.__main__ import main, small_cnn
from learnloop.testing import toy_learner


def start(*arguments, cwd):
    return subprocess.Popen(
        [sys.executable, "-m", "learnloop", *arguments],
        cwd=cwd,
        env={**os.environ, "PYTHONPATH": os.path.dirname(os.path.dirname(__file__))},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def outcome(*arguments, capsys):
    """Exit code and error line of a call in this process."""
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    out, err = capsys.readouterr()
    assert out == ""
    return stop.value.code, err


def test_demo_reaches_98_percent_and_writes_the_learning_curve(tmp_path):
    process = start("demo", cwd=tmp_path)
    out, err = process.communicate(timeout=110)
    assert (process.returncode, err) == (0, "")
    *table, curve, accuracy = out.splitlines()
    assert [line.split()[0] for line in table] == ["epoch", "0", "1", "2", "3", "4", "5", "6", "7"]
    assert curve == "learning curve in learning_curve.png"
    assert re.fullmatch(r"accuracy 0\.9[89]\d\d", accuracy)
    assert (tmp_path / "learning_curve.png").read_bytes().startswith(b"\x89PNG")


def test_the_same_seed_prints_the_same_accuracy(tmp_path, capsys):
    arguments = ("demo", "--epochs", "1", "--device", "cpu", "--out", str(tmp_path / "curve.svg"))
    accuracies = []
    for seed in ("3", "3", "4"):
        assert main([*arguments, "--seed", seed]) == 0
        accuracies.append(capsys.readouterr().out.splitlines()[-1])
    assert accuracies[0] == accuracies[1] != accuracies[2]


def test_ctrl_c_ends_with_130_and_complete_lines(tmp_path):
    process = start("demo", "--epochs", "1000", cwd=tmp_path)
    lines = [process.stdout.readline() for _ in range(3)]  # the head and two epochs
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=30)
    lines += out.splitlines(keepends=True)
    assert process.returncode == 130
    assert err.splitlines()[-1] == "interrupted"
    assert "Traceback" not in err
    assert len({len(line.split()) for line in lines}) == 1, lines
    assert all(line.endswith("\n") for line in lines)
    assert list(tmp_path.iterdir()) == []


def test_without_a_command_the_usage_is_printed(capsys):
    assert outcome(capsys=capsys) == (2, "usage: python -m learnloop [-h] command ...\n")


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["--data", "mnist"], "argument --data: invalid choice: 'mnist'"),
        (["--epochs", "0"], "argument --epochs: `0` is not a number of epochs; give a whole number from 1 up"),
        (["--epochs", "2.5"], "argument --epochs: `2.5` is not a number of epochs; give a whole number from 1 up"),
        (["--lr", "0"], "argument --lr: `0` is not a learning rate; give a number above 0, such as 0.01"),
        (["--lr", "-1"], "argument --lr: `-1` is not a learning rate; give a number above 0, such as 0.01"),
        (["--lr", "nan"], "argument --lr: `nan` is not a learning rate; give a number above 0, such as 0.01"),
        (["--lr", "inf"], "argument --lr: `inf` is not a learning rate; give a number above 0, such as 0.01"),
        (["--lr", "fast"], "argument --lr: `fast` is not a learning rate; give a number above 0, such as 0.01"),
        (["--seed", "-1"], "argument --seed: `-1` is not a seed; give a whole number from 0 to 4294967295"),
        (["--device", "gpu"], "argument --device: `gpu` cannot be used on this machine; `"),
        (["--device", "cuda:99"], "argument --device: `cuda:99` cannot be used on this machine; `"),
        (["--device", "meta"], "argument --device: `meta` cannot be used on this machine; `"),
        (["--device", "cpu:"], "argument --device: `cpu:` cannot be used on this machine; `"),
        (["--out", "curve.txt"], "argument --out: `curve.txt` does not end with .jpg, .pdf, .png, .svg"),
        (["--out", "no/curve.png"], "argument --out: cannot write `no/curve.png`: No such file or directory"),
        (["--rounds", "3"], "unrecognized arguments: --rounds 3"),
    ],
)
def test_a_wrong_value_is_one_line_and_exit_code_2(arguments, line, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, err = outcome("demo", *arguments, capsys=capsys)
    assert code == 2
    assert err.endswith("\n")
    assert len(err.splitlines()) == 1
    assert line in err
    assert list(tmp_path.iterdir()) == []


def test_a_folder_is_no_picture(capsys, tmp_path):
    (tmp_path / "curve.png").mkdir()
    code, err = outcome("demo", "--out", str(tmp_path / "curve.png"), capsys=capsys)
    assert code == 2
    assert err == f"python -m learnloop demo: argument --out: cannot write `{tmp_path / 'curve.png'}`: Is a directory\n"


def test_an_unknown_command_is_one_line_and_exit_code_2(capsys):
    code, err = outcome("dmo", capsys=capsys)
    assert code == 2
    assert len(err.splitlines()) == 1
    assert "invalid choice: 'dmo'" in err


def test_checking_the_picture_leaves_an_existing_file_alone(capsys, tmp_path):
    (tmp_path / "curve.png").write_bytes(b"earlier")
    outcome("demo", "--out", str(tmp_path / "curve.png"), "--epochs", "0", capsys=capsys)
    assert (tmp_path / "curve.png").read_bytes() == b"earlier"


def test_data_that_cannot_be_had_is_one_line_and_exit_code_1(capsys, tmp_path, monkeypatch):
    monkeypatch.setenv("LEARNLOOP_DATA", str(tmp_path))
    monkeypatch.setattr("learnloop.data.datasets._FASHION_DEBIAN", tmp_path)
    monkeypatch.setattr("learnloop.data.datasets._FASHION_URL", "http://127.0.0.1:1")
    assert main(["demo", "--data", "fashion_mnist"]) == 1
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("python -m learnloop demo: `train-images-idx3-ubyte` of Fashion-MNIST is not in ")
    assert len(err.splitlines()) == 1


@pytest.mark.parametrize("size", [8, 28])
def test_small_cnn_takes_digits_and_fashion_mnist(size):
    assert small_cnn()(torch.zeros(2, 1, size, size)).shape == (2, 10)


# The records of fits


def test_runs_lists_the_records_of_a_folder(tmp_path, capsys):
    learn = toy_learner(cbs=RunRecord())
    learn.path = tmp_path
    learn.fit(1)
    assert main(["runs", str(tmp_path / "runs")]) == 0
    head, line = capsys.readouterr().out.splitlines()
    assert head.split()[:2] == ["run", "model"]
    assert line.startswith(next((tmp_path / "runs").iterdir()).stem)


def test_runs_of_a_folder_that_is_not_there_is_one_line_and_exit_code_1(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["runs"]) == 1
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("python -m learnloop runs: there is no folder `runs`.") and len(err.splitlines()) == 1
