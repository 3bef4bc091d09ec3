"""What a matching step takes, by count, and how it is cut to fit.

The real images pass without gradients in small batches; the synthetic ones of some classes at a time keep
what their backward pass needs. The counts are compared with measured peaks in tests/test_memory.py.
"""

import copy
import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from distilled_data import UsageError

from .config import DistillConfig
from .networks import Network
from .sampling import real_per_class
from .sources import Source

CACHE = 8 * 2**20  # bytes of one activation: on a CPU, batches whose activations leave the caches are slower
PASS = 2**30  # the same on a GPU, where larger batches gain nothing more
BLOCK = 16  # channels that oneDNN fills up to with AVX-512
# That libraries take from the same allocator: cuBLAS 32 MiB on Hopper for each thread, of which autograd's is
# another one, and cuDNN about as much.
WORKSPACE = 128 * 2**20
ENOUGH = 512  # synthetic images at once that keep a GPU busy

NO_MEMORY = (  # in the messages of errors
    "out of memory",
    "DefaultCPUAllocator",
    "ALLOC_FAILED",
    "STATUS_NOT_INITIALIZED",  # of cuBLAS and cuDNN, when the device was full before they came
    "unable to find an engine to execute",  # of cuDNN, when it had no memory to try one
)


@dataclass(frozen=True)
class Layout:
    """How a step is cut and where its data lie. Changes time and memory, and results only by rounding."""

    classes: int  # that go through forward and backward at once
    images: int  # real images that pass the network at once
    images_resident: bool = True  # real images on the device, or in host memory
    bank_resident: bool = True  # the bank of real features likewise


@dataclass(frozen=True)
class Footprint:
    """Counts for one run. All sizes in bytes."""

    config: DistillConfig
    source: Source
    ipc: int
    num_classes: int  # of this process
    saved: int  # by one synthetic image for its backward pass, from one network
    largest: int  # activation of one image
    adjacent: int  # most that two neighbouring activations of one image take
    dim: int  # of the features
    parameters: int
    kept_networks: int  # weights that lie on the device: initial, trained, snapshots
    cpu: bool

    @classmethod
    def of(
        cls,
        config: DistillConfig,
        template: Network,
        source: Source,
        *,
        ipc: int,
        kept_networks: int,
        device: str,
        num_classes: int | None = None,
    ) -> "Footprint":
        """Of networks like `template` and `num_classes` of the classes, by default all."""
        shape = (1, source.channels, source.height, source.width)
        saved, outputs, laid_out, features = _count(template, shape)
        return cls(
            config,
            source,
            ipc,
            source.num_classes if num_classes is None else num_classes,
            saved,
            max(outputs),
            max(a + b for a, b in itertools.pairwise(laid_out)),
            features,
            sum(p.numel() for p in template.parameters()),
            kept_networks,
            torch.device(device).type == "cpu",
        )

    @property
    def frequencies(self) -> int:
        """Of the discrepancy played; some have none."""
        return self.config.frequencies if self.config.has_frequencies else 0

    @property
    def real_per_class(self) -> int:
        return real_per_class(self.config.real_batch, self.source.train.counts)

    @property
    def views_per_class(self) -> int:
        return self.ipc * self.config.factor**2

    @property
    def pixels(self) -> int:
        return self.source.channels * self.source.height * self.source.width

    @property
    def bank(self) -> int:
        """Bytes of the real features that are kept."""
        return 4 * self.config.kept_entries * self.num_classes * self.real_per_class * self.dim

    def fixed(self, layout: Layout) -> dict[str, int]:
        """What lies on the device all the time, by name."""
        config, share = self.config, self.num_classes / self.source.num_classes
        tensors = 4 + (1 if config.ema else 0) + (2 if config.quantised else 0)
        synthetic = 4 * tensors * self.ipc * self.num_classes * self.pixels
        counted = {
            "workspaces of the libraries": 0 if self.cpu else WORKSPACE,
            "synthetic images with gradient and optimiser": synthetic,
            "feature networks": 4 * self.parameters * (self.kept_networks + 2),
            "frequencies": 16 * self.frequencies * self.dim,
        }
        if layout.images_resident:
            counted["real images"] = int(len(self.source.train) * share) * self.pixels
        if self.bank and layout.bank_resident:
            counted["bank of real features"] = self.bank
        return counted

    def step(self, layout: Layout) -> int:
        """The most that a step takes besides: a pass of real images, or some classes forward and backward."""
        # on a GPU the norms copy a channels-last activation
        real_pass = layout.images * (12 * self.pixels + self.adjacent + (0 if self.cpu else self.largest))
        real_pass += 4 * layout.classes * self.real_per_class * self.dim
        return max(real_pass, layout.classes * self.per_class)

    @property
    def per_class(self) -> int:
        """Bytes of one class forward and backward."""
        views, real, frequencies = self.views_per_class, self.real_per_class, self.frequencies
        network = views * (self.saved + self.adjacent + (0 if self.cpu else self.largest))
        # features of real images; the angle of both kinds, its cosine and its sine
        parts = views * (2 if self.config.nested else 1)
        waves = 4 * real * self.dim + 12 * (real + parts) * frequencies
        if self.config.discrepancy == "mmd":  # kernels between all pairs, and their exponentials
            waves += 16 * (real + views) ** 2
        return network + waves + 4 * views * (6 * self.pixels + 3 * self.dim)

    def total(self, layout: Layout) -> int:
        return sum(self.fixed(layout).values()) + self.step(layout)


def choose_layout(footprint: Footprint, budget: int | None = None, name: str = "--memory") -> Layout:
    """The fastest layout, or the fastest that stays within `budget` bytes, which errors call `name`.

    Chunks are made smaller as long as they keep the device busy; then the bank goes to host memory, then
    the real images. Raises `UsageError` when not even one class at a time fits; the message says what takes
    the memory.
    """
    cpu = footprint.cpu
    aim = CACHE if cpu else PASS
    images = max(1, aim // footprint.largest)
    fastest = footprint.num_classes
    if cpu:  # 4: a backward pass gains from larger batches than a forward pass
        fastest = max(1, min(fastest, 4 * aim // (footprint.views_per_class * footprint.largest)))
    best = Layout(fastest, min(images, fastest * footprint.real_per_class))
    if budget is None:
        return _even(best, footprint.num_classes)
    fitting = []
    for place in _places(cpu):
        rest = budget - sum(footprint.fixed(replace(best, **place)).values())
        classes = min(fastest, int(rest // footprint.per_class))
        layout = replace(best, classes=classes, **place)
        while classes >= 1 and layout.images > 1 and footprint.total(layout) > budget:
            layout = replace(layout, images=layout.images // 2)
        if classes >= 1 and footprint.total(layout) <= budget:
            fitting.append(layout)
    if fitting:
        enough = min(fastest, -(-ENOUGH // footprint.views_per_class))
        busy = [layout for layout in fitting if layout.classes >= enough]
        return _even([*busy, max(fitting, key=lambda layout: layout.classes)][0], footprint.num_classes)
    least = Layout(1, 1, **_places(cpu)[-1])
    parts = footprint.fixed(least) | {"one class forward and backward": footprint.step(least)}
    listed = ", ".join(f"{name} {_mib(size)}" for name, size in sorted(parts.items(), key=lambda p: -p[1]))
    raise UsageError(
        f"{name} {_mib(budget)} is below the minimum of {_mib(footprint.total(least))}: {listed}. Raise "
        "it, or lower distill.real_batch, distill.bank_size, distill.frequencies, ipc or network.width."
    )


def layout_for(footprint: Footprint, device: str, budget: int | None = None) -> Layout:
    """`choose_layout` within `budget` bytes, or else within what a GPU has free. Raises `UsageError`."""
    if budget is None and torch.device(device).type == "cuda":
        return choose_layout(footprint, int(0.9 * free_memory(device)), f"the free memory of {device},")
    return choose_layout(footprint, budget)


def free_memory(device: torch.device | str) -> int:
    """Bytes of a GPU that are free, or only kept by this process for later allocations."""
    torch.cuda.empty_cache()
    return torch.cuda.mem_get_info(device)[0]


def _places(cpu: bool) -> list[dict[str, bool]]:
    """On a CPU there is no other memory to move to."""
    order = [(True, True)] if cpu else [(True, True), (True, False), (False, False)]
    return [{"images_resident": images, "bank_resident": bank} for images, bank in order]


def _even(layout: Layout, num_classes: int) -> Layout:
    """The same number of chunks, as equal as possible; only the last one may be smaller."""
    chunks = -(-num_classes // layout.classes)
    return replace(layout, classes=-(-num_classes // chunks))


def _count(template: Network, shape: tuple[int, ...]) -> tuple[int, list[int], list[int], int]:
    """Bytes that autograd saves for one image, bytes of each layer's output, plain and with the channels
    padded as the convolutions of a CPU have them, and the length of the features.

    As in float32, which is too much where a network computes in half precision.
    """
    network = copy.deepcopy(template).cpu().requires_grad_(False)
    weights = {p.untyped_storage().data_ptr() for p in network.parameters()}
    outputs: list[int] = []
    laid_out: list[int] = []

    def note(module: nn.Module, _: object, output: Tensor) -> None:
        channels = output.shape[1]
        filled = -(-channels // BLOCK) * BLOCK if isinstance(module, nn.Conv2d) else channels
        outputs.append(output.nbytes)
        laid_out.append(output.nbytes // channels * filled)

    for module in network.modules():
        if not list(module.children()):
            module.register_forward_hook(note)
    features, saved = bytes_saved(network.features, weights, torch.zeros(shape, requires_grad=True))
    return saved, outputs, laid_out, features.numel()


def bytes_saved(forward: Callable[[Tensor], Tensor], weights: set[int], images: Tensor) -> tuple[Tensor, int]:
    """What `forward` makes of images, and the bytes that autograd saves for it, `weights` left out."""
    saved: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = forward(images)
    return output, sum(saved.values())


def is_out_of_memory(error: BaseException) -> bool:
    """Whether a device, or one of its libraries, or the CPU's allocator found no memory."""
    return isinstance(error, torch.OutOfMemoryError) or any(words in str(error) for words in NO_MEMORY)


def _mib(size: int) -> str:
    """Rounded up, so that a budget of what is printed is enough."""
    unit, name = (2**20, "MiB") if size >= 2**20 else (2**10, "KiB") if size >= 2**10 else (1, " bytes")
    return f"{math.ceil(10 * size / unit) / 10:g}{name}"
