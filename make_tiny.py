"""Makes `tiny/`: a genuine Qwen2.5 checkpoint, small enough for a laptop, from nothing.

A byte-level BPE is trained on the texts of the task, then a small Qwen2 is trained, supervised, on generated
reasoning traces. A trace tries combinations one a line and says of each whether it hits the target:

    <think>
    12*3=36, 36+7=43 no
    12-7=5, 5*3=15 yes
    </think>
    <answer>(12-7)*3</answer>

Traces are honest: a line says `yes` exactly when it reaches the target. And most are impatient: after a few misses they
give up and answer with their last try. So the model writes the right form and does its sums, but solves only a part
of the problems. What is missing - patience, and better tries - is left to GRPO (train.py --config config_tiny.yml).

    python make_tiny.py                  # writes tiny/ again, bit for bit on the same machine, in about 20 minutes

Held-out problems (the 512 that training evaluates on) never enter a trace; tiny/sft_problems.parquet lists what did.
"""

import argparse
import random
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import pandas
import torch
import torch.nn.functional as F
from tokenizers import Regex, Tokenizer as BytePairTokenizer, decoders, models, normalizers, pre_tokenizers, trainers


from checkpoint import write_model
from countdown_task import ASSISTANT_PREFIX, generate_problems, grade, question_text, split_problems
from data_types import Problem
from qwen2_model import Qwen2, Qwen2Config, head_logits
from rollout import Sampling, generate
from tokenizer import Tokenizer

SPECIAL_TOKENS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]  # as in Qwen2.5
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@dataclass(frozen=True)
class Recipe:
    """Every choice that shapes the checkpoint."""

    seed: int = 0
    steps: int = 2000
    rows: int = 64  # traces a step
    learning_rate: float = 4e-3
    hidden: int = 128
    layers: int = 4
    inner: int = 384
    merges: int = 320
    # how a trace chooses its next try: the solution itself, the best second operation for a random first one, or anything
    guided: float = 0.15
    sensible: float = 0.45
    # share of traces that give up after 1, 2, 3, ... misses; the rest try up to 40 times
    patience: tuple[float, ...] = (0.18, 0.22, 0.22, 0.18, 0.08)
    threads: int = 2
    practice: int = 1500
    init: str = ""


@dataclass(frozen=True)
class Try:
    """One line of a trace: two operations, what they come to, and the expression they make."""

    line: str
    value: int
    expression: str
    first: str


def operations(a: int, b: int) -> list[tuple[int, str, str, bool]]:
    """(result, left sign right template) of every operation on a and b with a natural result."""
    big, small, swapped = (a, b, False) if a >= b else (b, a, True)
    results = [(big + small, "+", swapped), (big - small, "-", swapped), (big * small, "*", swapped)]
    if small and big % small == 0:
        results.append((big // small, "/", swapped))
    return [(value, sign, swapped) for value, sign, swapped in results]


def all_tries(numbers: tuple[int, ...], most: int = 200) -> list[Try]:
    """Every way to combine three numbers in two operations with natural results up to `most`."""
    tries = []
    for rest in range(3):
        a, b = (n for i, n in enumerate(numbers) if i != rest)
        big, small = max(a, b), min(a, b)
        for between, sign, _ in operations(a, b):
            first = f"{big}{sign}{small}"
            for value, last_sign, swapped in operations(between, numbers[rest]):
                if value > most:
                    continue
                inner = f"({first})"
                c = str(numbers[rest])
                left, right = (c, inner) if swapped else (inner, c)
                shown = (c, str(between)) if swapped else (str(between), c)
                line = f"{first}={between}, {shown[0]}{last_sign}{shown[1]}={value}"
                tries.append(Try(line, value, f"{left}{last_sign}{right}", first))
    return tries


def write_trace(problem: Problem, recipe: Recipe, rng: random.Random, practice: bool = False) -> str:
    """One reasoning trace, from right after `<think>` to the end of the answer."""
    draw, patience = rng.random(), 14
    for misses, share in enumerate(() if practice else recipe.patience, start=1):
        if draw < share:
            patience = misses
            break
        draw -= share
    guided = 0.0 if practice else recipe.guided
    numbers = list(problem.numbers)
    left = all_tries(tuple(numbers))
    lines: list[str] = []
    while left and len(lines) < patience:
        kind = rng.random()
        hits = [t for t in left if t.value == problem.target]
        if kind < guided and hits:
            chosen = rng.choice(hits)
        elif kind < guided + recipe.sensible:
            first = rng.choice(sorted({t.first for t in left}))
            chosen = min((t for t in left if t.first == first), key=lambda t: abs(t.value - problem.target))
        else:
            chosen = rng.choice(left)
        left.remove(chosen)
        hit = chosen.value == problem.target
        lines.append(f"{chosen.line} {'yes' if hit else 'no'}")
        if hit:
            break
    return "\n" + "\n".join(lines) + f"\n</think>\n<answer>{chosen.expression}</answer>"


def train_tokenizer(texts: list[str], recipe: Recipe) -> BytePairTokenizer:
    """Byte-level BPE as in Qwen2.5, but for one thing: it may merge across words, so that the fixed wording of
    the prompt becomes a handful of tokens. Digits stay single."""
    bpe = BytePairTokenizer(models.BPE())
    bpe.normalizer = normalizers.NFC()
    bpe.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(r"\p{N}"), behavior="isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ])
    bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=len(alphabet) + recipe.merges, initial_alphabet=sorted(alphabet),
                                  show_progress=False, max_token_length=1000)
    bpe.train_from_iterator(texts, trainer)
    bpe.add_special_tokens(SPECIAL_TOKENS)
    return bpe


def encode_batch(bpe_tokenizer: Tokenizer, problems: list[Problem], recipe: Recipe, rng: random.Random, practice: bool):
    """Fresh traces on random problems: (tokens (rows, T), prompt lengths, total lengths), padded on the right."""
    rows = []
    for problem in rng.choices(problems, k=recipe.rows // 2 if practice else recipe.rows):
        prompt = bpe_tokenizer.encode_prompt(question_text(problem), ASSISTANT_PREFIX)
        answer = bpe_tokenizer.encode(write_trace(problem, recipe, rng, practice) + "<|im_end|>")
        rows.append((prompt, answer))
    return rows


def main() -> None:
    p = argparse.ArgumentParser()
    p.add_argument("--out", default="tiny")
    for f in Recipe.__dataclass_fields__.values():
        if f.name != "patience":
            p.add_argument("--" + f.name, type=type(f.default), default=f.default)
        else:
            p.add_argument("--patience", type=lambda s: tuple(map(float, s.split(","))), default=f.default)
    a = vars(p.parse_args()); out = Path(a.pop("out")); recipe = Recipe(**a)
    torch.set_num_threads(recipe.threads)
    problems = generate_problems(3, 1, 15, 10, 100)
    train, held = split_problems(problems, 512)
    rng = random.Random(recipe.seed)
    texts = []
    for pr in rng.choices(train, k=4000):
        texts += ["user\n" + question_text(pr), "assistant\n" + ASSISTANT_PREFIX, write_trace(pr, recipe, rng)]
    bpe = train_tokenizer(texts, recipe)
    out.mkdir(parents=True, exist_ok=True)
    import json
    bpe.save(str(out / "tokenizer.json"))
    (out/"tokenizer_config.json").write_text(json.dumps({"tokenizer_class":"Qwen2Tokenizer","eos_token":"<|im_end|>","pad_token":"<|endoftext|>","chat_template":CHAT_TEMPLATE},indent=2))
    ids=[bpe.token_to_id(s) for s in SPECIAL_TOKENS]
    (out/"generation_config.json").write_text(json.dumps({"eos_token_id":[ids[2],ids[0]],"pad_token_id":ids[0]},indent=2))
    tok = Tokenizer(out)
    torch.manual_seed(recipe.seed)
    cfg = Qwen2Config(len(tok), recipe.hidden, recipe.inner, recipe.layers, recipe.hidden//32, 1, 32, 1e-6, 1e4, True, 1024)
    model = Qwen2(cfg)
    for n, q in model.named_parameters():
        if q.ndim == 2: torch.nn.init.normal_(q, std=0.02 if 'embed' in n else q.shape[1]**-0.5 * (0.5 if ('out' in n or 'down' in n) else 1))
        elif 'bias' in n: torch.nn.init.zeros_(q)
    print(sum(q.numel() for q in model.parameters()), len(tok))
    if recipe.init:
        from checkpoint import load_model
        model.load_state_dict(load_model(recipe.init, torch.device('cpu'), torch.float32).state_dict())
    decay=[q for q in model.parameters() if q.ndim==2]; rest=[q for q in model.parameters() if q.ndim!=2]
    opt = torch.optim.AdamW([{'params':decay,'weight_decay':0.05},{'params':rest,'weight_decay':0.0}], lr=recipe.learning_rate, betas=(0.9, 0.98), fused=True)
    t0 = time.time(); seen = 0
    queue = []
    for step in range(recipe.steps):
        if not queue:
            rows = []
            for _ in range(16): rows += encode_batch(tok, train, recipe, rng, step < recipe.practice)
            rows.sort(key=lambda r: len(r[0]) + len(r[1]))
            queue = [rows[i:i+n] for n in [recipe.rows // 2 if step < recipe.practice else recipe.rows] for i in range(0, len(rows), n)]; rng.shuffle(queue)
        batch = queue.pop()
        T = max(len(p)+len(r) for p, r in batch)
        x = torch.zeros(len(batch), T, dtype=torch.long); y = torch.full((len(batch), T), -100)
        for i, (pp, rr) in enumerate(batch):
            x[i, :len(pp)+len(rr)] = torch.tensor(pp+rr); y[i, len(pp)-1:len(pp)+len(rr)-1] = torch.tensor(rr)
        w = (step+1)/100 if step < 100 else max(0.0, 1-(step-100)/(recipe.steps-100))
        for g in opt.param_groups: g['lr'] = recipe.learning_rate*min(1,w)
        h = model(x); m = y >= 0
        loss = F.cross_entropy(head_logits(h[m], model.head), y[m])
        loss.backward(); torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0); opt.step(); opt.zero_grad()
        seen += int(m.sum())
        if step % 100 == 99: print(step+1, f"loss {loss.item():.4f} {time.time()-t0:.0f}s {seen/(time.time()-t0):.0f} tok/s", flush=True)
        if step % 1000 == 999 or step in (recipe.steps-1, recipe.practice-1): 
            write_model(model, out, ids[2], ids[0]); report(model, tok, held, recipe)


def report(model, tok, held, recipe):
    import re
    for temp in (1.0, 0.0):
        prompts = [tok.encode_prompt(question_text(q), ASSISTANT_PREFIX) for q in held]
        u = torch.rand(len(held), 320, generator=torch.Generator().manual_seed(1))
        t=time.time()
        out = generate(model, prompts, u, tok.end_ids, len(tok), Sampling(temp))
        dt=time.time()-t
        texts=[tok.decode(o.ids[:-1] if o.ended else o.ids) for o in out]
        rw=[grade(tx, o.ended, q) for tx,o,q in zip(texts,out,held)]
        good=bad=claims=honest=lines=0
        for tx,q in zip(texts,held):
            for l in re.findall(r"\n(\d+[-+*/]\d+=\d+, \d+[-+*/]\d+=\d+) (yes|no)", tx):
                lines+=1
                a,b=l[0].split(", "); 
                def val(e):
                    x,v=e.split("="); m=re.match(r"(\d+)([-+*/])(\d+)",x); i,j=int(m[1]),int(m[3])
                    return {'+':i+j,'-':i-j,'*':i*j,'/':i/j if j else None}[m[2]]==int(v)
                good+=val(a)+val(b); bad+=2-val(a)-val(b)
                if l[1]=='yes': claims+=1; honest+=int(b.split("=")[1])==q.target
        print(f"T={temp} success {sum(r.correct for r in rw)/len(rw):.3f} format {sum(r.format>0 for r in rw)/len(rw):.3f} arith {good/max(1,good+bad):.4f} lines/answer {lines/len(rw):.2f} claims {claims/len(rw):.3f} honest {honest/max(1,claims):.3f} len {sum(len(o.ids) for o in out)/len(out):.1f} {dt:.1f}s", flush=True)
    print(texts[0], flush=True); print(texts[1], flush=True)


if __name__ == "__main__":
    main()
