"""Takes tensors' bytes off the device between their uses, and brings the same bytes back.

From a GPU they go to pinned host memory. Where the device is the CPU itself the next level down is
a temporary file without a name (a killed process leaves nothing), so that the process's resident
memory really falls.
"""

from __future__ import annotations

import ctypes
import errno
import os
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import IO

import torch
from torch import Tensor

SMALLEST_BYTES = 1024  # what is smaller (step counters) stays where it is
_LIBC = ctypes.CDLL(None)


class Offloader:
    """Tensors stay the same objects with the same views; only their storages lose their bytes."""

    def __init__(self, device: torch.device, folder: str | os.PathLike[str] | None = None) -> None:
        """`folder` is where a CPU's temporary file goes; None is the system's place for them."""
        self.device, self._folder = device, folder
        self._sizes: dict[int, tuple[torch.UntypedStorage, int]] = {}  # what is away, by identity
        self._pinned: list[Tensor] = []
        self._file: IO[bytes] | None = None

    @property
    def bytes_offloaded(self) -> int:
        return sum(size for _, size in self._sizes.values())

    def offload(self, tensors: Iterable[Tensor]) -> None:
        """Copies every storage once, then frees it; tensors on other devices are left alone.

        Raises:
            ValueError: other tensors are away already, or a storage cannot be freed.
            OSError: the copy could not be written; nothing was freed.
        """
        storages = {}
        for tensor in tensors:
            storage = tensor.untyped_storage()
            known = storage._cdata in self._sizes
            small = storage.nbytes() < SMALLEST_BYTES and not known
            if tensor.device.type != self.device.type or small:
                continue
            what = f"a tensor of {tuple(tensor.shape)} {tensor.dtype}"
            if self._sizes and not known:
                raise ValueError(f"{what} is not among those away: bring those back first")
            if not storage.resizable():  # else resize_ fails halfway, with some storages freed
                raise ValueError(f"{what} cannot be freed (loaded, shared, or seen by NumPy)")
            storages[storage._cdata] = storage
        if self._sizes:
            return
        kept = list(storages.values())
        if self.device.type == "cuda":
            self._copy_to_host(kept)
        else:
            self._copy_to_file(kept)
        for storage in kept:
            self._sizes[storage._cdata] = (storage, storage.nbytes())
            storage.resize_(0)
        if self.device.type == "cpu" and hasattr(_LIBC, "malloc_trim"):
            _LIBC.malloc_trim(0)  # glibc keeps what is under 32 MiB, and may not even reuse it

    def restore(self) -> None:
        """Every byte back where it was; does nothing when nothing is away."""
        if not self._sizes:
            return
        if self._file is not None:
            self._file.seek(0)
        for i, (storage, size) in enumerate(self._sizes.values()):
            storage.resize_(size)
            if self.device.type == "cuda":
                _as_bytes(storage).copy_(self._pinned[i], non_blocking=True)
            else:
                self._read(storage, size)
        if self.device.type == "cuda":
            torch.cuda.current_stream(self.device).synchronize()
        self._sizes = {}

    @contextmanager
    def on_device(self, tensors: Iterable[Tensor]) -> Iterator[None]:
        """Brings the bytes back, and puts them away again afterwards."""
        self.restore()
        try:
            yield
        finally:
            self.offload(tensors)

    def close(self) -> None:
        """Brings everything back and gives up buffers and file."""
        self.restore()
        self._pinned = []
        if self._file is not None:
            self._file.close()
            self._file = None

    def _copy_to_host(self, storages: list[torch.UntypedStorage]) -> None:
        if [x.numel() for x in self._pinned] != [s.nbytes() for s in storages]:
            self._pinned = [
                torch.empty(s.nbytes(), dtype=torch.uint8, pin_memory=True) for s in storages
            ]
        for buffer, storage in zip(self._pinned, storages, strict=True):
            buffer.copy_(_as_bytes(storage), non_blocking=True)
        torch.cuda.current_stream(self.device).synchronize()  # before the storages are freed

    def _copy_to_file(self, storages: list[torch.UntypedStorage]) -> None:
        if self._file is None:
            self._file = tempfile.TemporaryFile(  # noqa: SIM115  it lives as long as the offloader
                buffering=0, dir=self._folder, prefix="sgopd-offload-"
            )
        self._file.seek(0)
        try:
            for storage in storages:
                self._write(storage)
        except OSError as error:
            message = (
                f"{sum(s.nbytes() for s in storages)} bytes could not be put away in "
                f"{self._folder or tempfile.gettempdir()} ({error.strerror}): make room there, set "
                "TMPDIR to a larger disk, or switch the offload off; nothing is lost"
            )
            raise OSError(error.errno, message) from error

    def _write(self, storage: torch.UntypedStorage) -> None:
        assert self._file is not None, "opened before"
        view = _memory(storage)
        while view:
            if not (count := self._file.write(view)):
                raise OSError(errno.EIO, "nothing was written")
            view = view[count:]

    def _read(self, storage: torch.UntypedStorage, size: int) -> None:
        assert self._file is not None, "written before"
        view = _memory(storage)
        while view:
            count = self._file.readinto(view)  # type: ignore[attr-defined]
            if not count:
                raise OSError(f"the offload file ended {len(view)} bytes of {size} early")
            view = view[count:]


def _memory(storage: torch.UntypedStorage) -> memoryview:
    """A CPU storage's bytes. (A NumPy view would pin the storage: it could not be freed.)"""
    return memoryview((ctypes.c_ubyte * storage.nbytes()).from_address(storage.data_ptr())).cast(
        "B"
    )


def _as_bytes(storage: torch.UntypedStorage) -> Tensor:
    return torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)
