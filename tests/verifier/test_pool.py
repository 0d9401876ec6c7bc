"""The pool: hostile answers cost their worker and nothing else; processes come and go cleanly."""

from __future__ import annotations

import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path

import pytest

from megatron_sgopd.verifier import Verdict, VerifierPool

LIMIT_S = 1.0
MATHS_LIMIT_S = 2.0  # what SymPy needs for an ordinary answer on a busy machine, many times over
JUDGE = """
import os, re, signal, sys, time
from megatron_sgopd.verifier import Verdict

def judge(completion, answer):
    act, _, rest = completion.partition(":")
    if act == "hang":
        while True:
            time.sleep(60)
    if act == "ignore":  # signals that can be ignored are
        for number in range(1, 32):
            if number not in (signal.SIGKILL, signal.SIGSTOP):
                signal.signal(number, signal.SIG_IGN)
        while True:
            pass
    if act == "regex":  # one C call that holds the interpreter's lock
        return re.match("(a+)+$", "a" * 60 + "b") is not None
    if act == "power":  # another
        return 9**9**9 == 0
    if act == "memory":
        return bool(bytearray(int(rest)))
    if act == "abort":
        os.abort()
    if act == "exit":
        os._exit(7)
    if act == "raise":
        raise KeyError(rest)
    if act == "type":
        return "yes"
    if act == "print":
        print("noise", rest, flush=True)
    if act == "modules":
        return Verdict(rest in sys.modules, None, "asked")
    if act == "fifo":
        with open(rest, "w") as fifo:
            print(os.getpid(), file=fifo)
        while True:
            time.sleep(60)
    return Verdict(completion.endswith(answer), str(os.getpid()), "judged")

not_a_function = 3
"""


@pytest.fixture(scope="module")
def judge_path(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A directory on sys.path with `pool_judge.judge`, a verifier that does as it is told."""
    directory = tmp_path_factory.mktemp("judge")
    (directory / "pool_judge.py").write_text(JUDGE)
    sys.path.insert(0, str(directory))
    yield str(directory)
    sys.path.remove(str(directory))


@pytest.fixture(scope="module")
def pool(judge_path: str) -> Iterator[VerifierPool]:
    with VerifierPool("pool_judge.judge", LIMIT_S, num_workers=2, memory_mb=512) as pool:
        yield pool


@pytest.fixture(scope="module")
def maths() -> Iterator[VerifierPool]:
    with VerifierPool(timeout_s=MATHS_LIMIT_S, num_workers=2, memory_mb=512) as pool:
        pool.verify_many([(r"\boxed{\sqrt{8}}", r"2\sqrt{2}")])  # SymPy is imported by now
        yield pool


def within(limit_s: float, action: Callable[[], list[Verdict]]) -> list[Verdict]:
    """What `action` returns, if one of three tries takes less than `limit_s`.

    A limit on the wall clock holds for the code, not for what else the machine is doing.
    """
    taken = []
    for _ in range(3):
        start = time.monotonic()
        verdicts = action()
        taken.append(time.monotonic() - start)
        if taken[-1] < limit_s:
            return verdicts
    pytest.fail(f"took {taken} s; {limit_s} s is the limit")


def is_gone(pid: int, patience_s: float = 10.0) -> bool:
    """Wait for a process that need not be a child of this one to end."""
    try:
        descriptor = os.pidfd_open(pid)
    except ProcessLookupError:
        return True
    try:
        poll = select.poll()  # unlike select, it takes descriptors beyond 1023
        poll.register(descriptor, select.POLLIN)
        return bool(poll.poll(1000 * patience_s))
    finally:
        os.close(descriptor)


@pytest.mark.parametrize("act", ["hang:", "ignore:", "regex:", "power:"])
def test_overrunning_answer_is_wrong_within_the_limit(pool: VerifierPool, act: str) -> None:
    start = time.monotonic()
    (verdict,) = within(LIMIT_S + 1, lambda: pool.verify_many([(act, "5")]))
    assert time.monotonic() - start >= LIMIT_S
    assert verdict == Verdict(False, None, "timeout")
    after = pool.verify_many([("5", "5"), ("5", "6")])
    assert [verdict.is_correct for verdict in after] == [True, False]


def test_fresh_workers_answer_during_a_burst_of_hostile_answers(pool: VerifierPool) -> None:
    """Twenty workers are lost; the replacements cost next to nothing."""
    acts = ["abort:", "exit:", "memory:4000000000", "raise:"] * 5
    pairs = [pair for act in acts for pair in ((act, "5"), ("5", "5"))]
    verdicts = within(5, lambda: pool.verify_many(pairs))
    assert [verdict.reason for verdict in verdicts[0::2]] == [
        "crashed",
        "crashed",
        "memory",
        "error",
    ] * 5
    assert all(verdict.is_correct for verdict in verdicts[1::2])


def test_hanging_answers_do_not_hold_up_the_others(pool: VerifierPool) -> None:
    pairs = [("hang:", "5"), *[("5", "5")] * 20]
    finished = [index for index, _ in pool.verify_iter(pairs)]
    assert finished.index(0) > 0
    assert sorted(finished) == list(range(21))


def test_memory_is_limited_and_ordinary_use_is_not(pool: VerifierPool) -> None:
    verdicts = pool.verify_many([("memory:100000000", ""), ("memory:900000000", "")])
    assert [verdict.reason for verdict in verdicts] == ["equal", "memory"]


def test_long_text_passes_through(pool: VerifierPool) -> None:
    text = "x" * 10**7
    verdicts = within(LIMIT_S + 1, lambda: pool.verify_many([(text + "5", "5"), (text, "5")]))
    assert [verdict.is_correct for verdict in verdicts] == [True, False]


def test_order_and_progress(pool: VerifierPool) -> None:
    calls: list[tuple[int, int]] = []
    pairs = [(str(number), str(number % 7)) for number in range(100)]
    verdicts = pool.verify_many(pairs, progress=lambda done, total: calls.append((done, total)))
    assert [verdict.is_correct for verdict in verdicts] == [a.endswith(b) for a, b in pairs]
    assert calls == [(done, 100) for done in range(1, 101)]
    assert pool.verify_many([]) == []


def test_pairs_are_read_a_few_ahead(pool: VerifierPool) -> None:
    read = 0

    def endless() -> Iterator[tuple[str, str]]:
        nonlocal read
        while True:
            read += 1
            yield "5", "5"

    with closing(pool.verify_iter(endless())) as verdicts:
        for _ in range(50):
            next(verdicts)
        assert read < 100
        with pytest.raises(RuntimeError, match="already verifying"):
            next(pool.verify_iter([("5", "5")]))
    assert pool.verify_many([("5", "6")])[0].is_correct is False


def test_what_another_verifier_may_return(
    pool: VerifierPool, caplog: pytest.LogCaptureFixture
) -> None:
    pool._warned = False
    verdicts = pool.verify_many([("type:", "5"), ("raise:this", "5"), ("5", "5")])
    assert [verdict.reason for verdict in verdicts] == ["error", "error", "judged"]
    assert "returned str; wanted bool or Verdict" in caplog.text or "KeyError" in caplog.text


def test_workers_import_neither_torch_nor_sympy_for_another_verifier(pool: VerifierPool) -> None:
    names = ["torch", "sympy", "megatron", "re"]
    verdicts = pool.verify_many([(f"modules:{name}", "") for name in names])
    assert [verdict.is_correct for verdict in verdicts] == [False, False, False, True]


@pytest.mark.parametrize(
    "name",
    [
        "pool_judge.missing",
        "no_such_package.verify",
        "pool_judge.not_a_function",
        "mathverify",
        ".",
    ],
)
def test_bad_path_is_named_at_construction(judge_path: str, name: str) -> None:
    with pytest.raises(ValueError, match=r"verifier\.name") as error:
        VerifierPool(name)
    assert repr(name) in str(error.value)


@pytest.mark.parametrize(
    ("settings", "complaint"),
    [
        ({"timeout_s": 0}, r"verifier\.timeout_s is 0"),
        ({"num_workers": 0}, r"verifier\.num_workers is 0"),
        ({"memory_mb": 1}, r"verifier\.memory_mb is 1;"),
    ],
)
def test_setting_out_of_range(settings: dict[str, int], complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        VerifierPool("math_verify", **settings)


HOSTILE = {
    r"\boxed{9**9**9**9}": "unparsable",
    r"\boxed{9^{9^{9^{9}}}}": "timeout",
    r"\boxed{" + "{" * 10**5 + "5" + "}" * 10**5 + "}": "too_long",
    r"\boxed{" + "{" * 1500 + "5" + "}" * 1500 + "}": None,
    r"\boxed{" + "7" * 10**7 + "}": "too_long",
    "x" * 10**7 + r"\boxed{5}": "too_long",
    r"\boxed{10^{10^{10}}!}": None,
    r"\boxed{\sum_{n=1}^{10^{12}} \frac{1}{n}}": None,
}


@pytest.mark.parametrize(("completion", "reason"), HOSTILE.items(), ids=lambda text: str(text)[:24])
def test_hostile_maths(maths: VerifierPool, completion: str, reason: str | None) -> None:
    (verdict,) = within(MATHS_LIMIT_S + 1, lambda: maths.verify_many([(completion, "5")]))
    assert not verdict.is_correct
    assert reason in (None, verdict.reason)
    # The pool goes on at once, with an answer it has not seen.
    number = len(completion)
    fresh = (rf"\boxed{{\sqrt{{{number}}} + 1}}", rf"1 + \sqrt{{{number}}}")
    assert maths.verify_many([fresh])[0].reason == "equal"


def test_trivial_answers_start_nothing_and_cost_next_to_nothing() -> None:
    pairs = [(rf"7+4=1;\boxed{{{number % 10}}}", str(number % 7)) for number in range(20_000)]
    with VerifierPool() as pool:
        start = time.process_time()
        verdicts = pool.verify_many(pairs)
        assert (time.process_time() - start) / len(pairs) < 50e-6
        assert [v.is_correct for v in verdicts] == [n % 10 == n % 7 for n in range(20_000)]
        assert pool.server_pid is None


def test_verdicts_are_remembered(maths: VerifierPool) -> None:
    pair = (r"\boxed{(x+1)^2}", "x^2+2x+1")
    first = maths.verify_many([pair])
    maths.close()
    assert maths.verify_many([("so " + pair[0], pair[1])]) == first
    assert maths.server_pid is None
    # It starts again where it must; the same answer twice in one call is looked at once.
    again = (r"\boxed{(x+1)^3}", "x^3+3x^2+3x+1")
    assert [verdict.is_correct for verdict in maths.verify_many([again, again, pair])] == [True] * 3
    assert maths.server_pid is not None


def test_close_leaves_no_process(judge_path: str) -> None:
    pool = VerifierPool("pool_judge.judge")
    (verdict,) = pool.verify_many([("5", "5")])
    server, worker = pool.server_pid, int(str(verdict.extracted))
    assert server is not None and server not in (worker, os.getpid())
    pool.close()
    pool.close()
    assert is_gone(worker)
    with pytest.raises(ProcessLookupError):  # gone and reaped
        os.kill(server, 0)


def test_a_server_that_dies_is_replaced(judge_path: str) -> None:
    with VerifierPool("pool_judge.judge") as pool:
        (before,) = pool.verify_many([("5", "5")])
        assert pool.server_pid is not None
        os.kill(pool.server_pid, signal.SIGKILL)
        assert is_gone(int(str(before.extracted))), "workers die with their server"
        after = pool.verify_many([("5", "5"), ("5", "6")])
        assert [verdict.is_correct for verdict in after] == [True, False]


def test_signals_to_the_job_are_left_to_the_trainer(judge_path: str) -> None:
    with VerifierPool("pool_judge.judge") as pool:
        server = pool.server_pid
        assert server is not None
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
            os.kill(server, number)
        assert pool.verify_many([("5", "5")])[0].is_correct
        assert pool.server_pid == server


def test_a_fork_of_the_owner_leaves_the_pool_alone(pool: VerifierPool) -> None:
    server = pool.server_pid
    child = os.fork()
    if child == 0:
        try:
            pool.close()
        finally:
            os._exit(0)
    os.waitpid(child, 0)
    assert pool.verify_many([("5", "5")])[0].is_correct
    assert pool.server_pid == server


def parent_of(pid: int) -> int:
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])


PROGRAM = """
import sys
print("imported", flush=True)
from megatron_sgopd.verifier import VerifierPool
pool = VerifierPool("pool_judge.judge", timeout_s=60)
print(pool.server_pid, [v.is_correct for v in pool.verify_many([("print:5", "5")])], flush=True)
if len(sys.argv) > 1:
    pool.verify_many([("fifo:" + sys.argv[1], "")])
"""


def start_program(directory: Path, *arguments: str) -> subprocess.Popen[str]:
    (directory / "program.py").write_text(PROGRAM)
    return subprocess.Popen(
        [sys.executable, str(directory / "program.py"), *arguments],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )


def test_processes_die_with_a_killed_trainer(judge_path: str, tmp_path: Path) -> None:
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    with start_program(tmp_path, str(fifo)) as trainer:
        first_worker = int(fifo.read_text())  # it is in the middle of an answer
        assert trainer.stdout is not None
        trainer.stdout.readline()
        os.kill(int(trainer.stdout.readline().split()[0]), signal.SIGKILL)
        assert is_gone(first_worker), "a busy worker dies with its server"
        worker = int(fifo.read_text())  # the answer was given to a new server
        server = parent_of(worker)
        assert parent_of(server) == trainer.pid
        trainer.kill()
    assert is_gone(server) and is_gone(worker)


def test_main_is_not_imported_again_and_ranks_do_not_disturb_each_other(
    judge_path: str, tmp_path: Path
) -> None:
    programs = [start_program(tmp_path) for _ in range(2)]
    for program in programs:
        output = program.communicate(timeout=60)[0].splitlines()
        assert program.returncode == 0
        # Once; and what a verifier prints stays out of the program's output.
        assert output[0] == "imported" and output[1].endswith(" [True]") and len(output) == 2
        assert is_gone(int(output[1].split()[0]))
