"""What the benchmark of stores compares: a source of photographs, ways to decode it, and what they hold."""

import argparse
import glob
import io
import json
import os
import statistics
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageEnhance
from torch.utils.data import DataLoader

from distilled_data import UsageError
from distilled_data.randomness import generator_at
from ncfm_engine.sampling import ClassSampler
from ncfm_engine.sources.decode import Decoder
from ncfm_engine.sources.reader import Record, Unit
from ncfm_engine.sources.shards import ShardReader
from ncfm_engine.sources.spread import default_workers, spread
from ncfm_engine.sources.store import open_store

ROUNDS, BATCH = 4, 1024  # of draws from a store


def make_source(folder: Path, arguments: argparse.Namespace) -> None:
    """Shards of photographs in `folder`, unless they are there: of as many, as large images."""
    about = [arguments.classes, arguments.per_class, arguments.pixels, arguments.shards]
    if (folder / "about.json").exists():
        if json.loads((folder / "about.json").read_text()) != about:
            raise UsageError(f"{folder} holds another source than {about}; choose another --folder")
        return
    from sklearn.datasets import load_sample_images

    photographs = [Image.fromarray(image) for image in load_sample_images().images]
    folder.mkdir(parents=True, exist_ok=True)
    count = arguments.classes * arguments.per_class
    jobs = [(number, range(number, count, arguments.shards)) for number in range(arguments.shards)]
    write = partial(write_photographs, folder, photographs, arguments.classes, arguments.pixels)
    for _ in spread(write, jobs, default_workers()):
        pass
    (folder / "about.json").write_text(json.dumps(about))


def write_photographs(
    folder: Path, photographs: list[Image.Image], classes: int, pixels: int, job: tuple[int, range]
) -> None:
    from webdataset.writer import TarWriter

    number, images = job
    with TarWriter(str(folder / f"train-{number:05d}.tar"), mtime=0.0) as shard:
        for index in images:
            label = index % classes
            kind, one = np.random.default_rng([1, label]), np.random.default_rng([2, index])
            photograph = photographs[label % len(photographs)]
            side = int(kind.integers(90, 200) * one.uniform(0.85, 1.15))
            x, y = (int(kind.integers(0, limit - 231) + one.integers(0, 20)) for limit in photograph.size)
            image = photograph.crop((x, y, x + side, y + side)).resize(
                (pixels, pixels), Image.Resampling.BILINEAR
            )
            image = ImageEnhance.Color(image).enhance(float(kind.uniform(0.3, 1.8)))
            image = ImageEnhance.Brightness(image).enhance(float(one.uniform(0.7, 1.3)))
            if one.random() < 0.5:
                image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
            content = io.BytesIO()
            image.save(content, "JPEG", quality=90)
            shard.write({"__key__": f"{index:08d}", "jpg": content.getvalue(), "cls": label})


def webdataset(pattern: str, workers: int) -> None:
    """Its own pipeline, each image decoded to uint8 pixels and forgotten."""
    from webdataset.compat import WebDataset

    shards = sorted(glob.glob(pattern))
    data = WebDataset(shards, shardshuffle=False).decode("rgb8").to_tuple("jpg", "cls").map(forget)
    for _ in DataLoader(data, batch_size=256, num_workers=workers):  # type: ignore[arg-type]
        pass


def forget(sample):
    return sample[0].shape[0]


def bare(reader: ShardReader, decoder: Decoder, workers: int) -> None:
    for _ in spread(partial(decoded, reader, decoder), reader.units, workers):
        pass


def decoded(reader: ShardReader, decoder: Decoder, unit: Unit) -> int:
    return sum(len(decoder(record.image)) for record in reader.read(unit) if isinstance(record, Record))


@contextmanager
def peak_memory() -> Iterator[list[int]]:
    """The most that this process and its children held at once, as bytes: shared pages are counted once."""
    peak, stop = [0], threading.Event()

    def watch() -> None:
        while True:
            peak[0] = max(peak[0], sum(map(held, family(os.getpid()))))
            if stop.wait(0.1):
                return

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield peak
    finally:
        stop.set()
        thread.join()


def family(pid: int) -> list[int]:
    try:
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    except OSError:
        return []
    return [pid, *(member for child in children for member in family(int(child)))]


def held(pid: int) -> int:
    try:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
        return sum(int(line.split()[1]) * 1024 for line in lines if line.startswith("Pss:"))
    except (OSError, IndexError):
        return 0


def sampling_rates(store: Path) -> dict[str, float]:
    """Bytes per second of draws from every class, batch by batch as the engine reads them; medians over
    rounds.

    Beside them, copying as much memory in as large pieces. New rows were not mapped by this process before.
    """
    source = open_store(store)
    images, sampler = source.train.images, ClassSampler(source.train)
    per_class = min(64, int(source.train.counts.min()))
    count = source.num_classes * per_class
    pieces = torch.ones(count, images[0].numel(), dtype=torch.uint8).split(BATCH)
    contenders = "copying memory", "draws, new rows", "draws, the same again"
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    for number in range(ROUNDS):
        rows = sampler.draw(per_class, generator_at(0, "draw", number)).flatten().split(BATCH)
        draw = partial(images.index_select, 0)
        for name, run, parts in zip(contenders, (torch.clone, draw, draw), (pieces, rows, rows), strict=True):
            start = time.perf_counter()
            for part in parts:
                run(part)
            seconds[name].append(time.perf_counter() - start)
    size = count * images[0].numel()
    return {name: size / statistics.median(values) for name, values in seconds.items()}
