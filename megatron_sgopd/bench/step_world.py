"""`python -m megatron_sgopd.bench.step_world DIR VOCAB`: models and prompts for `bench step`.

The demonstration's two models with random weights and a vocabulary of VOCAB rows; its prompts.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from megatron_sgopd.demo.models import STUDENT, TEACHER, ModelSize, write_model_dir
from megatron_sgopd.demo.world import WorldSizes, write_world

SEED = 42


def write_model(directory: Path, size: ModelSize, vocab: int, seed: int) -> None:
    write_model_dir(directory, size)
    path = directory / "config.json"
    config = json.loads(path.read_text(encoding="utf-8")) | {"vocab_size": vocab}
    path.write_text(json.dumps(config), encoding="utf-8")
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(directory))
    model.save_pretrained(directory)


def main(arguments: list[str]) -> None:
    folder, vocab = Path(arguments[0]), int(arguments[1])
    write_model(folder / "student", STUDENT, vocab, SEED)
    write_model(folder / "teacher", TEACHER, vocab, SEED + 1)
    sizes = WorldSizes(dev=1, test=1, teacher=1, student_noisy=1, student_terse=1)
    write_world(folder / "world", seed=SEED, level="normal", sizes=sizes)


if __name__ == "__main__":
    main(sys.argv[1:])
