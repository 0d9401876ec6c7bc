"""`python -m megatron_sgopd.bench.step_trl WORK RESULT`: steps of TRL's DistillationTrainer.

WORK is `step.Work` as JSON; RESULT gets the seconds of each step. TRL samples one answer a prompt,
so each prompt stands in its data as often as ours is answered.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

from datasets import Dataset
from transformers import AutoTokenizer, TrainerCallback
from trl import DistillationConfig, DistillationTrainer


class StepClock(TrainerCallback):
    """The moments at which training began and steps ended, by the clock and in CPU time."""

    def __init__(self) -> None:
        self.moments: list[tuple[float, float]] = []

    def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
        self.moments.append((time.perf_counter(), time.process_time()))

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        self.moments.append((time.perf_counter(), time.process_time()))


def train(work: dict[str, Any], output_dir: str) -> dict[str, Any]:
    """Reverse KL over the whole vocabulary, fp32, activations kept: what ours is measured with."""
    batch = work["prompts"] * work["rollouts"]
    lines = Path(work["data"]).read_text(encoding="utf-8").splitlines()
    problems = [json.loads(line)["problem"] for line in lines[: work["prompts"] * work["steps"]]]
    prompts = [
        [{"role": "user", "content": problem}]
        for problem in problems
        for _ in range(work["rollouts"])
    ]
    clock = StepClock()
    trainer = DistillationTrainer(
        model=work["student"],
        teacher_model=work["teacher"],
        args=DistillationConfig(
            output_dir=output_dir,
            beta=1.0,
            temperature=1.0,
            max_completion_length=work["new_tokens"],
            per_device_train_batch_size=work["micro_batch"],
            gradient_accumulation_steps=batch // work["micro_batch"],
            max_steps=work["steps"],
            learning_rate=work["learning_rate"],
            lr_scheduler_type="constant",
            adam_beta2=0.98,
            weight_decay=0.0,
            max_grad_norm=1.0,
            shuffle_dataset=False,
            bf16=False,
            gradient_checkpointing=False,
            use_cpu=True,
            seed=work["seed"],
            report_to=[],
            save_strategy="no",
            logging_steps=1,
            disable_tqdm=True,
        ),
        train_dataset=Dataset.from_dict({"prompt": prompts}),
        processing_class=AutoTokenizer.from_pretrained(work["student"], padding_side="left"),
        callbacks=[clock],
    )
    # Nobody can sample this id, so that every answer has its full length, as ours have.
    trainer.eos_token_ids = trainer.generation_config.eos_token_id = [work["never_sampled"]]
    trainer.train()
    rows = [row for row in trainer.state.log_history if "completions/mean_length" in row]
    return {
        "seconds": [after[0] - before[0] for before, after in pairwise(clock.moments)],
        "cpu_seconds": [after[1] - before[1] for before, after in pairwise(clock.moments)],
        "tokens": round(batch * rows[-1]["completions/mean_length"]),
    }


def main(arguments: list[str]) -> None:
    with tempfile.TemporaryDirectory(prefix="sgopd-bench-trl-") as folder:
        result = train(json.loads(arguments[0]), folder)
    Path(arguments[1]).write_text(json.dumps(result), encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])
