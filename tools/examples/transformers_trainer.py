"""Transformers' Trainer on samples that are dicts. `python tools/examples/transformers_trainer.py`"""

import argparse
import tempfile

import torch
from torchvision.transforms.v2.functional import normalize
from transformers import ResNetConfig, ResNetForImageClassification, Trainer, TrainingArguments

from distilled_data import DistilledDataset, soft_cross_entropy
from ncfm_engine.sources import load_source

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("folder", nargs="?", default="tools/results/digits/digits-ipc10")
parser.add_argument("--labels", default="soft", choices=["soft", "hard"])
parser.add_argument("--epochs", type=int, default=60)
arguments = parser.parse_args()

data = DistilledDataset.from_folder(arguments.folder, labels=arguments.labels).with_format("dict")
real = load_source("digits").test
images = normalize(real.images[:] / 255, list(data.mean), list(data.std))
test = [
    {"pixel_values": image, "labels": int(label)} for image, label in zip(images, real.targets, strict=True)
]
torch.manual_seed(0)
config = ResNetConfig(
    num_channels=1, embedding_size=32, hidden_sizes=[32, 64], depths=[1, 1], layer_type="basic",
    num_labels=len(data.classes),
)  # fmt: skip
config.id2label = dict(enumerate(data.classes))


def loss(outputs, labels, num_items_in_batch=None):  # its own would take soft labels for several labels
    return soft_cross_entropy(outputs.logits, labels)


with tempfile.TemporaryDirectory() as folder:
    settings = TrainingArguments(
        folder, num_train_epochs=arguments.epochs, per_device_train_batch_size=50, learning_rate=3e-3,
        report_to=[], save_strategy="no", logging_strategy="no", disable_tqdm=True,
        dataloader_pin_memory=torch.cuda.is_available(),
    )  # fmt: skip
    trainer = Trainer(
        ResNetForImageClassification(config), settings, train_dataset=data, compute_loss_func=loss
    )
    trainer.train()
    predicted = torch.from_numpy(trainer.predict(test).predictions).argmax(1)
accuracy = 100 * (predicted == real.targets).float().mean()
print(f"{len(data)} distilled images, tested on {len(test)} real ones: {accuracy:.1f} %")
