"""What a resume may change, what an earlier attempt leaves, and who may ask a run to stop."""

from __future__ import annotations

import os
import signal
from dataclasses import replace
from pathlib import Path

import pytest

from megatron_sgopd.config.schema import Config, DataConfig, ModelConfig, StudentConfig
from megatron_sgopd.run_folder import (
    StopRequest,
    ask_to_stop,
    claim_run_folder,
    read_status,
    set_status,
    write_recipe,
)

STUDENT = StudentConfig(hf_path="student")
CONFIG = Config(name="run", model=ModelConfig(student=STUDENT), data=DataConfig(train="t.jsonl"))


def changed(section: str, **values: object) -> Config:
    return replace(CONFIG, **{section: replace(getattr(CONFIG, section), **values)})


def test_a_resume_may_change_how_fast_answers_are_judged(tmp_path: Path) -> None:
    write_recipe(tmp_path, CONFIG)
    claim_run_folder(changed("verifier", num_workers=7, timeout_s=9.0), tmp_path, resuming=True)
    assert "num_workers: 7" in (tmp_path / "config.yaml").read_text()


def test_a_resume_may_not_change_who_judges_them(tmp_path: Path) -> None:
    write_recipe(tmp_path, CONFIG)
    with pytest.raises(ValueError, match=r"verifier\.name was 'math_verify', now 'a\.judge'"):
        claim_run_folder(changed("verifier", name="a.judge"), tmp_path, resuming=True)
    assert "name: math_verify" in (tmp_path / "config.yaml").read_text()


def test_a_measured_tie_width_is_no_other_setting(tmp_path: Path) -> None:
    gate = replace(CONFIG.distill.gate, eps=3e-6)
    write_recipe(tmp_path, replace(CONFIG, distill=replace(CONFIG.distill, gate=gate)))
    claim_run_folder(CONFIG, tmp_path, resuming=True)
    assert "eps: auto" in (tmp_path / "config.yaml").read_text(), "the run writes it anew"


def test_a_start_removes_the_request_to_stop_and_the_errors(tmp_path: Path) -> None:
    ask_to_stop(tmp_path)
    (tmp_path / "errors").mkdir()
    set_status(tmp_path, "stopped")
    claim_run_folder(CONFIG, tmp_path, resuming=False)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["config.yaml", "status"]
    assert read_status(tmp_path) == "stopped"
    assert read_status(tmp_path / "nothing") is None


def test_a_file_or_a_signal_asks_for_the_end(tmp_path: Path) -> None:
    before = {n: signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGUSR1)}
    try:
        first, other = StopRequest(tmp_path), StopRequest(tmp_path, looks=False)
        assert not first() and not other()
        ask_to_stop(tmp_path)
        assert first() and not other(), "one rank looks for the file"
        os.kill(os.getpid(), signal.SIGUSR1)
        assert other()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
