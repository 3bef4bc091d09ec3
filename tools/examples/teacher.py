"""A teacher labels every batch as it comes out, augmented. `python tools/examples/teacher.py`

It is trained once, on all real images, and stored; any network that gives logits can be one.
"""

import argparse
from pathlib import Path

import torch
from safetensors.torch import load_model, save_model
from torch import nn

from distilled_data import DistilledDataset, soft_cross_entropy
from distilled_data.loader import Loader
from ncfm_engine.networks import build_network
from ncfm_engine.sources import load_source

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("folder", nargs="?", default="tools/results/digits/digits-ipc10")
parser.add_argument("--teacher", type=Path, default="distilled/teacher.safetensors", help="made if missing")
parser.add_argument("--temperature", type=float, default=4.0)
parser.add_argument("--epochs", type=int, default=100)
arguments = parser.parse_args()

data, real = DistilledDataset.from_folder(arguments.folder), load_source("digits")
images, targets = real.train.images[:], real.train.targets
everything = Loader(images, targets, mean=data.mean, std=data.std, batch_size=64, augment="color_crop")
images, targets = real.test.images[:], real.test.targets
test = Loader(images, targets, mean=data.mean, std=data.std, batch_size=512, shuffle=False)


def network(seed: int) -> nn.Module:
    return build_network("convnet", channels=1, size=8, classes=10, width=32, depth=2, seed=seed)


def train(student: nn.Module, loader: Loader, epochs: int) -> nn.Module:
    optimiser = torch.optim.AdamW(student.parameters(), 3e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, epochs)
    student.train()
    for _ in range(epochs):
        for images, targets in loader:
            optimiser.zero_grad()
            soft_cross_entropy(student(images), targets).backward()
            optimiser.step()
        schedule.step()
    return student.eval()


teacher = network(seed=0)
if not arguments.teacher.exists():
    arguments.teacher.parent.mkdir(parents=True, exist_ok=True)
    save_model(train(teacher, everything, 20), str(arguments.teacher))
load_model(teacher.eval(), arguments.teacher)

soft = data.with_labels("soft", temperature=arguments.temperature)
for labels, chosen in {"stored": None, "its teacher's": teacher}.items():
    student = train(network(seed=1), soft.loader(50, augment="dsa", teacher=chosen), arguments.epochs)
    right = sum(int((student(images).argmax(1) == targets).sum()) for images, targets in test)
    print(f"{labels} labels, tested on {test.count} real ones: {100 * right / test.count:.1f} %")
