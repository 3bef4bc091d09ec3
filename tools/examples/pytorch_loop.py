"""Plain PyTorch: train on a distilled set, test on real images. `python tools/examples/pytorch_loop.py`"""

import argparse

import torch
from torch import nn
from torchvision.transforms.v2.functional import normalize

from distilled_data import DistilledDataset, soft_cross_entropy
from ncfm_engine.sources import load_source

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("folder", nargs="?", default="tools/results/digits/digits-ipc10")
parser.add_argument("--labels", default="soft", choices=["soft", "hard"])
parser.add_argument("--epochs", type=int, default=100)
parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
arguments = parser.parse_args()

# from the Hub: DistilledDataset.from_hub("org/digits-ncfm", revision="v1", labels=arguments.labels)
data = DistilledDataset.from_folder(arguments.folder, labels=arguments.labels)
test = load_source("digits").test
torch.manual_seed(0)
network = nn.Sequential(
    nn.Conv2d(1, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
    nn.Conv2d(32, 64, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
    nn.Flatten(), nn.Linear(256, len(data.classes)),
).to(arguments.device)  # fmt: skip
optimiser = torch.optim.AdamW(network.parameters(), 3e-3)
schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, arguments.epochs)

loader = data.loader(50, augment="dsa", mix="cutmix|none", device=arguments.device)
for _ in range(arguments.epochs):
    for images, targets in loader:
        optimiser.zero_grad()
        soft_cross_entropy(network(images), targets).backward()
        optimiser.step()
    schedule.step()

network.eval()
with torch.inference_mode():
    images = normalize(test.images[:] / 255, list(data.mean), list(data.std)).to(arguments.device)
    right = network(images).argmax(1).cpu() == test.targets
print(f"{len(data)} distilled images, tested on {len(right)} real ones: {100 * right.float().mean():.1f} %")
