"""Prepare real images for distilling, from any source, into a store.

  python tools/prepare.py cifar10 stores/cifar10 --data DIR
  python tools/prepare.py folder:photos stores/photos --size 64
  python tools/prepare.py hf:org/flowers stores/flowers --size 64 --fit squash
  python tools/prepare.py 'wds:shards/train-{000..099}.tar' stores/big --size 64 --skip-damaged
  python tools/prepare.py store:stores/big --verify --to-webdataset shards
  torchrun --nproc-per-node 4 tools/prepare.py 'wds:shards/*.tar' stores/big

A run that was killed goes on where it was when the same command is given again. distill_and_push.py does all
this by itself, into the user's cache; --dataset store:PATH names a store that is there.
"""

import argparse
import time
from pathlib import Path

from command_line import add_source_flags, command_parser, duration, reading, run_command

from distilled_data import UsageError
from distilled_data.files import check_new
from distilled_data.terminal import printable
from ncfm_engine.ranks import join
from ncfm_engine.report import Bars, silent
from ncfm_engine.sources import SPECS, load_source
from ncfm_engine.sources.export import to_webdataset
from ncfm_engine.sources.store import describe_store, verify_store
from ncfm_engine.stop import StopRequest


def parser() -> argparse.ArgumentParser:
    parser = command_parser(__doc__)
    add = parser.add_argument
    add("source", help=SPECS)
    add("store", type=Path, nargs="?", help="folder to write; none for a source that is a store")
    add("--seed", type=int, default=0, help="draws the test images of a source without any (default: 0)")
    add("--overwrite", action="store_true", help="replace a store of other data")
    add("--verify", action="store_true", help="compare every image of the store with its sha256")
    add("--to-webdataset", type=Path, metavar="FOLDER", help="write the store as WebDataset shards too")
    add("--time-budget", type=duration, metavar="10m", help="stop in good order after this time")
    add_source_flags(parser)
    return parser


def main(arguments: argparse.Namespace) -> None:
    if (arguments.store is None) != arguments.source.startswith("store:"):
        raise UsageError("name a source and the store to write; a store alone as store:PATH")
    if arguments.store is None and (arguments.seed or arguments.overwrite or arguments.skip_damaged):
        raise UsageError(
            f"{arguments.source} is prepared already; expected no --seed, --overwrite or --skip-damaged"
        )
    if arguments.to_webdataset:
        check_new(arguments.to_webdataset)  # now, and not after hours of preparing
    start, options = time.monotonic(), reading(arguments)
    options |= {"store": arguments.store, "overwrite": arguments.overwrite, "seed": arguments.seed}
    with join("cpu") as ranks, Bars() as bars, StopRequest(arguments.time_budget) as stop:
        report = silent if ranks.rank else bars
        source = load_source(arguments.source, ranks=ranks, stop=stop, report=report, **options)
    if ranks.rank:
        return
    folder = arguments.store or Path(arguments.source.removeprefix("store:"))
    print(f"{printable(describe_store(folder))}\n{time.monotonic() - start:.1f} s")
    if arguments.verify:
        print(f"verified: {verify_store(folder)} images are the ones that were prepared")
    if arguments.to_webdataset:
        shards = to_webdataset(source, arguments.to_webdataset)
        print(f"written as {len(shards)} shards to {arguments.to_webdataset}")


if __name__ == "__main__":
    run_command(main, parser())
