"""timm's own transforms, loader and model. `python tools/examples/timm_loader.py`"""

import argparse

import timm
import torch
from timm.data import create_loader
from torchvision.transforms.v2.functional import normalize

from distilled_data import DistilledDataset, soft_cross_entropy
from ncfm_engine.sources import load_source

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("folder", nargs="?", default="tools/results/digits/digits-ipc10")
parser.add_argument("--labels", default="soft", choices=["soft", "hard"])
parser.add_argument("--epochs", type=int, default=30)
parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
arguments = parser.parse_args()

data = DistilledDataset.from_folder(arguments.folder, labels=arguments.labels)
test = load_source("digits").test
size = (data.info.channels, data.info.height, data.info.width)
device = torch.device(arguments.device)
loader = create_loader(
    data, size, 50, is_training=True, scale=(0.7, 1.0), hflip=0.0, mean=data.mean, std=data.std,
    num_workers=0, persistent_workers=False, device=device, use_prefetcher=False,
)  # fmt: skip
torch.manual_seed(0)
network = timm.create_model(
    "resnet10t", in_chans=size[0], num_classes=len(data.classes), stem_type="", stem_width=32
)
network = network.to(device)
optimiser = torch.optim.AdamW(network.parameters(), 3e-3)

for _ in range(arguments.epochs):
    for images, targets in loader:
        optimiser.zero_grad()
        soft_cross_entropy(network(images.to(device)), targets.to(device)).backward()
        optimiser.step()

network.eval()
with torch.inference_mode():
    images = normalize(test.images[:] / 255, list(data.mean), list(data.std)).to(device)
    right = network(images).argmax(1).cpu() == test.targets
print(f"{len(data)} distilled images, tested on {len(right)} real ones: {100 * right.float().mean():.1f} %")
