"""How fast a set feeds a network: batches, the first batch of a fresh process, the import.

  python tools/benchmark_feeding.py
  python tools/benchmark_feeding.py --rounds 9 --output tools/results/feeding.json
  python tools/benchmark_feeding.py --device cuda

Contenders take turns, so that what else the machine does hits all of them. On a GPU only what works there is
measured, and what share of a training step of ConvNet-3 waits for data.
"""

import argparse
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from command_line import command_parser, count, json_file, positive, run_command

from distilled_data import DistilledDataset
from distilled_data.files import write_json
from ncfm_engine.networks import build_network
from ncfm_engine.provenance import provenance
from tools.benchmark.feeds import AUGMENT, WholeEpoch, feeds, random_set, write_random_set
from tools.benchmark.turns import Measured, report, turns

ROOT = Path(__file__).resolve().parents[1]
START = """
import resource, sys, time
import numpy, torch, safetensors
torch.zeros(1 << 20).sum()  # torch's own threads are no part of it
def anonymous():
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) for line in file if line.startswith("RssAnon")) * 1024
"""
COLD = {
    "safe_open and from_numpy": "from safetensors import safe_open\n"
    "def run(path):\n"
    " with safe_open(path + '/distilled.safetensors', 'np') as file:\n"
    "  return [torch.from_numpy(file.get_tensor(name)) for name in file.keys()]",
    "from_folder and first batch": "from distilled_data import DistilledDataset\n"
    "def run(path):\n"
    " data = DistilledDataset.from_folder(path)\n"
    " loader = data.loader(256)\n"
    " return loader, next(iter(loader))",
    "from_folder alone": "from distilled_data import DistilledDataset\n"
    "def run(path):\n"
    " return DistilledDataset.from_folder(path)",
}
MEASURE = """
before = anonymous()
start = time.perf_counter()
held = run(sys.argv[1])
print(time.perf_counter() - start, anonymous() - before)
"""
IMPORT = "import time, torch; start = time.perf_counter(); import {}; print(time.perf_counter() - start, 0)"


def parser() -> argparse.ArgumentParser:
    parser = command_parser(__doc__)
    add = parser.add_argument
    add("--images", type=positive, default=5000, help="of 3 x 32 x 32 (default: 5000)")
    add("--batch-size", type=positive, default=256, help="images (default: 256)")
    add("--workers", type=count, default=2, help="worker processes where there are any (default: 2)")
    add("--rounds", type=positive, default=5, help="turns of every contender (default: 5)")
    add("--device", default="cpu", help="cpu or cuda (default: cpu)")
    add("--output", type=json_file, help="write the seconds to this JSON file")
    return parser


def main(arguments: argparse.Namespace) -> None:
    rows, rounds = [], arguments.rounds
    data = random_set(arguments.images, 32)
    if arguments.device == "cpu":
        with tempfile.TemporaryDirectory() as folder:
            contenders = feeds(data, arguments.batch_size, Path(folder), arguments.workers)
            epochs = {name: epoch_of(feed, len(data)) for name, feed in contenders.items()}
            rows += report("an epoch", turns(epochs, rounds))
        for factor in (1, 2):
            with tempfile.TemporaryDirectory() as folder:
                write_random_set(Path(folder), 5000, 32, 100, factor)
                cold = {name: fresh(START + code + MEASURE, folder) for name, code in COLD.items()}
                rows += report(f"fresh process, 15 MB, factor {factor}", turns(cold, 2 * rounds))
        imports = {
            name: fresh(IMPORT.format(name)) for name in ("json", "safetensors.torch", "distilled_data")
        }
        rows += report("import after torch", turns(imports, 2 * rounds))
    else:
        on_device = {
            "loader": data.loader(arguments.batch_size, augment=AUGMENT, device=arguments.device),
            "loader, dsa": data.loader(arguments.batch_size, augment="dsa", device=arguments.device),
            "airbench-style": WholeEpoch(data, arguments.batch_size, arguments.device),
        }
        epochs = {name: epoch_of(feed, len(data)) for name, feed in on_device.items()}
        rows += report("an epoch", turns(epochs, rounds))
        rows += report(
            "100 steps of ConvNet-3", turns(training(data, arguments.batch_size, arguments.device), rounds)
        )
    if arguments.output:
        write_json(arguments.output, {"rows": rows} | provenance(arguments.device))


def epoch_of(feed: Iterable[Any], images: int) -> Callable[[], Measured]:
    def run() -> Measured:
        start, count, pixels = time.perf_counter(), 0, torch.empty(0)
        for pixels, *_ in (batch.values() if isinstance(batch, dict) else batch for batch in feed):
            count += len(pixels)
        wait_for(pixels.device)
        assert count == images, (count, images)
        return time.perf_counter() - start, 0

    return run


def wait_for(device: torch.device | str) -> None:
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)


def fresh(code: str, *arguments: str) -> Callable[[], Measured]:
    """Run code that prints its seconds and bytes in a process of its own."""

    def run() -> Measured:
        words = [sys.executable, "-c", code, *arguments]
        output = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=True).stdout
        seconds, memory = output.split()
        return float(seconds), int(memory)

    return run


def training(
    data: DistilledDataset, batch_size: int, device: str, steps: int = 100, width: int = 128
) -> dict[str, Callable[[], Measured]]:
    """Training of ConvNet-3 on one batch again and again, on batches of the loader, and on those with DSA."""
    network = build_network("convnet", channels=3, size=32, classes=10, width=width).to(device)
    optimiser = torch.optim.SGD(network.parameters(), 0.01)

    def of(batches: Iterable[Any]) -> Callable[[], Measured]:
        def run() -> Measured:
            wait_for(device)
            start = time.perf_counter()
            for _, (images, targets) in zip(range(steps), batches, strict=False):
                optimiser.zero_grad()
                torch.nn.functional.cross_entropy(network(images), targets).backward()
                optimiser.step()
            wait_for(device)
            return time.perf_counter() - start, 0

        return run

    options = {"device": device, "drop_last": True, "infinite": True}
    one = next(iter(data.loader(batch_size, **options)))
    return {
        "one batch, again and again": of([one] * steps),
        "loader": of(data.loader(batch_size, augment=AUGMENT, **options)),
        "loader, dsa": of(data.loader(batch_size, augment="dsa", **options)),
    }


if __name__ == "__main__":
    run_command(main, parser())
