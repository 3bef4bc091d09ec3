"""How many networks are trained in a minute: one at a time, stacked, by several processes, both.

  python tools/benchmark_search.py --axis width=8,16,32 --axis depth=1,2,3
  python tools/benchmark_search.py FOLDER --data DIR --device cuda --networks 8 --jobs 4 --output FILE

The same architectures, drawn from the grid of ConvNets, are trained on a distilled set by each contender in
turn, so that what else the machine does hits all of them. Processes share the cores evenly.
"""

import argparse
import dataclasses
import queue
import statistics
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

import torch
from command_line import add_source_flags, command_parser, json_file, positive, reading, run_command, settings

from distilled_data import DistilledDataset
from distilled_data.files import write_json
from ncfm_engine.config import EvaluateConfig
from ncfm_engine.origin import real_images, recipe_of
from ncfm_engine.plan import resolve_device
from ncfm_engine.provenance import provenance
from ncfm_engine.proxies import proxies
from ncfm_engine.spaces import SPACES, Architecture
from tools.architectures.crew import default_jobs
from tools.benchmark.workers import Worker
from tools.markdown import table

DIGITS = Path(__file__).parent / "results" / "digits" / "digits-ipc10"


class Trainer:
    """Trains networks in a process of its own."""

    def __init__(self, folder: Path, dataset: str | None, flags: dict, config: EvaluateConfig, device: str):
        data = DistilledDataset.from_folder(folder)
        _, source = real_images(data, dataset, flags)
        self.ways = {
            at_once: proxies(
                data,
                source,
                source,
                dataclasses.replace(config, at_once=at_once),
                labels="hard",
                seed=0,
                device=device,
            )["distilled"]
            for at_once in (1, config.repeats)
        }

    def train(self, architecture: Architecture, at_once: int, threads: int) -> None:
        torch.set_num_threads(threads)
        self.ways[at_once].score(SPACES["convnet"], architecture, lambda accuracy: None)


def parser() -> argparse.ArgumentParser:
    parser = command_parser(__doc__)
    add = parser.add_argument
    add("folder", nargs="?", type=Path, default=DIGITS, help="artifact (default: the committed digits)")
    add("--axis", action="append", default=[], metavar="NAME=A,B", help="other values of an axis of the grid")
    add("--candidates", type=positive, default=8, help="architectures (default: 8)")
    add("--networks", type=positive, default=4, help="of each architecture (default: 4)")
    add("--epochs", type=positive, default=20, help="over the distilled images (default: 20)")
    add("--jobs", type=positive, help="processes (default: one for each core; 4 on a GPU)")
    add("--rounds", type=positive, default=3, help="turns of every contender (default: 3)")
    add("--dataset", help="the real images, where the set does not name them itself: folder:PATH, ...")
    add("--device", default="auto", help="auto, cpu, cuda, cuda:1 ... (default: auto)")
    add("--output", type=json_file, help="write the measurements to this JSON file")
    add_source_flags(parser)
    return parser


def main(arguments: argparse.Namespace) -> None:
    device, networks = resolve_device(arguments.device), arguments.networks
    jobs = arguments.jobs or default_jobs(device)
    space = SPACES["convnet"].with_axes(settings(arguments.axis, "--axis", "name=value,value"))
    candidates = space.draw(arguments.candidates)
    recipe = recipe_of(DistilledDataset.from_folder(arguments.folder))
    config = dataclasses.replace(recipe.evaluate, epochs=arguments.epochs, repeats=networks)
    contenders = {
        "one at a time": (1, 1),
        f"{networks} stacked": (1, networks),
        f"{jobs} processes": (jobs, 1),
        f"{jobs} processes, {networks} stacked": (jobs, networks),
    }
    with ExitStack() as stack:
        entry = Trainer, arguments.folder, arguments.dataset, reading(arguments), config, device
        workers = [stack.enter_context(Worker(*entry)) for _ in range(jobs)]
        seconds: dict[str, list[float]] = {name: [] for name in contenders}
        for turn in range(-1, arguments.rounds):
            for name, (count, at_once) in contenders.items():
                took = train(workers[:count], candidates, at_once)
                if turn >= 0:  # the first one warms up
                    seconds[name].append(took)
    rows = [
        {
            "contender": name,
            "seconds": [round(value, 4) for value in values],
            "networks_per_minute": round(60 * len(candidates) * networks / statistics.median(values), 1),
        }
        for name, values in seconds.items()
    ]
    slow = rows[0]["networks_per_minute"]
    head = f"{len(candidates)} architectures, {networks} networks each", "networks per minute", "ratio"
    rates = [(row["contender"], row["networks_per_minute"]) for row in rows]
    print("\n".join(table(head, [(name, f"{rate:.0f}", f"{rate / slow:.2f}") for name, rate in rates])))
    if arguments.output:
        content = {"rows": rows, "epochs": arguments.epochs, "candidates": candidates} | provenance(device)
        write_json(arguments.output, content)


def train(workers: list[Worker], candidates: list[Architecture], at_once: int) -> float:
    """Seconds until these workers, each with its share of the cores, have trained all candidates."""
    idle: queue.SimpleQueue[Worker] = queue.SimpleQueue()
    for worker in workers:
        idle.put(worker)
    threads = max(1, torch.get_num_threads() // len(workers))

    def one(candidate: Architecture) -> None:
        worker = idle.get()
        try:
            worker.call("train", candidate, at_once, threads)
        finally:
            idle.put(worker)

    start = time.perf_counter()
    with ThreadPoolExecutor(len(workers)) as pool:
        list(pool.map(one, candidates))
    return time.perf_counter() - start


if __name__ == "__main__":
    run_command(main, parser())
