"""Lightning: `fit` takes the loader itself. `python tools/examples/lightning_fit.py`"""

import argparse

import lightning
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from torchvision.transforms.v2.functional import normalize

from distilled_data import DistilledDataset, soft_cross_entropy
from ncfm_engine.sources import load_source


class Classifier(lightning.LightningModule):
    def __init__(self, classes: int):
        super().__init__()
        self.network = nn.Sequential(
            nn.Conv2d(1, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
            nn.Conv2d(32, 64, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
            nn.Flatten(), nn.Linear(256, classes),
        )  # fmt: skip

    def training_step(self, batch, index):
        images, targets = batch
        return soft_cross_entropy(self.network(images), targets)

    def test_step(self, batch, index):
        images, targets = batch
        self.log("accuracy", (self.network(images).argmax(1) == targets).float().mean())

    def configure_optimizers(self):
        optimiser = torch.optim.AdamW(self.parameters(), 3e-3)
        return [optimiser], [torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, self.trainer.max_epochs)]


parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("folder", nargs="?", default="tools/results/digits/digits-ipc10")
parser.add_argument("--labels", default="soft", choices=["soft", "hard"])
parser.add_argument("--epochs", type=int, default=100)
arguments = parser.parse_args()

data = DistilledDataset.from_folder(arguments.folder, labels=arguments.labels)
real = load_source("digits").test
test = TensorDataset(normalize(real.images[:] / 255, list(data.mean), list(data.std)), real.targets)
lightning.seed_everything(0, verbose=False)
quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
trainer = lightning.Trainer(max_epochs=arguments.epochs, enable_model_summary=False, **quiet)
model = Classifier(len(data.classes))
trainer.fit(model, data.dataloader(50, augment="dsa"))  # or data.loader(...), on one device
accuracy = trainer.test(model, DataLoader(test, len(test)), verbose=False)[0]["accuracy"]
print(f"{len(data)} distilled images, tested on {len(test)} real ones: {100 * accuracy:.1f} %")
