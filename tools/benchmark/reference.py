"""The public reference implementation as a contender: a checkout of it is called as it is, never edited.

    git clone https://github.com/gszfwsb/NCFM DIR

Timed is what its loop does in every iteration: the networks are read and blended, `compute_match_loss` and
`compute_calib_loss` walk the classes, and its threads prepare real and synthetic batches meanwhile. Plots,
logs, evaluation and the reduction over GPUs are not. What it does to the distilled images is not judged here.
"""

import contextlib
import importlib
import importlib.util
import os
import sys
import tempfile
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import MagicMock

import torch
import torch.distributed as dist
from torch import Tensor

from distilled_data import UsageError
from ncfm_engine.sources import Source

from .engine import images_per_step
from .setup import NETWORKS, Setup
from .workers import Contender

MODULES = (
    "condenser.Condenser",
    "condenser.compute_loss",
    "NCFM.NCFM",
    "NCFM.SampleNet",
    "data.dataset_statistics",
    "data.dataloader",
    "utils.diffaug",
    "utils.utils",
)
UNNEEDED = ("efficientnet_pytorch", "matplotlib", "matplotlib.pyplot", "tqdm")  # imported, but not for a step


class Reference(Contender):
    """Its own Condenser, loaders, augmentation, networks and sampling network on the shapes of the setup."""

    def __init__(self, setup: Setup, checkout: Path):
        super().__init__(setup)
        network, config = setup.recipe.network, setup.recipe.distill
        if network.name != "convnet" or not config.has_frequencies:
            raise UsageError("--reference compares ConvNets under ncfd or cfd only; leave the flag out")
        source, _ = setup.open()
        if source.height != source.width:
            raise UsageError(f"--reference takes square images, got {source.height}x{source.width}")
        import_from(checkout)
        with contextlib.redirect_stdout(sys.stderr), single_process_group():
            self._folder = tempfile.TemporaryDirectory(
                prefix="benchmark-"
            )  # of network files, goes with self
            self.args = arguments(setup, source, self._folder.name)
            self._build(source)
        self.images_per_step = images_per_step(config, setup.recipe.ipc, source.train.counts)

    def _build(self, source: Source) -> None:
        args, device = self.args, self.setup.device
        its = {name: importlib.import_module(name) for name in MODULES}
        self.ncfm, self.compute = its["NCFM.NCFM"], its["condenser.compute_loss"]
        self.utils = its["utils.utils"]
        args.cf_loss_func = self.ncfm.CFLossFunc(args.alpha_for_loss, args.beta_for_loss)
        its["data.dataset_statistics"].MEANS[args.dataset] = list(source.mean)
        its["data.dataset_statistics"].STDS[args.dataset] = list(source.std)
        self.augment, _ = its["utils.diffaug"].diffaug(args, device=device)

        loader = its["data.dataloader"].ClassMemDataLoader(_Images(source), args.batch_real, device=device)
        self.condenser = its["condenser.Condenser"].Condenser(
            args, args.class_list, args.nch, args.size, args.size, device=device
        )
        self.condenser.load_condensed_data(loader, init_type="mix")
        optimiser = self.utils.get_optimizer
        self.image_optimiser = optimiser("adamw", self.condenser.parameters(), 1e-3, 0.5, 5e-4)
        self.models = self.utils.get_feature_extractor(args)  # initial, blended, trained
        self.psi = self.psi_optimiser = None
        if args.sampling_net:
            dim = self.models[0].classifier.in_features
            self.psi = its["NCFM.SampleNet"].SampleNet(dim, t_batchsize=args.num_freqs).to(device)
            self.psi_optimiser = optimiser("sgd", self.psi.parameters(), 1e-3, 0.5, 5e-4)
        for index in range(args.num_premodel):
            for moment in ("init", "trained"):
                path = Path(args.pretrain_dir, f"premodel{index}_{moment}.pth.tar")
                torch.save(self.utils.get_feature_extractor(args)[0].state_dict(), path)
        queue = its["data.dataloader"].AsyncLoader  # its threads run from here on
        self.real = queue(loader, args.class_list, args.batch_real, device)
        self.synthetic = queue(self.condenser, args.class_list, 100_000, device)

    def iterate(self, step: int) -> tuple[float, float]:
        """Its two losses, summed over the classes."""
        initial, blended, trained = self.models
        initial, trained, blended = self.utils.update_feature_extractor(self.args, initial, trained, blended)
        images = self.condenser.data
        images.data = torch.clamp(images.data, min=0.0, max=1.0)
        common: dict[str, Any] = {
            "sample_fn": self.synthetic.class_sample,
            "aug_fn": self.augment,
            "optim_img": self.image_optimiser,
            "class_list": self.args.class_list,
            "timing_tracker": self.condenser.timing_tracker,
        }
        match, _ = self.compute.compute_match_loss(
            self.args,
            loader_real=self.real,
            inner_loss_fn=self.ncfm.match_loss,
            model_interval=blended,
            data_grad=images.grad,
            optim_sampling_net=self.psi_optimiser,
            sampling_net=self.psi,
            **common,
        )
        calibration, _ = self.compute.compute_calib_loss(
            inter_loss_fn=self.ncfm.cailb_loss,
            iter_calib=self.args.iter_calib,
            model_final=trained,
            calib_weight=self.args.calib_weight,
            data_grad=images.grad,
            **common,
        )
        return match, calibration


class _Images:
    """Real images as its loader reads torchvision's: one (float32 [channels, H, W] in [0, 1], label) each."""

    def __init__(self, source: Source):
        self.images, self.targets = source.train.images, source.train.targets.tolist()
        self.nclass = source.num_classes

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        if index >= len(self):
            raise IndexError(index)
        return self.images[index].float() / 255, self.targets[index]


def arguments(setup: Setup, source: Source, folder: str) -> SimpleNamespace:
    """The settings that its command line and configuration file would give it."""
    recipe, config = setup.recipe, setup.recipe.distill
    return SimpleNamespace(
        dataset="benchmark",
        nclass=source.num_classes,
        class_list=list(range(source.num_classes)),
        nch=source.channels,
        size=source.height,
        batch_real=config.real_batch,
        net_type="convnet",
        norm_type=recipe.network.norm,
        depth=recipe.network.depth,
        width=recipe.network.width / 128,
        ipc=recipe.ipc,
        factor=config.factor,
        decode_type="single",
        aug_type=config.augment,
        mixup="cut",
        num_freqs=config.frequencies,
        sampling_net=config.discrepancy == "ncfd",
        alpha_for_loss=config.alpha,
        beta_for_loss=1 - config.alpha,
        iter_calib=1 if config.calibration else 0,
        calib_weight=config.calibration,
        num_premodel=NETWORKS,
        pretrain_dir=folder,
        device=setup.device,
        rank=0,
        logger=lambda *_: None,
    )


def check_checkout(checkout: Path) -> None:
    """Raise `UsageError` where the modules that are called are not there."""
    files = [Path(*name.split(".")).with_suffix(".py") for name in MODULES]
    if missing := [str(file) for file in files if not (checkout / file).is_file()]:
        raise UsageError(
            f"--reference {checkout} is not a checkout of github.com/gszfwsb/NCFM: found no {missing[0]}"
        )


def import_from(checkout: Path) -> None:
    """Make its packages importable in this process; stand-ins replace packages that are missing here."""
    check_checkout(checkout)
    for name in UNNEEDED:
        parent = name.partition(".")[0]
        if isinstance(sys.modules.get(parent), MagicMock) or importlib.util.find_spec(parent) is None:
            sys.modules[name] = MagicMock()
    os.environ["MPLBACKEND"] = "Agg"
    warnings.simplefilter("ignore")
    sys.path.insert(0, str(checkout))


@contextlib.contextmanager
def single_process_group():
    """It asks for its rank while it is built."""
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)  # type: ignore
    try:
        yield
    finally:
        dist.destroy_process_group()
