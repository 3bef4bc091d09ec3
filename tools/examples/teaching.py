# %% [markdown]
# # What does a network need to see?
# 1,438 scans of handwritten digits were distilled to ten images per class. We look at them and train on them.
# Run the cells one by one (VS Code, Spyder, Jupytext), or all at once: `python tools/examples/teaching.py`.

# %% Two sets: ten distilled images per class, and real ones to test on
import argparse
from pathlib import Path

import matplotlib.pyplot as plt
import torch
from torch import nn

from distilled_data import DistilledDataset, soft_cross_entropy
from ncfm_engine.sources import load_source

parser = argparse.ArgumentParser(description="Pictures and learning curves of a distilled set.")
parser.add_argument("--labels", default="soft", choices=["soft", "hard"])
parser.add_argument("--epochs", type=int, default=100)
parser.add_argument("--output", type=Path, default=Path("teaching"), help="folder for the pictures")
options, _ = parser.parse_known_args()
options.output.mkdir(parents=True, exist_ok=True)
data, real = DistilledDataset.from_folder("tools/results/digits/digits-ipc10"), load_source("digits")
first = torch.stack([real.train.images[:][real.train.targets == digit][:10] for digit in range(10)], 1)
few = DistilledDataset.from_tensors(first, data.classes, mean=data.mean, std=data.std)

# %% Real digits above, distilled ones below. What was kept, what was left out?
figure, axes = plt.subplots(2, 10, figsize=(10, 2.2), layout="constrained")
for axis, image in zip(axes.flat, [*few.data[:10], *data.data[:10]], strict=True):
    axis.imshow(image[..., 0], cmap="gray", vmin=0, vmax=255)
    axis.axis("off")
figure.savefig(options.output / "images.png", dpi=120)


# %% Train on each of the two sets, and test on real images after every epoch
def learn(train: DistilledDataset) -> list[float]:
    torch.manual_seed(0)
    layers = [nn.Conv2d(1, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(32, 64, 3, padding=1)]
    network = nn.Sequential(*layers, nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(256, 10))
    optimiser, accuracy = torch.optim.AdamW(network.parameters(), 3e-3), []
    test = (real.test.images[:] / 255 - train.mean[0]) / train.std[0]
    for _ in range(options.epochs):
        for images, targets in train.loader(50):
            optimiser.zero_grad()
            soft_cross_entropy(network(images), targets).backward()
            optimiser.step()
        accuracy.append(100 * float((network(test).argmax(1) == real.test.targets).float().mean()))
    return accuracy


# %% Which one learns faster, and which one ends higher?
curves = {"distilled": learn(data.with_labels(options.labels)), "as many real": learn(few)}
figure, axis = plt.subplots(figsize=(6, 4), layout="constrained")
for name, accuracy in curves.items():
    axis.plot(accuracy, label=f"{name}: {accuracy[-1]:.1f} %")
axis.set(xlabel="epoch", ylabel="accuracy on real images, %")
axis.legend()
figure.savefig(options.output / "curves.png", dpi=120)
print(f"{len(data)} distilled images, tested on {len(real.test)} real ones: {curves['distilled'][-1]:.1f} %")
