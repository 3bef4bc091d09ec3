"""What verification costs: `from_hub` from a warm cache, beside the Hub's client and safetensors alone.

  python tools/benchmark_loading.py
  python tools/benchmark_loading.py --megabytes 1.5 150 --rounds 20 --output tools/results/loading.json

A loopback Hub serves artifacts of random bytes once; then every contender loads them from the cache, pinned
to a commit, in turns. Nothing is fetched while it is measured.
"""

import argparse
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

os.environ["HF_HUB_DISABLE_XET"] = "1"  # read when huggingface_hub is imported; the loopback Hub has none

import torch
from command_line import command_parser, json_file, positive, run_command
from huggingface_hub import hf_hub_download
from safetensors.torch import load_file

from distilled_data import DistilledDataset
from distilled_data.files import write_json
from distilled_data.format import ARTIFACT_FILE, MANIFEST_FILE
from distilled_data.manifest import Fingerprint
from ncfm_engine.provenance import provenance
from tests.hub_server import Blob, Commit, LoopbackHub, Repository
from tools.benchmark.feeds import write_random_set
from tools.benchmark.turns import Measured, report, turns

REPO = "org/random"


def parser() -> argparse.ArgumentParser:
    parser = command_parser(__doc__)
    add = parser.add_argument
    add("--megabytes", type=megabytes, nargs="+", default=[1.5, 150.0], help="sizes (default: 1.5 150)")
    add("--rounds", type=positive, default=10, help="turns of every contender (default: 10)")
    add("--output", type=json_file, help="write the seconds to this JSON file")
    return parser


def megabytes(text: str) -> float:
    number = float(text)
    if not 0.001 <= number <= 100_000:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number from 0.001 to 100,000")
    return number


def main(arguments: argparse.Namespace) -> None:
    rows = []
    for megabytes in arguments.megabytes:
        rows += report(f"{megabytes:g} MB", measure(megabytes, arguments.rounds))
    if arguments.output:
        write_json(arguments.output, {"rows": rows} | provenance("cpu"))


def measure(megabytes: float, rounds: int) -> dict[str, list[Measured]]:
    with tempfile.TemporaryDirectory() as folder, LoopbackHub() as hub:
        path = Path(folder)
        files = _publish(hub, path, megabytes)
        commit = hub.head(REPO).oid
        cache = path / "hub"

        def download() -> dict[str, torch.Tensor]:
            local = hf_hub_download(
                REPO, ARTIFACT_FILE, repo_type="dataset", revision=commit, cache_dir=cache, endpoint=hub.url
            )
            return load_file(local)

        contenders: dict[str, Callable[[], object]] = {
            "from_hub": lambda: DistilledDataset.from_hub(
                REPO, revision=commit, cache_dir=cache, endpoint=hub.url
            ),
            "hf_hub_download and load_file, which maps": download,
            "the same, every byte read": lambda: {name: t.clone() for name, t in download().items()},
            "sha256 alone": lambda: Fingerprint.of(files),
        }
        return turns({name: _timed(load) for name, load in contenders.items()}, rounds)


def _timed(load: Callable[[], object]) -> Callable[[], Measured]:
    def run() -> Measured:
        start = time.perf_counter()
        load()
        return time.perf_counter() - start, 0

    return run


def _publish(hub: LoopbackHub, folder: Path, megabytes: float) -> Path:
    """Put a set of random images on the Hub; its local path."""
    ipc, classes = 5, 100
    size = round((megabytes * 1e6 / (ipc * classes * 3)) ** 0.5)
    write_random_set(folder, ipc * classes, size, classes)
    tree = {name: Blob((folder / name).read_bytes(), large=True) for name in (ARTIFACT_FILE, MANIFEST_FILE)}
    hub.large = {blob.sha256: blob.content for blob in tree.values()}
    hub.repositories[REPO] = Repository(REPO, refs={"refs/heads/main": Commit.of("random", tree, None)})
    return folder / ARTIFACT_FILE


if __name__ == "__main__":
    run_command(main, parser())
