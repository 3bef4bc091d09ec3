"""Seconds, memory and images per second of a matching step, beside a plain loop and the reference.

  python tools/benchmark_engine.py
  python tools/benchmark_engine.py --dataset cifar100 --data DIR --ipc 10 50 --reference CHECKOUT
  python tools/benchmark_engine.py --variant bank=distill.real_features=bank,step.compile=true
  python tools/benchmark_engine.py --growth --profile --without loop
  python tools/benchmark_engine.py --growth classes=10,100 ipc --classes 10
  python tools/benchmark_engine.py --pretrain 4x2

Images are random unless a --dataset is named, and so are the weights: time does not depend on either. The
loop is NCFM as its paper states it, class by class; that the engine computes the same step is checked first.
Everything is written as JSON, with the tables as Markdown beside it.
"""

import argparse
import dataclasses
import os
import platform
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from command_line import DATA, command_parser, duration, json_file, positive, run_command, settings, size

from distilled_data import UsageError
from distilled_data.files import write_file, write_json
from ncfm_engine.config import Recipe
from ncfm_engine.plan import resolve_device
from ncfm_engine.pretrain import pretrain
from ncfm_engine.provenance import provenance
from ncfm_engine.report import Bars
from ncfm_engine.sampling import real_per_class
from ncfm_engine.sources import load_source
from tools.benchmark.arithmetic import profile_step
from tools.benchmark.engine import Engine
from tools.benchmark.growth import growth, parse, plot
from tools.benchmark.loop import Loop, agreement
from tools.benchmark.reference import Reference, check_checkout
from tools.benchmark.report import markdown
from tools.benchmark.rounds import Entry, measure, ratios
from tools.benchmark.setup import Setup
from tools.benchmark.workers import in_process

RESULTS = Path(__file__).parent / "results"
PROFILED = 5  # steps


def parser() -> argparse.ArgumentParser:
    parser = command_parser(__doc__)
    add = parser.add_argument
    add("--dataset", help="real images, for instance cifar10 or cifar100 (default: random ones)")
    add("--data", type=Path, help=DATA)
    add("--classes", type=positive, default=10, help="of random images (default: 10)")
    add("--size", type=positive, default=32, help="side of random images in pixels (default: 32)")
    add("--real-images", type=positive, default=1024, help="per class and step (default: 1024)")
    add("--ipc", type=int, nargs="+", default=[10], help="packed images per class, one or more (default: 10)")
    add("--frequencies", type=positive, default=1024, help="T (default: 1024)")
    add("--width", type=positive, default=128, help="of the ConvNet (default: 128)")
    add(
        "--depth",
        default="auto",
        help="of the ConvNet (default: auto, 3 at 32 pixels, one more per doubling)",
    )
    add("--set", action="append", default=[], metavar="FIELD=VALUE", help="a setting for all contenders")
    add("--variant", action="append", default=[], metavar="NAME=FIELD=VALUE,...", help="the engine once more")
    add("--memory", type=size, metavar="2GiB", help="what one step of the engine may take (default: all)")
    add("--reference", type=Path, metavar="CHECKOUT", help="of github.com/gszfwsb/NCFM, as a contender")
    add("--without", action="append", default=[], choices=["engine", "loop"], help="leave a contender out")
    add("--rounds", type=positive, default=5, help="turns of every contender (default: 5)")
    add("--turn", type=duration, default=5.0, metavar="5s", help="length of a turn (default: 5s)")
    add(
        "--growth",
        nargs="*",
        metavar="AXIS=N,N",
        help="against classes, ipc, size and ranks, or some of them",
    )
    add("--profile", action="store_true", help="shares of time, and the arithmetic limit of the device")
    add("--pretrain", metavar="MxE", help="time of training M networks for E epochs")
    add("--device", default="auto", help="auto, cpu, cuda, cuda:1 ... (default: auto)")
    add("--threads", type=positive, help="of torch on the CPU (default: its own choice)")
    add("--no-tf32", action="store_true", help="exact float32 on a GPU")
    add("--output", type=json_file, help="JSON file (default: tools/results/benchmark-DATE-DEVICE.json)")
    return parser


def main(arguments: argparse.Namespace) -> None:
    base = setup_of(arguments)
    points = {ipc: contenders(arguments, changed(base, {"ipc": str(ipc)})) for ipc in arguments.ipc}
    gpus = torch.cuda.device_count() if base.device.startswith("cuda") else None
    axes = None if arguments.growth is None else parse(arguments.growth, gpus)
    pretrained = networks_and_epochs(arguments.pretrain) if arguments.pretrain else None
    content = description(arguments, base)
    kind = base.device.replace(":", "")
    output = arguments.output or RESULTS / f"benchmark-{content['date']}-{kind}.json"

    with Bars() as bars:
        turns: dict[str, Any] = {"rounds": arguments.rounds, "seconds": arguments.turn, "report": bars}
        if "loop" not in arguments.without:
            content["agreement"] = in_process(agreement, base)
        for ipc, entries in points.items():
            rows = measure(entries, stage=f"ipc {ipc}", **turns)
            content["comparison"] += [{"ipc": ipc} | row for row in rows]
            content["ratios"] += [{"ipc": ipc} | row for row in ratios(rows)]
            save(content, output)
        if axes is not None:
            at_size = (lambda _: base.recipe.network.depth) if arguments.depth != "auto" else depth_at
            content["growth"] = []
            for row in growth(base, axes, at_size, **turns):
                content["growth"].append(row)
                save(content, output)
            write_file(output.with_suffix(".png"), plot(content["growth"]))
        if arguments.profile:
            content["profile"] = in_process(profile_step, base, PROFILED)
            save(content, output)
        if pretrained:
            content["pretrain"] = in_process(pretraining, base, *pretrained)
            save(content, output)
    print(markdown(content))


def save(content: dict[str, Any], output: Path) -> None:
    """Write what is known so far: a part that fails must not cost the ones before it."""
    write_json(output, content)
    write_file(output.with_suffix(".md"), markdown(content).encode())


def setup_of(arguments: argparse.Namespace) -> Setup:
    """The base point that the flags describe."""
    pixels = arguments.size
    if arguments.dataset:
        pixels = load_source(arguments.dataset, data=arguments.data).height
    fields = {
        "ipc": arguments.ipc[0],
        "network.width": arguments.width,
        "network.depth": depth_at(pixels) if arguments.depth == "auto" else arguments.depth,
        "distill.real_batch": arguments.real_images,
        "distill.frequencies": arguments.frequencies,
        "distill.real_features": "fresh",  # the published algorithm; --variant for the rest
    }
    setup = Setup(
        Recipe().replace(fields),
        dataset=arguments.dataset,
        data=arguments.data,
        classes=arguments.classes,
        size=pixels,
        device=resolve_device(arguments.device),
        threads=arguments.threads,
        tf32=not arguments.no_tf32,
        memory=arguments.memory,
    )
    return changed(setup, settings(arguments.set))


def changed(setup: Setup, changes: dict[str, str]) -> Setup:
    """With fields of the recipe changed, and keywords of `MatchingStep` written step.NAME."""
    recipe, options = dict(changes), dict(setup.options)
    for name in [name for name in changes if name.startswith("step.")]:
        value = recipe.pop(name)
        if name != "step.compile" or value not in ("true", "false"):
            raise UsageError(f"{name}={value}: of the step, only step.compile=true or false can be set")
        options["compile"] = value == "true"
    return dataclasses.replace(setup, recipe=setup.recipe.replace(recipe), options=options)


def depth_at(pixels: int) -> int:
    """3 blocks at 32 pixels, 4 at 64, 5 at 128, as in the paper."""
    return max(1, pixels.bit_length() - 3)


def contenders(arguments: argparse.Namespace, setup: Setup) -> dict[str, Entry]:
    entries: dict[str, Entry] = {"engine": (Engine, (setup,)), "loop": (Loop, (setup,))}
    if arguments.reference:
        check_checkout(arguments.reference)
        entries["reference"] = (Reference, (setup, arguments.reference.resolve()))
    for variant in arguments.variant:
        name, _, changes = variant.partition("=")
        if name in ("engine", "loop", "reference") or "=" not in changes:
            raise UsageError(f"--variant {variant}: expected NAME=FIELD=VALUE,... with a name of its own")
        entries[name] = (Engine, (changed(setup, settings(changes.split(","))),))
    return {name: entry for name, entry in entries.items() if name not in arguments.without}


def pretraining(setup: Setup, networks: int, epochs: int) -> dict[str, float]:
    """Seconds for `networks` feature networks of `epochs` epochs."""
    source, _ = setup.open()
    config = dataclasses.replace(setup.recipe.pretrain, networks=networks, epochs=epochs)
    with tempfile.TemporaryDirectory() as cache:
        start = time.perf_counter()
        pretrain(
            config,
            setup.recipe.network,
            source,
            seed=setup.recipe.seed,
            device=setup.device,
            cache=Path(cache),
        )
        seconds = time.perf_counter() - start
    images = len(source.train)
    rate = networks * epochs / seconds
    row = {"networks": networks, "epochs": epochs, "images": images, "seconds": seconds}
    return row | {"network_epochs_per_second": rate}


def networks_and_epochs(text: str) -> tuple[int, int]:
    networks, _, epochs = text.partition("x")
    if not (networks.isdecimal() and epochs.isdecimal() and int(networks) and int(epochs)):
        raise UsageError(f"--pretrain {text}: expected MxE, for instance 20x60 for 20 networks of 60 epochs")
    return int(networks), int(epochs)


def description(arguments: argparse.Namespace, setup: Setup) -> dict[str, Any]:
    """When, where and with which flags. Of paths only the last name is told."""
    flags = {
        name: value.name if isinstance(value, Path) else value for name, value in vars(arguments).items()
    }
    gpu = setup.device.startswith("cuda")
    images = f"{setup.classes} classes of {setup.channels}x{setup.size}x{setup.size}"
    real = setup.recipe.distill.real_batch
    if setup.dataset:
        source = load_source(setup.dataset, data=setup.data)
        images, real = source.name, real_per_class(real, source.train.counts)
        flags |= {"dataset": source.origin.id} if ":" in setup.dataset else {}
    return {
        "date": time.strftime("%Y-%m-%d"),
        "shape": f"{images}, {real} real images per class and step",
        "hardware": {
            "kind": "cuda" if gpu else "cpu",
            "name": torch.cuda.get_device_name(setup.device) if gpu else cpu_name(),
            "cores": os.cpu_count(),
            "threads": setup.threads or torch.get_num_threads(),
        },
        "flags": flags,
        "base": {"classes": setup.classes, "ipc": setup.recipe.ipc, "size": setup.size},
        "recipe": dataclasses.asdict(setup.recipe),
        "agreement": {},
        "comparison": [],
        "ratios": [],
    } | provenance(setup.device)


def cpu_name() -> str:
    """Linux knows the model; elsewhere only the kind of machine is known."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.machine()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


if __name__ == "__main__":
    run_command(main, parser())
