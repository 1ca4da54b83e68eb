"""Several processes, as torchrun starts them: the same run as one, and an end when one of them is lost.

PYTHONPATH=.:tests python tests/test_ranks.py     # the tiny model on 1, 2 and 4 ranks; a lost run continued on each
"""

import contextlib
import multiprocessing
import os
import shutil
import sys
import tempfile
import time
from datetime import timedelta
from pathlib import Path
from signal import SIGKILL, SIGTERM, raise_signal

import pytest
import torch
import torch._dynamo  # like the next, here once instead of in each child
import torch.distributed.fsdp
from safetensors.torch import load_file
from torch.distributed import distributed_c10d

import train
from plumbing import ranks
from plumbing.terminal import UserError
from rollout import Sampler
from short_run import Done, arguments, byte_rewards, resume

processes = multiprocessing.get_context("forkserver")
processes.set_forkserver_preload(["test_ranks"])
FAULTS = {  # what a process does that is the last or not (the others of a hang wait for a second); how the two end
    "dies": (lambda last: last and raise_signal(SIGKILL), [2, -9]),
    "is stopped": (lambda last: last and raise_signal(SIGTERM), [143, 143]),
    "hangs": (lambda last: time.sleep(99999) if last else distributed_c10d._set_pg_timeout(timedelta(0, 1)), [2, -9]),
}


def work(rank: int, count: int, port: int, typed: list[str], log: Path, fault: str) -> None:
    """One of the processes; the fault strikes in the fifth rollout."""
    place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": count, "LOCAL_WORLD_SIZE": count, "MASTER_PORT": port}
    place |= {"MASTER_ADDR": "127.0.0.1", "TORCHELASTIC_USE_AGENT_STORE": True, "TORCHELASTIC_RESTART_COUNT": 0}
    os.environ |= {key: str(value) for key, value in place.items()}
    rollout, calls = Sampler.rollout, []

    def faulty(self: Sampler, *others: object) -> list:
        calls.append(1)
        if fault and len(calls) == 5:  # two evaluations come first, and a step takes one or two
            FAULTS[fault][0](rank == count - 1)
        return rollout(self, *others)

    Sampler.rollout = faulty
    if any(word.startswith("model.path=") and word.endswith("/model") for word in typed):  # the smaller one
        train.grade = byte_rewards
    with open(log, "a") as file, contextlib.redirect_stdout(file), contextlib.redirect_stderr(file):
        status = train.main(typed)
    os._exit(status)


def launch(folder: Path, count: int, *typed: str, fault: str = "") -> tuple[Done, list[int]]:
    """A run of `count` processes; what rank 0 printed, what all complained of, and how each ended."""
    store = torch.distributed.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)  # torchrun's own
    logs = [folder.parent / f"{folder.name}-{rank}.log" for rank in range(count)]
    started = [processes.Process(target=work, args=(r, count, store.port, typed, logs[r], fault)) for r in range(count)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join(sys.path))  # or the server cannot import what it is to preload
        for process in started:
            process.start()
    for process in started:
        process.join(600 if process is started[0] or fault != "hangs" else 0)
        process.kill()
        process.join()
    lines = [log.read_text().splitlines() if log.exists() else [] for log in logs]
    errors = [line for part in lines for line in part if line.startswith("train.py: ")]
    return Done(folder, started[0].exitcode, lines[0], errors), [process.exitcode for process in started]


HARD = ["rollout.max_draws=2", "rollout.questions_per_step=3", "data.held_out=5", "train.truncated=mask"]
HARD += ["train.divide_loss_by=tokens", "train.schedule=cosine", "eval.every=2", "train.steps=4"]  # odd counts
CHANGING = {"approx_kl", "logprob_gap", "clip_fraction"}  # rounding errors themselves


def differences(one: Done, other: Done) -> tuple[float, float]:
    """The largest relative difference of the metrics, and that of the weights; the samples must be the same."""
    assert other.samples() == one.samples()
    metrics = 0.0
    for mine, theirs in zip(one.metrics(), other.metrics(), strict=True):
        assert mine.keys() == theirs.keys()
        scales = {key: abs(value) or 1e-9 for key, value in mine.items()} | {"loss": 0.1}  # its terms cancel
        metrics = max(metrics, *(abs(theirs[key] - mine[key]) / scales[key] for key in mine.keys() - CHANGING))
    files = [load_file(done.folder / "final" / "model.safetensors").values() for done in (one, other)]
    mine, theirs = (torch.cat([tensor.flatten() for tensor in tensors]) for tensors in files)
    return metrics, ((mine - theirs).norm() / mine.norm()).item()


@pytest.fixture(scope="module")
def alone(small, tmp_path_factory) -> Done:
    folder = tmp_path_factory.mktemp("runs") / "one"
    done, status = launch(folder, 1, *arguments(folder, *small, *HARD))
    assert status == [0], done.printed
    return done


@pytest.mark.parametrize(("count", "shard"), [(2, "false"), (3, "true")])
def test_several_processes_are_one_run(count, shard, small, alone, tmp_path):
    """An average of averages would be another gradient. Three do not divide the weights or the micro-batches evenly."""
    typed = [*small, *HARD, f"train.shard={shard}", f"train.tokens_per_microbatch={1 if count == 3 else 2048}"]
    done, status = launch(tmp_path / "run", count, *arguments(tmp_path / "run", *typed))
    assert status == [0] * count, done.printed
    assert max(differences(alone, done)) < 5e-6
    steps = [line.split()[1] for line in done.printed if line.startswith("step ") and "reward" in line]
    assert steps == ["1/4", "2/4", "3/4", "4/4"], "each line once"


def test_sharded_bf16_with_checkpointing_is_as_near_to_the_sampler_as_unsharded(small, tmp_path):
    """FSDP2 casts what a layer is given, such as the fp32 rotary tables, to bf16: in forward, not in recomputation."""
    bf16, runs = ["model.dtype=bfloat16", "train.activation_checkpointing=true", "train.steps=1"], []
    for shard in ("train.shard=false", "train.shard=true"):
        runs.append(launch(tmp_path / shard, 2, *arguments(tmp_path / shard, *small, *HARD, *bf16, shard)))
        assert runs[-1][1] == [0, 0], runs[-1][0].printed
    (plain, sharded), keys = ([done.metrics()[1] for done, _ in runs]), ("logprob_gap", "approx_kl", "entropy")
    assert [sharded[key] for key in keys] == pytest.approx([plain[key] for key in keys], rel=1e-6)


@pytest.mark.parametrize(("fault", "shard"), [("dies", "true"), ("is stopped", "true"), ("hangs", "false")])
def test_a_lost_process_ends_the_run_which_another_number_of_them_continues(fault, shard, small, alone, tmp_path):
    """The others waited for ever, or went on by themselves and averaged over those that were left."""
    typed = arguments(tmp_path / "run", *small, *HARD, f"train.shard={shard}")
    lost, status = launch(tmp_path / "run", 2, *typed, fault=fault)
    assert (status, (lost.folder / "final").exists()) == (FAULTS[fault][1], False), lost.printed
    assert len(lost.complaints) == status.count(2), lost.complaints
    assert any("--resume" in line for line in lost.printed)
    assert resume(lost.folder).status == 0
    assert max(differences(alone, lost)) < 5e-6


def test_an_error_of_all_ranks_is_said_once_and_a_lost_one_with_its_whole_reason(small, tmp_path):
    """The last line of NCCL's message says what happened; the first hundred characters say where in PyTorch."""
    done, status = launch(tmp_path / "run", 2, *arguments(tmp_path / "run", *small, "data.held_out=9999"))
    assert (status, len(done.complaints), "data.held_out" in done.complaints[0]) == ([2, 2], 1, True)
    with pytest.raises(UserError, match=r"NCCL.*Cuda failure"), ranks.collective():
        raise RuntimeError(f"NCCL error in: /{'x' * 100}, unhandled cuda error\nLast error:\nCuda failure 'busy'")


if __name__ == "__main__":
    folder = Path(tempfile.mkdtemp())
    runs = {f"{n}": launch(folder / f"{n}", n, *arguments(folder / f"{n}", *HARD))[0] for n in (1, 2, 4)}
    for shard in ("train.shard=false", "train.shard=true"):
        lost, _ = launch(folder / shard, 2, *arguments(folder / shard, *HARD, shard), fault="dies")
        for count in (1, 2, 4):
            copy = shutil.copytree(lost.folder, folder / f"{shard}, lost on 2, continued on {count}")
            runs[copy.name], _ = launch(copy, count, "--resume", str(copy))
    for name, done in runs.items():
        print(name, *differences(runs["1"], done), flush=True)
