"""A search for a learning rate, a width and a dropout on the digits, in which Optuna ends bad trials early.

`python examples/optuna_study.py`, with the extra `optuna`: `pip install 'learnloop[optuna]'`.
"""

import argparse

import optuna
import torch
from torch import nn

import learnloop as ll
from learnloop.integrations.optuna import OptunaPruning

parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
parser.add_argument("--trials", type=int, default=20)
parser.add_argument("--epochs", type=int, default=5, help="of a trial that is not pruned")
parser.add_argument("--seed", type=int, default=0)
args = parser.parse_args()

data = ll.datasets.digits()
torch.set_num_threads(1)  # such a small network is done before a second thread has begun


def objective(trial: optuna.Trial) -> float:
    """The accuracy that a trial ends with."""
    lr = trial.suggest_float("lr", 1e-5, 1.0, log=True)
    width = trial.suggest_int("width", 8, 128, log=True)
    dropout = trial.suggest_float("dropout", 0.0, 0.6)
    ll.set_seed(args.seed)  # trials differ by what was suggested, and by nothing else
    dls = ll.DataLoaders(
        ll.TensorLoader(data.x_train, data.y_train, bs=64, shuffle=True),
        ll.TensorLoader(data.x_valid, data.y_valid, bs=512),
        device="cpu",
    )
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, width), nn.ReLU(), nn.Dropout(dropout), nn.Linear(width, 10))
    learn = ll.Learner(dls, model, nn.CrossEntropyLoss(), metrics=ll.accuracy)
    with learn.no_bar(), learn.no_logging():
        learn.fit_one_cycle(args.epochs, lr, cbs=OptunaPruning(trial, monitor="accuracy"))
    return learn.final_record[-1]


optuna.logging.set_verbosity(optuna.logging.WARNING)
study = optuna.create_study(
    direction="maximize",
    sampler=optuna.samplers.TPESampler(seed=args.seed),
    pruner=optuna.pruners.MedianPruner(n_startup_trials=4, n_warmup_steps=0),
)
study.optimize(objective, n_trials=args.trials)

pruned = study.get_trials(states=[optuna.trial.TrialState.PRUNED])
for trial in study.trials:
    steps = [f"{value:.3f}" for value in trial.intermediate_values.values()]
    print(f"{trial.number:>3}  lr {trial.params['lr']:.1e}  {trial.state.name:<8}  {' '.join(steps)}")
print(f"{len(pruned)} of {len(study.trials)} trials pruned")
print(f"best accuracy {study.best_value:.4f} with " + ", ".join(f"{k} {v:.3g}" for k, v in study.best_params.items()))
