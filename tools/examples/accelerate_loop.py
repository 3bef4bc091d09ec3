"""Accelerate, which shares out a DataLoader. `accelerate launch tools/examples/accelerate_loop.py`"""

import argparse

import torch
from accelerate import Accelerator
from torch import nn
from torchvision.transforms.v2.functional import normalize

from distilled_data import DistilledDataset, soft_cross_entropy
from ncfm_engine.sources import load_source

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("folder", nargs="?", default="tools/results/digits/digits-ipc10")
parser.add_argument("--labels", default="soft", choices=["soft", "hard"])
parser.add_argument("--epochs", type=int, default=100)
arguments = parser.parse_args()

data = DistilledDataset.from_folder(arguments.folder, labels=arguments.labels)
test = load_source("digits").test
torch.manual_seed(0)
network = nn.Sequential(
    nn.Conv2d(1, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
    nn.Conv2d(32, 64, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
    nn.Flatten(), nn.Linear(256, len(data.classes)),
)  # fmt: skip
optimiser = torch.optim.AdamW(network.parameters(), 3e-3)
accelerator = Accelerator()
network, optimiser, loader = accelerator.prepare(network, optimiser, data.dataloader(50, augment="dsa"))

for _ in range(arguments.epochs):
    for images, targets in loader:
        optimiser.zero_grad()
        accelerator.backward(soft_cross_entropy(network(images), targets))
        optimiser.step()

network.eval()
with torch.inference_mode():
    images = normalize(test.images[:] / 255, list(data.mean), list(data.std)).to(accelerator.device)
    right = network(images).argmax(1).cpu() == test.targets
accelerator.print(
    f"{len(data)} distilled images, tested on {len(right)} real ones: {100 * right.float().mean():.1f} %"
)
