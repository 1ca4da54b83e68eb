"""A run that nobody watches: a second run beside it, a terminal that closes, a disk, a hub and a memory that fail."""

import contextlib
import io
import json
import multiprocessing
import os
import pty
import re
import shutil
import subprocess
import sys
import termios
import time
from pathlib import Path
from signal import SIGHUP, SIGINT, raise_signal

import pandas
import pytest
import torch
from short_run import ROOT, Done
from small_hub import COMMIT, small_hub

import checkpoint
import hub
import train
from countdown_task import Problem, grade
from data_types import Sampling
from model_folder import load_model, read_small_files, save_model, save_tensors
from qwen2_model import Qwen2, Qwen2Config
from rollout import Decoder, Sampler

CONFIG = """{rollout: {max_new_tokens: 6, group_size: 4, questions_per_step: 2}, eval: {every: 0},
train: {learning_rate: 1e-2, steps: 3, threads: 1}, model: {path: model, device: cpu},
data: {path: problems.parquet, held_out: 2}, checkpoint: {every: 1, keep: 9}}"""
NEW, RESUME, NIGHT = ("--config", "config.yml", "--name", "night"), ("--resume", "runs/night"), Path("runs/night")
WEIGHTS, LOGS = "model.safetensors", [NIGHT / "metrics.jsonl", NIGHT / "samples.jsonl"]


@pytest.fixture(autouse=True)
def _workplace(tmp_path, monkeypatch):
    """A folder with a model, problems and a config; rewards are a sum over the text."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONUNBUFFERED", "")  # or nothing is left to write at the end
    small_files = read_small_files(ROOT / "tiny") | {"vocab.json": b"{}", "merges.txt": b"#version: 0.2"}
    torch.manual_seed(1)
    policy = Qwen2(shape := Qwen2Config(496, 16, 16, 1, 2, 1, 8, 1e-6, 1e4, True, 1024))
    torch.nn.init.normal_(policy.embed_tokens.weight, std=0.1)
    small_files["config.json"] = json.dumps(json.loads(small_files["config.json"]) | vars(shape)).encode()
    save_model(policy, small_files, Path("model"))
    pandas.DataFrame({"nums": [[3, n] for n in range(1, 21)], "target": range(11, 31)}).to_parquet("problems.parquet")
    Path("config.yml").write_text(CONFIG)
    monkeypatch.setattr(train, "grade", lambda _, e: {"format": 0.1, "correct": sum(e.text.encode()) % 2.0})


def main(*typed: str) -> Done:
    with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.redirect_stderr(io.StringIO()) as err:
        status = train.main([*typed])
    folder = Path("runs", typed[3]) if typed[0] == "--config" else NIGHT
    return Done(folder, status, out.getvalue().splitlines(), err.getvalue().splitlines())


def refusal(*typed: str) -> str:
    """The one line that is said; nothing has changed."""
    tree = lambda: {path: path.read_bytes() for path in Path().rglob("*") if path.is_file()}  # noqa: E731
    before, done = tree(), main(*typed)
    assert (done.status, len(done.complaints), tree()) == (2, 1, before), done
    return done.complaints[0]


def steps() -> list[int]:
    return [metrics["step"] for metrics in Done(NIGHT, 0, [], []).metrics()]


def saved(kind: str = "step") -> list[int]:
    return [int(path.name[-6:]) for path in checkpoint.saved(NIGHT, kind)]


def damage(path: Path) -> None:
    path.write_bytes((content := path.read_bytes())[:-1] + bytes([content[-1] ^ 1]))


@pytest.mark.parametrize("typed", [NEW, NEW[:2], (*RESUME, "train.steps=5")], ids=["one name", "one second", "resumed"])
def test_of_two_runs_at_the_same_time_one_is_refused(typed, monkeypatch):
    def child(number: int) -> None:
        sys.stdout, sys.stderr = open(os.devnull, "w"), open(f"stderr {number}", "w")  # noqa: SIM115
        sys.exit(train.main([*typed]))

    assert typed[0] == "--config" or main(*NEW).status == 0
    monkeypatch.setattr(time, "strftime", lambda *_: "night")
    monkeypatch.setattr(train, "grade", lambda *_: time.sleep(0.03) or {"correct": 0.0})  # a run takes a second
    both = [multiprocessing.get_context("fork").Process(target=child, args=(number,)) for number in range(2)]
    for process in both:
        process.start()
    status = [process.join() or process.exitcode for process in both]
    assert (sorted(status), steps()) == ([0, 2], [*range(len(steps()))])
    assert re.fullmatch(f".*{NIGHT}.*\n", Path(f"stderr {status.index(2)}").read_text())


def test_what_cannot_run_is_refused_and_leaves_nothing(monkeypatch):
    for override in ("model.path=none", "rollout.temperature=1e-40", "train.learning_rate=1e3"):
        assert override.partition("=")[2] in refusal(*NEW, override)
    assert all("--resume" in refusal("--resume", name) for name in ("", ".", "no\nrun"))  # "": an unset variable
    monkeypatch.setattr("run.load_model", None)  # is not called
    many = "rollout.questions_per_step=4096", "train.tokens_per_microbatch=99999999"
    large = [(), ("rollout.group_size=65536",), ("rollout.questions_per_step=65536", "rollout.group_size=64"), many]
    for gib, overrides in zip((0.5, 1.25, 1.25, 1.25), large, strict=True):
        monkeypatch.setattr("memory.host_memory", lambda gib=gib: gib * 2**30)
        assert re.search(r"(rollout|train|model)\.[a-z_]+", refusal(*NEW, *overrides))
    with checkpoint.locked(NIGHT):  # by a run that still loads
        assert str(NIGHT) in refusal(*NEW)


def program(*overrides: str, before: tuple[str, ...] = (), **options: object) -> subprocess.Popen:
    return subprocess.Popen([*before, sys.executable, ROOT / "train.py", *NEW, *overrides], **options)


def test_neither_lost_output_nor_a_hangup_under_nohup_stops_a_run():
    with open("/dev/full", "w") as full:
        assert program("--name", "full", stdout=full, stderr=full).wait(60) == 0
    assert Path("runs/full/final", WEIGHTS).exists()
    process = program("train.steps=9", before=("nohup",), stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    while b"reward" not in process.stdout.readline():  # the first step is done
        pass
    process.stdout.close()
    process.send_signal(SIGHUP)
    assert (process.wait(60), steps(), (NIGHT / "final" / WEIGHTS).exists()) == (0, list(range(10)), True)


def test_a_terminal_that_closes_stops_a_run_once_it_is_saved():
    """The kernel sends SIGHUP, and the shell another; nothing can be printed any more."""
    (terminal, other), shown = pty.openpty(), b""
    name, slow = os.ttyname(other), ("train.steps=99", "rollout.max_new_tokens=300", "checkpoint.every=0")
    termios.tcsetwinsize(terminal, (24, 99))  # without a size there are no progress bars
    own = {"start_new_session": True, "preexec_fn": lambda: os.close(os.open(name, os.O_RDWR))}  # it is now in control
    process = program(*slow, stdin=other, stdout=other, stderr=other, **own)
    os.close(other)
    while not re.search(rb"reward.*sampling", shown, re.DOTALL):  # the second step begins
        shown += os.read(terminal, 4096)
    os.close(terminal)
    time.sleep(0.02)
    process.send_signal(SIGHUP)
    assert process.wait(60) in (128 + SIGHUP, -SIGHUP)  # on a slow machine the second comes when all is done
    assert saved() == steps()[-1:] != [0]


@pytest.mark.parametrize("more", ["rollout.max_draws=1", "rollout.max_draws=2", "train.truncated=mask"])
def test_a_step_without_variance_is_measured_and_moves_nothing(more, monkeypatch):
    flat, update = lambda *_: {"format": 0.1, "correct": 0.0}, train.update
    monkeypatch.setattr(train, "update", lambda *of: monkeypatch.setattr(train, "grade", flat) or update(*of))
    done = main(*NEW, "train.weight_decay=0.1", more)  # the first step has variance
    assert (done.status, done.tensors(1) == done.tensors(Path("model").absolute())) == (0, "mask" in more)
    assert done.tensors(1) == done.tensors(2) == done.tensors("final")
    later = done.metrics()[2:]
    assert all(m["zero_variance"] == m["groups"] and m["entropy"] > 1 > 1e5 * m["logprob_gap"] for m in later)


def test_what_breaks_in_the_middle_loses_nothing_before_it(monkeypatch):
    whole, graded, left = main(*NEW[:3], "whole"), train.grade, [*range(4 + 2 * 8 + 3)]  # until the middle of step 3
    with monkeypatch.context() as patch, pytest.raises(IndexError):  # noqa: PT012
        patch.setattr(train, "grade", lambda *of: (left.pop(), graded(*of))[1])
        main(*NEW, "checkpoint.every=0")
    assert saved() == [2]
    assert main(*RESUME).tensors("final") == whole.tensors("final") != whole.tensors(2)
    generate = Sampler.generate  # and a tensor that no machine holds
    small = lambda self, *of: generate(self, *of) if min(of[3], len(of[1])) <= 4 else torch.empty(2**60)  # noqa: E731
    monkeypatch.setattr(Sampler, "generate", small)
    done = main(*NEW[:3], "waves")
    assert (done.status, "4 rows" in done.complaints[0], done.samples()) == (0, True, whole.samples())
    held, renames = Path("model", WEIGHTS).read_bytes(), [Path.rename, lambda *_: raise_signal(SIGINT), Path.rename]
    monkeypatch.setattr(Path, "rename", lambda *of: renames.pop(0)(*of))
    with pytest.raises(KeyboardInterrupt), checkpoint.atomic_folder(Path("model")):
        pass
    assert (len(renames) < 2, [path.read_bytes() for path in Path().glob(f"model*/{WEIGHTS}")]) == (True, [held])


@torch.inference_mode()
def test_on_a_cpu_a_bf16_head_is_widened_once_per_wave(monkeypatch):
    policy, heads = load_model("model", torch.device("cpu"), torch.bfloat16), []
    logits, begin = Qwen2.logits, Decoder.__init__
    monkeypatch.setattr(Qwen2, "logits", lambda self, x, head=None: heads.append(head) or logits(self, x, head))
    uniforms = torch.rand(4, 9, generator=torch.Generator().manual_seed(1))
    sample = lambda: Sampler(policy, [0]).generate([[1, 2, 3], [4, 5]], uniforms, Sampling(), 2)  # noqa: E731
    once = sample()
    assert ({head.dtype for head in heads}, len({*map(id, heads)}), len(heads)) == ({torch.float32}, 2, 18)
    monkeypatch.setattr(Decoder, "__init__", lambda self, *of: (begin(self, *of), setattr(self, "head", None))[0])
    assert (sample(), heads[-1]) == (once, None)  # None is widened at each step


def test_a_run_keeps_what_it_needs(monkeypatch):
    files = {path.name: path.read_bytes() for path in (*Path("model").iterdir(), Path("problems.parquet"))}
    small, save = read_small_files(Path("model")), checkpoint.save_checkpoint
    del small["config.json"]  # which names the type of the weights
    monkeypatch.setattr("run.save_checkpoint", lambda *of: (save(*of), shutil.rmtree("model", ignore_errors=True)))
    monkeypatch.setattr(train, "evaluate", lambda r, k: {f"eval_{k}": r.progress.step / 9, f"eval_{k}_se": 0.0})
    assert main(*NEW, "eval.every=1").status == main(*RESUME, "train.steps=5").status == 0
    assert (saved(), saved("best"), len(small), Path("model").exists()) == ([1, 2, 3, 4, 5], [5], 5, False)
    for folder in (*checkpoint.saved(NIGHT), *checkpoint.saved(NIGHT, "best"), NIGHT / "final"):
        assert {name: (folder / name).read_bytes() for name in small} == small
    asked, get, to = set(), hub.snapshot_download, {"cache_dir": "cache", "token": False}
    monkeypatch.setattr(hub, "snapshot_download", lambda *of, **by: asked.add(by["revision"]) or get(*of, **by, **to))
    with small_hub(files) as to["endpoint"]:
        assert main(*NEW[:3], "hub", "model.path=lab/model", "data.path=lab/countdown").status == 0
    assert Path("runs/hub/config.yml").read_text().count(f"revision: {COMMIT}\n") == 2
    asked.clear()
    assert (main("--resume", "hub", "train.steps=4").status, asked) == (0, {COMMIT})


@pytest.mark.parametrize(("room", "kept", "beside", "failed"), [
    (9.0, [2, 3], [0, 1, 2], 0), (2.5, [2, 3], [0, 1, 1], 0), (1.5, [1], [0], 2), (0.0, [], [], 3)])  # fmt: skip
def test_two_checkpoints_are_kept_where_the_disk_has_room(room, kept, beside, failed, monkeypatch):
    """room: of the disk, in checkpoints; 0 is a network disk that has gone stale. beside: how many a new one meets."""
    usage, size, met = shutil.disk_usage("."), 3.1 * Path("model", WEIGHTS).stat().st_size, []
    free = lambda _: usage._replace(free=(room - len(saved())) * size) if room else os.stat("none")  # noqa: E731
    monkeypatch.setattr(shutil, "disk_usage", free)
    monkeypatch.setattr(checkpoint, "save_tensors", lambda *of: met.append(len(saved())) or save_tensors(*of))
    done = main(*NEW, "checkpoint.keep=2")
    assert (done.status, saved(), met, (NIGHT / "final").exists()) == (0, kept, beside, True)
    assert sum("could not be saved" in line for line in done.complaints) == failed


def test_a_resume_notices_what_has_changed(monkeypatch):
    main(*NEW, "train.schedule=cosine", "checkpoint.keep=2")
    for log in LOGS:  # a planted link to a longer file
        Path("longer").write_text(log.rename("kept").read_text() + "much more")
        log.symlink_to(Path("longer").absolute())
        assert str(NIGHT) in refusal(*RESUME)
        Path("kept").replace(log)
    problems = pandas.read_parquet("problems.parquet")
    problems[:12].to_parquet("problems.parquet")
    assert "problems.parquet" in refusal(*RESUME, "train.steps=6")
    problems.to_parquet("problems.parquet")
    assert any("0.00325" in line and "0.001" in line for line in main(*RESUME, "train.steps=6").printed)  # the rate
    shutil.rmtree(NIGHT / "final")
    one, two = checkpoint.saved(NIGHT)
    damage(two / WEIGHTS)
    assert re.search(rf"{two}: .*remove.*{one.name}", refusal(*RESUME))
    shutil.rmtree(two)
    damage(one / WEIGHTS)
    line, logs = refusal(*RESUME), [log.read_bytes() for log in LOGS]
    assert (str(one) in line, "remove" in line) == (True, False)
    shutil.rmtree(one)
    assert (main(*RESUME, "train.steps=1").status, steps()) == (0, [0, 1])
    assert [next(NIGHT.glob(f"before-*/{log.name}")).read_bytes() for log in LOGS] == logs
    monkeypatch.chdir(NIGHT)
    assert "--resume" in refusal("--resume", "")


def test_names_with_a_tilde_or_terminal_codes_and_answers_without_white_space(monkeypatch):
    assert sum(grade("3 * 7 = 21</think><answer>3 * 7</answer>", False, Problem((3, 7), 21)).values()) == 1.1
    monkeypatch.setenv("HOME", str(Path.cwd()))
    assert main(*NEW, "output.folder=~/x", "train.steps=1").status == 0
    assert main("--resume", "night", "output.folder=~/x", "train.steps=2").status == 0
    assert Path("x/night/checkpoints/step-000002").exists()
    monkeypatch.setattr("grpo.accumulate_gradient", lambda *_: dict.fromkeys(("entropy", "logprob_gap"), float("nan")))
    red, new = Path("red\x1b[31m/night"), (*NEW, 'output.folder="red\\e[31m"', "train.steps=1")
    done = [main(*new), main("--resume", str(red), "train.steps=2")]
    damage(red / "checkpoints/step-000002/state.json")
    done += [main(*new), main("--resume", str(red))]
    text = "".join(line for each in done for line in (*each.printed, *each.complaints))
    assert ([each.status for each in done], "\x1b" in text) == ([0, 0, 2, 2], False)
    assert text.count(r"red\x1b[31m") > 5
