"""Several processes, as torchrun starts them: the same run as one, and an end when one of them is lost.

PYTHONPATH=.:tests python tests/test_ranks.py     # 1, 2 and 4 ranks; saved on 2, continued on 1, 2 and 4
"""

import contextlib
import json
import multiprocessing
import os
import shutil
import signal
import socket
import sys
import time
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path

import pytest
from short_run import Done, arguments, resume

import ranks
import train
from rollout import Sampler

processes = multiprocessing.get_context("forkserver")
processes.set_forkserver_preload(["test_ranks"])


def work(rank: int, count: int, port: int, typed: list[str], log: Path, fault: Callable[[], None] | None) -> None:
    """One of the processes; `fault` strikes in the last of them."""
    place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": count, "LOCAL_WORLD_SIZE": count}
    os.environ |= {key: str(value) for key, value in place.items()}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    if fault:
        ranks.PATIENCE = timedelta(seconds=6)
    if fault and rank == count - 1:
        fault()
    with open(log, "a") as file, contextlib.redirect_stdout(file), contextlib.redirect_stderr(file):
        status = train.main(typed)
        file.flush()
    os._exit(status)


def launch(folder: Path, count: int, *overrides: str, resumed: bool = False, fault=None) -> tuple[Done, list[int]]:
    """A run of `count` processes; what rank 0 printed, and how each ended."""
    typed = ["--resume", str(folder), *overrides] if resumed else arguments(folder, *overrides)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    logs = [folder.parent / f"{folder.name}-{rank}.log" for rank in range(count)]
    started = [processes.Process(target=work, args=(r, count, port, typed, logs[r], fault)) for r in range(count)]
    for process in started:
        process.start()
    for process in started:
        process.join(90 if process is started[0] else 5)  # then torchrun, too, would end the others
        process.kill()
        process.join()
    lines = logs[0].read_text().splitlines() if logs[0].exists() else []
    return Done(folder, started[0].exitcode, lines, lines), [process.exitcode for process in started]


HARD = ["rollout.max_draws=2", "rollout.questions_per_step=3", "data.held_out=7", "train.truncated=mask"]
HARD += ["train.divide_loss_by=tokens", "train.schedule=cosine", "eval.every=2", "train.steps=5"]  # odd counts
CHANGING = ("approx_kl", "logprob_gap", "clip_fraction")  # rounding errors themselves


def differences(one: Done, other: Done) -> tuple[float, float, float]:
    """The largest relative difference of the first step's metrics, of all metrics, and of the weights after five steps.

    The samples must be the same.
    """
    assert other.samples() == one.samples()
    worst = [0.0, 0.0]
    for step, (mine, theirs) in enumerate(zip(one.metrics(), other.metrics(), strict=True)):
        assert mine.keys() == theirs.keys()
        for key in mine.keys() - {*CHANGING}:
            scale = 0.1 if key == "loss" else abs(mine[key])  # its terms cancel
            worst[step > 1] = max(worst[step > 1], abs(theirs[key] - mine[key]) / max(scale, 1e-9))
    weights = [load(done.folder / "final") for done in (one, other)]
    return worst[0], max(worst), ((weights[0] - weights[1]).norm() / weights[0].norm()).item()


def same(one: Done, other: Done) -> bool:
    first, metrics, weights = differences(one, other)
    return first < 1e-6 and metrics < 1e-5 and weights < 1e-6


def load(folder: Path):
    import torch
    from safetensors.torch import load_file

    return torch.cat([tensor.flatten() for tensor in load_file(folder / "model.safetensors").values()])


def die(self: Sampler, *others: object) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def hang(self: Sampler, *others: object) -> None:
    time.sleep(60)


def in_a_later_rollout(strike: Callable) -> None:
    """`strike` instead of the fifth rollout: two evaluations come first, and a step takes one or two."""
    generate, calls = Sampler.generate, []

    def count(self: Sampler, *others: object):
        calls.append(1)
        return (strike if len(calls) == 5 else generate)(self, *others)

    Sampler.generate = count


def kill_one() -> None:
    in_a_later_rollout(die)


def stop_one() -> None:
    in_a_later_rollout(hang)


@pytest.fixture(scope="module")
def alone(tmp_path_factory) -> Done:
    done, status = launch(tmp_path_factory.mktemp("runs") / "one", 1, *HARD)
    assert status == [0]
    return done


@pytest.mark.parametrize("shard", ["false", "true"])
def test_two_processes_are_one_run(shard, alone, tmp_path):
    """Averaged within each process, the gradient would be another one; drawn by each, so would the samples."""
    done, status = launch(tmp_path / "two", 2, *HARD, f"train.shard={shard}")
    assert status == [0, 0], done.printed
    assert same(alone, done)
    assert [line.split()[1] for line in done.printed if line.startswith("step ") and "reward" in line] == [
        f"{n}/5" for n in range(1, 6)
    ], "each line once"


@pytest.mark.parametrize("fault", [kill_one, stop_one])
def test_a_lost_process_ends_the_run_which_another_number_of_them_continues(fault, alone, tmp_path):
    """The others waited for ever, or went on by themselves and averaged over those that were left."""
    shard = f"train.shard={str(fault is kill_one).lower()}"
    lost, status = launch(tmp_path / "run", 2, *HARD, shard, fault=fault)
    assert status[0] == 2
    assert any("another process of this run" in line and "--resume" in line for line in lost.printed)
    assert {path.name for path in lost.folder.glob("checkpoints/step-*")} >= {"step-000001"}
    assert not (lost.folder / "final").exists()
    if fault is kill_one:
        again = resume(lost.folder)
        assert again.status == 0
        assert same(alone, again)


def test_without_torchrun_there_is_one_rank():
    assert (ranks.rank(), ranks.count(), ranks.gather([3, 4]), ranks.share(7)) == (0, 1, [3, 4], slice(0, 7))
    assert ranks.on_first(lambda: 5) == 5


def continued(folder: Path, alone: Done, shard: str) -> Iterator[dict[str, object]]:
    """A run of two processes, one of which is killed, continued by one, two and four."""
    lost, status = launch(folder / f"lost-{shard}", 2, *HARD, f"train.shard={shard}", fault=kill_one)
    assert status[0] == 2
    assert not (lost.folder / "final").exists()
    for count in (1, 2, 4):
        copy = shutil.copytree(lost.folder, folder / f"lost-{shard}-{count}")
        done, status = launch(copy, count, f"train.shard={shard}", resumed=True)
        assert status == [0] * count, done.printed
        _, metrics, weights = differences(alone, done)
        assert same(alone, done)
        yield {"saved on": 2, "continued on": count, "shard": shard, "metrics": metrics, "weights": weights}


if __name__ == "__main__":
    import tempfile

    folder = Path(tempfile.mkdtemp())
    runs = {count: launch(folder / str(count), count, *HARD)[0] for count in (1, 2, 4)}
    for count, done in runs.items():
        first, metrics, weights = differences(runs[1], done)
        figures = {"first step": first, "all metrics": metrics, "weights": weights}
        print(json.dumps({"ranks": count, "samples": "the same", **figures}))
    for shard in ("false", "true"):
        for figures in continued(folder, runs[1], shard):
            print(json.dumps(figures), flush=True)
    sys.exit()
