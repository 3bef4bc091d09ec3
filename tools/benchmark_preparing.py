"""How fast a store is made and read: beside bare decoding with as many processes, and beside copying memory.

  python tools/benchmark_preparing.py --output tools/results/preparing.json
  python tools/benchmark_preparing.py --classes 100 --per-class 100 --folder /tmp/photos

The source is made first: WebDataset shards of JPEG, cut from the two photographs of scikit-learn, each class
from a place and in colours of its own, each image shifted, scaled, mirrored and lit otherwise.
"""

import argparse
import shutil
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

from command_line import command_parser, count, json_file, positive, run_command

from distilled_data.files import write_json
from ncfm_engine.provenance import provenance
from ncfm_engine.sources.decode import Decoder
from ncfm_engine.sources.prepare import prepare
from ncfm_engine.sources.shards import ShardReader
from tools.benchmark.preparing import bare, make_source, peak_memory, sampling_rates, webdataset


def parser() -> argparse.ArgumentParser:
    parser = command_parser(__doc__)
    add = parser.add_argument
    add("--classes", type=positive, default=1000, help="of the images (default: 1000)")
    add("--per-class", type=positive, default=300, help="images (default: 300)")
    add("--pixels", type=positive, default=64, help="sides of an image (default: 64)")
    add("--size", type=positive, help="resize to this while preparing (default: not)")
    add("--shards", type=positive, default=100, help="files (default: 100)")
    add("--workers", type=count, default=2, help="processes that decode (default: 2)")
    add("--rounds", type=positive, default=1, help="turns of every contender (default: 1)")
    add("--folder", type=Path, help="where the source is kept between runs (default: nowhere)")
    add("--output", type=json_file, help="write the figures to this JSON file")
    return parser


def main(arguments: argparse.Namespace) -> None:
    with tempfile.TemporaryDirectory() as scratch:
        folder = arguments.folder or Path(scratch) / "source"
        make_source(folder, arguments)
        pattern = f"{folder}/*.tar"
        rows, images = [], arguments.classes * arguments.per_class
        store = Path(scratch) / "store"
        decoder = Decoder(arguments.size)

        def ours() -> None:
            shutil.rmtree(store, ignore_errors=True)
            prepare(ShardReader(pattern), store, decoder=decoder, workers=arguments.workers)

        contenders: dict[str, Callable[[], object]] = {
            "webdataset, decoded": partial(webdataset, pattern, arguments.workers),
            "our reader, decoded": partial(bare, ShardReader(pattern), decoder, arguments.workers),
            "prepared": ours,
        }
        for turn in range(arguments.rounds):
            for name, run in contenders.items():
                start = time.perf_counter()
                with peak_memory() as memory:
                    run()
                seconds = time.perf_counter() - start
                rows.append(
                    {"contender": name, "turn": turn, "seconds": seconds, "peak_mib": memory[0] / 2**20}
                )
                print(
                    f"{name:22} {images / seconds:8.0f} images/s  {seconds:7.1f} s  "
                    f"{memory[0] / 2**20:6.0f} MiB"
                )
        nbytes = sum(path.stat().st_size for path in store.iterdir())
        rates = sampling_rates(store)
        for name, rate in rates.items():
            print(f"{name:38} {rate / 1e9:6.2f} GB/s")
        print(
            f"on disk: source {sum(p.stat().st_size for p in folder.iterdir()) / 1e6:.0f} MB, store "
            f"{nbytes / 1e6:.0f} MB"
        )
    if arguments.output:
        about = {
            "images": images,
            "pixels": arguments.pixels,
            "size": arguments.size,
            "workers": arguments.workers,
        }
        content = {"source": about, "rows": rows, "store_bytes": nbytes, "bytes_per_second": rates}
        write_json(arguments.output, content | provenance("cpu"))


if __name__ == "__main__":
    run_command(main, parser())
