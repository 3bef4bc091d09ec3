"""Images in several files at once, or some of them, read like one tensor."""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

BLOCK = 2**26  # bytes that are copied at once


class Images:
    """uint8 [N, channels, height, width]: `rows` of what lies in `parts`, tensors that may be mapped files.

    It has those of a tensor's methods that the engine reads images with. Only the rows that are asked for are
    touched. An integer gives a view; everything else is new memory.
    """

    def __init__(self, parts: Sequence[Tensor], rows: Tensor | None = None):
        self.parts, self.rows = parts, rows  # int64, or None for all
        self.ends = torch.tensor([len(part) for part in parts]).cumsum(0)
        self.shape = torch.Size([int(self.ends[-1]) if rows is None else len(rows), *parts[0].shape[1:]])
        self.dtype, self.device = parts[0].dtype, parts[0].device

    @classmethod
    def of(cls, images: "Tensor | Images") -> "Images":
        return images if isinstance(images, Images) else cls([images])

    @property
    def nbytes(self) -> int:
        return self.shape.numel()

    def __len__(self) -> int:
        return self.shape[0]

    def __iter__(self) -> Iterator[Tensor]:
        return (self[row] for row in range(len(self)))

    def at(self, rows: Tensor) -> "Images":
        """Some of these images, without reading them; `rows` is int64 [n]."""
        return Images(self.parts, rows if self.rows is None else self.rows[rows])

    def narrow(self, dim: int, first: int, count: int) -> "Images":
        """`count` images in a row, without reading them."""
        return self.at(torch.arange(first, first + count))

    def __getitem__(self, index: "int | slice | Tensor") -> Tensor:
        if isinstance(index, Tensor):
            return self.index_select(0, index)
        if isinstance(index, int):
            row = range(len(self))[index] if self.rows is None else int(self.rows[index])
            part = int(torch.searchsorted(self.ends, row, right=True))
            return self.parts[part][row - int(self.ends[part])]  # counted from the end
        rows = torch.arange(*index.indices(len(self)))
        return self.index_select(0, rows)

    def index_select(self, dim: int, rows: Tensor) -> Tensor:
        """The images at `rows`, int64 [n] in any order, as new memory [n, channels, height, width]."""
        rows = rows if self.rows is None else self.rows.index_select(0, rows)
        of_part = torch.searchsorted(self.ends, rows, right=True)
        used = of_part.unique().tolist() or [0]
        if len(used) == 1:
            return self._of_part(used[0], rows)
        joined = torch.cat([self._of_part(part, rows[of_part == part]) for part in used])
        order = of_part.argsort(stable=True)
        if torch.equal(order, torch.arange(len(order))):  # as draws by class are
            return joined
        return joined.index_select(0, order.argsort())  # index_copy_ takes several times as long on bytes

    def _of_part(self, part: int, rows: Tensor) -> Tensor:
        images = self.parts[part]
        return images.index_select(0, rows - (self.ends[part] - len(images)))

    def to(self, device: torch.device | str) -> "Tensor | Images":
        """Themselves where they are already; else all of them, as a tensor on `device`."""
        if torch.device(device) == self.device:
            return self
        found = torch.empty(self.shape, dtype=self.dtype, device=device)
        step = max(1, BLOCK // self.shape[1:].numel())
        for first in range(0, len(self), step):
            found[first : first + step] = self[first : first + step]
        return found
