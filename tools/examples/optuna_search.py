"""Your own Optuna objective: each trial trains on the distilled set. `python tools/examples/optuna_search.py`

`tools/search_architectures.py` does more: many processes, baselines, and a report on how far to trust it.
"""

import argparse

import optuna
import torch
from torch import nn
from torchvision.transforms.v2.functional import normalize

from distilled_data import DistilledDataset, soft_cross_entropy
from ncfm_engine.sources import hold_out, load_source

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("folder", nargs="?", default="tools/results/digits/digits-ipc10", help="of digits")
parser.add_argument("--labels", default="soft", choices=["soft", "hard"])
parser.add_argument("--epochs", type=int, default=50)
parser.add_argument("--trials", type=int, default=10)
parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
arguments = parser.parse_args()

# from the Hub: DistilledDataset.from_hub("org/digits-ncfm", revision="v1", labels=arguments.labels)
data = DistilledDataset.from_folder(arguments.folder, labels=arguments.labels)
real = load_source("digits")
held = hold_out(real, 0.2).test  # trials are compared on a part of train, the winner alone sees the test set


def accuracy(network, part):
    with torch.inference_mode():
        images = normalize(part.images[:] / 255, list(data.mean), list(data.std)).to(arguments.device)
        return 100 * (network(images).argmax(1).cpu() == part.targets).float().mean().item()


def trained(trial):
    width, kernel = (
        trial.suggest_categorical("width", [8, 16, 32]),
        trial.suggest_categorical("kernel", [3, 5]),
    )
    activation = {"relu": nn.ReLU, "tanh": nn.Tanh}[trial.suggest_categorical("activation", ["relu", "tanh"])]
    torch.manual_seed(0)
    layers = nn.Conv2d(1, width, kernel, padding=kernel // 2), activation(), nn.MaxPool2d(2), nn.Flatten()
    network = nn.Sequential(*layers, nn.Linear(16 * width, len(data.classes))).to(arguments.device)
    optimiser = torch.optim.AdamW(network.parameters(), trial.suggest_float("rate", 1e-3, 3e-2, log=True))
    loader = data.loader(50, augment="dsa", mix="cutmix|none", device=arguments.device)
    for _ in range(arguments.epochs):
        for images, targets in loader:
            optimiser.zero_grad()
            soft_cross_entropy(network(images), targets).backward()
            optimiser.step()
    return network.eval()


study = optuna.create_study(direction="maximize", sampler=optuna.samplers.TPESampler(seed=0))
study.optimize(lambda trial: accuracy(trained(trial), held), n_trials=arguments.trials)
score = accuracy(trained(study.best_trial), real.test)
print(f"{study.best_params}, tested on {len(real.test.targets)} real ones: {score:.1f} %")
