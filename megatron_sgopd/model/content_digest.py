"""A model's identity by content: the same directory moved is the same model, other weights are not.

Standard library only: it answers before anything heavy is loaded.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

VOLATILE = ("transformers_version", "_name_or_path")  # of config.json: who wrote it, not what
WHOLE_BYTES = 64 * 2**20  # files up to this size are read whole
BLOCK, BLOCKS = 2**14, 1024  # of larger ones: blocks from the header to the last byte


def fingerprint(model: Path) -> str:
    """Sixteen hexadecimal digits of config.json, index and weights of a Hugging Face directory.

    Of a large file the header (names, shapes, places), the size and evenly spaced blocks are read:
    training moves nearly every weight, so two trained models differ in them.
    """
    digest = hashlib.sha256()
    config = json.loads((model / "config.json").read_text(encoding="utf-8"))
    kept = {key: value for key, value in config.items() if key not in VOLATILE}
    digest.update(json.dumps(kept, sort_keys=True).encode())
    for index in sorted(model.glob("*.index.json")):
        digest.update(index.read_bytes())
    for file in sorted(model.glob("*.safetensors")):
        size = file.stat().st_size
        digest.update(f"\0{file.name} {size}\0".encode())
        with file.open("rb") as content:
            if size <= WHOLE_BYTES:
                digest.update(content.read())
                continue
            header = int.from_bytes(content.read(8), "little")
            digest.update(content.read(min(header, size)))
            for i in range(BLOCKS):
                content.seek(8 + header + (size - 8 - header - BLOCK) * i // (BLOCKS - 1))
                digest.update(content.read(BLOCK))
    return digest.hexdigest()[:16]
