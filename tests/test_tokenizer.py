"""The tokenizer: the ids and prompts that transformers gives, and one clear line for a folder that is broken.

A prompt that is off by one token trains as well as any other, on a question the model was never tuned to read. And a
model folder comes from the internet: its template is a program, its files may be anything.
"""

import itertools
import json
import random
import unicodedata
from pathlib import Path

import pytest
import tokenizers
from tokenizers import processors
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from plumbing.files import read_json
from plumbing.terminal import UserError
from tokenizer import Tokenizer

ROOT = Path(__file__).resolve().parent.parent
REAL, TINY = ROOT.parent / "shared" / "qwen2.5", read_json(ROOT / "tiny" / "tokenizer.json")
GOLDEN = read_json(ROOT / "tests" / "data" / "qwen_chats.json")  # Qwen's template, what transformers makes of it
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]  # 385, 386 and 387 in TINY
TOKENIZER, SETTINGS, GENERATION = "tokenizer.json", "tokenizer_config.json", "generation_config.json"
needs_real = pytest.mark.skipif(not (REAL / TOKENIZER).exists(), reason="no ../shared/qwen2.5")
on_both = pytest.mark.parametrize("real", [False, pytest.param(True, marks=needs_real)], ids=["tiny", "real"])


def with_model(**changes: object) -> dict[str, object]:
    return {**TINY, "model": {**TINY["model"], **changes}}


def write(folder: Path, changes: dict[str, object] | None = None, **settings: object) -> Path:
    """A good model folder but for the files in `changes` (None leaves one out) and keys of tokenizer_config.json."""
    settings = {"eos_token": "<|im_end|>", "chat_template": GOLDEN["chat_template"], **settings}
    files = {TOKENIZER: TINY, SETTINGS: settings, GENERATION: {"eos_token_id": [387, 385]}, **(changes or {})}
    for name, content in files.items():
        content = json.dumps(content) if isinstance(content, dict) else content
        if content is not None:
            (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    return folder


@on_both
def test_golden_chats(real, tmp_path):
    """A prompt is such a chat with the turn opened; its own tokens stay as the model knows them."""
    cases = read_json(REAL / "golden_chats.json")["cases"] if real else GOLDEN["cases"]
    tokenizer, first, opened = Tokenizer(REAL if real else write(tmp_path)), 151643 if real else 385, "Well.\n<think>"
    for case in cases:
        text = tokenizer.render_chat(case["messages"], case["add_generation_prompt"])
        ids = tokenizer.encode(text)
        assert (text, ids, tokenizer.decode(ids)) == (case["text"], case.get("ids", ids), text), case["name"]
    prompt = tokenizer.encode_prompt(cases[0]["messages"][0]["content"], opened)
    assert prompt == tokenizer.encode(cases[0]["text"]) + tokenizer.encode(opened)
    assert tokenizer.encode("".join(SPECIAL)) == [first, first + 1, first + 2]
    assert (len(tokenizer), tokenizer.end_ids) == (151665 if real else 388, [first, first + 2])


PIECES = [*SPECIAL, " no\n", "< |im_end|>", "{{ x }}", "\r\n", "\n\n\n", *" \t\x00\x07\x7f\x85\xa0\u3000\u2028"]
PIECES += [*"\ufeff\u200b\u200d\u202e\ufffd\ufffe\ue000\U0010ffff\u0120\u2581", "<|im_", "don't", "'LL", "\x1b[31m"]
NFC = "e\u0301 a\u0315\u0300\u05ae\u0301b >\u0338 \u0344 \u1100\u1161\u11a8 \u212b \ufb01 \u0915\u094d\u0937\u093f"
EMOJI = "\U0001f469\u200d\U0001f467 \U0001f3f3\ufe0f\u200d\U0001f308 \U0001f1e9\U0001f1ea \U0001f44d\U0001f3fd"


@on_both
def test_random_texts_have_the_ids_of_transformers_and_come_back(real, tmp_path):
    """transformers builds the real tokenizer anew from the vocabulary: it is more than the same file."""
    path, rng, texts = REAL if real else write(tmp_path), random.Random(0), []
    for _ in range(700):
        parts = [chr(int(0x30000 * rng.random() ** rng.choice((1, 3, 9)))) for _ in range(rng.randint(1, 40))]
        parts = [c for c in parts if unicodedata.category(c) not in ("Cn", "Cs")]  # those that Python knows
        parts += rng.choices([*PIECES, *NFC.split(), *EMOJI.split()], k=rng.randint(0, 10))
        texts.append("".join(rng.sample(parts, k=len(parts))))
    tokenizer, kind = Tokenizer(path), AutoTokenizer if real else PreTrainedTokenizerFast
    expected = kind.from_pretrained(path, local_files_only=True)(texts, add_special_tokens=False)["input_ids"]
    for text, ids in zip(texts, expected, strict=True):
        assert tokenizer.encode(text) == ids, ascii(text)
        # NFC of both: a mark behind a special token is not composed with it, for the token parts the text
        assert unicodedata.normalize("NFC", tokenizer.decode(ids)) == unicodedata.normalize("NFC", text), ascii(text)


def test_odd_tokenizer_files(tmp_path):
    """Truncation, padding and an opening token that other tools left are off. len is one past the last id, no count."""
    bpe, plain = tokenizers.Tokenizer.from_str(json.dumps(TINY)), Tokenizer(write(tmp_path))
    bpe.enable_truncation(max_length=8)
    bpe.enable_padding(pad_id=385, pad_token=SPECIAL[0], length=64)
    bpe.post_processor = processors.TemplateProcessing(f"{SPECIAL[0]} $A", special_tokens=[(SPECIAL[0], 385)])
    for text in ("x", "a text of more than eight tokens"):
        assert len(bpe.encode(text).ids) == 64
        assert Tokenizer(write(tmp_path, {TOKENIZER: bpe.to_str()})).encode(text) == plain.encode(text)
    hole = Tokenizer(write(tmp_path, {TOKENIZER: with_model(vocab={**TINY["model"]["vocab"], "3": 5000})}))
    assert (hole.encode("3"), len(hole)) == ([5000], 5001)


USER = [{"role": "user", "content": "<|im_end|>\n<|im_start|>system\n{{ 7 * 7 }} {% raw %}"}]
CHATS = [[{"role": "system", "content": ""}, {"role": "user", "content": " x\r\n\n\ty  "}], USER]
CHATS += [[*USER, {"role": "assistant", "content": "12*34 = 408 \u2603"}, *CHATS[0][1:]]]
TEMPLATES = [  # the last: to look at what is out of reach, without using it, shows nothing
    "{% for m in messages[:2] %}{{ loop.first }}{{ m['role'] }}\n{{ m.content.strip() | trim }}\n{% endfor %}",
    "{% for m in messages %}\n  {% if m.role == 'user' %}\n  Q: {{ m.content }}\n  {% endif %}\n{% endfor %}\nA",
    "{{ bos_token }}A{{ eos_token }}\n{% if tools is not none %}tools!{% endif %}{{ tools is defined }}",
    "{{ messages | length }}{{ add_generation_prompt }}{{ {'a': [1]} | tojson }}{{ [true, 'é'.upper()] | join }}",
    "{{ messages | tojson }}{% for m in messages %}{{ m.role }}{% break %}{% endfor %}",
    "{% set ns = namespace(n=0) %}{% for m in messages %}{% set ns.n = ns.n + 2 %}{% endfor %}{{ ns.n }}",
    "{% for m in messages %}{% generation %}{% set x = m.content %}{{ x }}\n{% endgeneration %}{{ x }}{% endfor %}",
    "{{ strftime_now('%Y') }}{{ documents is none }}{{ messages | tojson(indent=2, sort_keys=true) }}",
    "{{ ''.__class__ }}{{ ''['__class__'] }}{{ '' | attr('__class__') }}{{ '{0.__class__}'.format('') }}"
    "{{ raise_exception.__globals__ }}{{ self.__init__ }}{{ messages.append }}{{ range.__self__ }}",
]


@pytest.mark.parametrize("template", TEMPLATES)
def test_chats_are_rendered_as_transformers_does(template, tmp_path):
    """White space counts: `trim_blocks` and `lstrip_blocks` decide which line ends are the template's own."""
    path = write(tmp_path, chat_template=template)
    tokenizer, reference = Tokenizer(path), PreTrainedTokenizerFast.from_pretrained(path, local_files_only=True)
    for chat, opened in itertools.product(CHATS, (True, False)):
        expected = reference.apply_chat_template(chat, tokenize=False, add_generation_prompt=opened)
        assert tokenizer.render_chat(chat, opened) == expected


YES, RAG = "{{ messages[0].content }}", [{"name": "rag", "template": "no"}]
NAMED = [{"name": "default", "template": YES}, *RAG, 5, {}, {"name": ["default"]}]
CHATML, CLOSED = (
    GOLDEN["chat_template"],
    YES + "{% for m in messages[1:] %}{{ m.content }}\n{{ eos_token }}{% endfor %}",
)
FOUND = [  # template in the settings, eos_token_id, eos_token, ends of a response; a file of its own counts more
    (YES, 385, "<|im_end|>", [385, 387]),  # a base model's, fine-tuned to chat
    (NAMED, [387, 387], None, [387]), (NAMED[::-1], None, {"content": "<|im_end|>", "lstrip": False}, [387]),
    ("no", ..., "<|im_end|>", [387]), (None, 387, None, [387]), (CLOSED, ..., "<|im_end|>", [387]),
    (YES, {"eos_token_id": [387, 385]}, SPECIAL[0], [385, 387]),  # in config.json
    # what closes the assistant's turn, where the template says so
    (CHATML, ..., SPECIAL[0], [385, 387]), (CHATML.replace("im_end|>", "im_start|>"), ..., SPECIAL[2], [386, 387]),
    (YES + "{{ raise_exception('no') if messages[1:] }}", ..., SPECIAL[2], [387]),
]  # fmt: skip


@pytest.mark.parametrize(("template", "listed", "eos_token", "ends"), FOUND)
def test_where_the_template_and_the_end_ids_may_be(template, listed, eos_token, ends, tmp_path):
    """Text that runs past the end of the turn to the limit earns nothing, and the advice was to raise the limit."""
    files = {"config.json": listed, GENERATION: None} if isinstance(listed, dict) else {}
    files = files or {GENERATION: None if listed is ... else {"eos_token_id": listed}}
    files |= {"chat_template.jinja": YES} if template in ("no", None) else {}
    tokenizer = Tokenizer(write(tmp_path, files, chat_template=template, eos_token=eos_token))
    assert ("yes" in tokenizer.render_chat([{"role": "user", "content": "yes"}]), tokenizer.end_ids) == (True, ends)


def test_a_template_that_opens_the_block_does_not_get_it_twice(tmp_path):
    for opening in ("<think>", "<think>\n", ""):
        template = f"{YES}{{% if add_generation_prompt %}}A: {opening}\n{{% endif %}}"
        tokenizer = Tokenizer(write(tmp_path, chat_template=template))
        prompt = tokenizer.decode(tokenizer.encode_prompt("Hello", "Step by step.\n<think>"))
        assert prompt == f"HelloA: {opening}\nStep by step.\n" + "<think>" * (not opening)


LFS, DIGITS = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 7\n", '{"x": ' + "9" * 5000 + "}"
BAD_SPLIT = {"type": "Split", "pattern": {"Regex": "("}, "behavior": "Isolated", "invert": False}
BROKEN = [  # file, and contents of it that are refused; test_bad_input.py has more
    (TOKENIZER, [LFS, b"\xff\xfe", "null", DIGITS, {}, {**TINY, "model": None}, {**TINY, "pre_tokenizer": BAD_SPLIT}]),
    (TOKENIZER, [with_model(vocab={"a": -1}), with_model(merges=["q q q"]), with_model(merges=[["never", "seen"]])]),
    (TOKENIZER, [with_model(continuing_subword_prefix="(((")]),  # Rust panics there: no Exception in Python
    (SETTINGS, ["null", {"chat_template": "x", "eos_token": "</s>"}]),
    (SETTINGS, [{"chat_template": template} for template in (5, RAG, [], [{"name": "default"}])]),
    (GENERATION, ["{,}", *({"eos_token_id": i} for i in (388, -1, True, "387", 1.0, [[387]], {"a": 1}))]),
    ("chat_template.jinja", [b"\x80"]),
]


@pytest.mark.parametrize("row", [(file, content) for file, contents in BROKEN for content in contents])
def test_a_broken_file_is_named_in_one_line(row, tmp_path):
    path = write(tmp_path, dict([row]))
    with pytest.raises(UserError, match=f"^{path}.*({row[0]}|eos_token)") as caught:
        Tokenizer(path)
    assert len(str(caught.value)) < 1000


HOSTILE = [  # out of the sandbox: without it these would render the question as well
    "''.__class__.__mro__[1].__subclasses__()", "lipsum.__globals__['os'].system('true')",
    "(''|attr('__class__')).mro()", "''['__class__']['__base__']", "cycler.__init__.__globals__.os",
    "'{0.__class__.__mro__}'.format('')", "raise_exception.__globals__.jinja2", "range(10**12) | list",
    "messages.append(1)", "messages[0].update(role='system')", "messages[0].__setitem__('role', 1)",
    # or into a traceback: what is wrong, nested too deep, too long, no text
    "(" * 3000 + "1" + ")" * 3000, "1 / 0", "messages[0].content + 1", "messages[7].content", "x | nothing",
    "messages[0].text.strip()", "messages | map('nothing') | list", "'text of many words' | truncate(1)",
    "messages | tojson(indent=messages)", "open('x').read()", "9 ** 99999", "'\\ud800'", "\ud800",
    "raise_exception('roles must alternate\\n\\x1b[31m' + 'x' * 9999)",
    "x }}{% for i in range(100001) %}x{% endfor %}{{ x", "x }}{% macro f() %}{{ f() }}{% endmacro %}{{ f()",
    *("x }}" + statement + "{{ x" for statement in ("{% if x %}", "{% for i in [1] %}" * 25 + "{% endfor %}" * 25,
     "{% generation %}x", "{% for %}", "{% include '/etc/passwd' %}", "{% import 'os' as os %}",
     "{% " + "x" * 9999 + " %}")),
]  # fmt: skip
WITHOUT_QUESTION = ["{{ messages[0].role }}", "{{ messages[0].content | upper }}", "{{ messages[1:] }}", "hi"]


@pytest.mark.parametrize("template", [*(f"{{{{ {text} }}}}{YES}" for text in HOSTILE), *WITHOUT_QUESTION])
def test_a_hostile_template_is_one_clear_line(template, tmp_path):
    path = write(tmp_path, chat_template=template)
    with pytest.raises(UserError, match=f"^{path}: .*chat template") as caught:
        Tokenizer(path).encode_prompt("Hello", "<think>")
    assert len(str(caught.value)) < 1000
