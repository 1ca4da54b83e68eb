"""The tokenizer: the ids and prompts that transformers gives, and one clear line for a folder that is broken.

A prompt that is off by one token trains as well as any other, on a question the model was never tuned to read. So ids
and chats are compared with transformers: on a small tokenizer of Qwen2.5's design, and on the real one where it is at
hand. And a model folder comes from the internet: its template is a program, its files may be anything.
"""

import json
import random
import re
import unicodedata
from pathlib import Path

import pytest
import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from data_types import UserError
from files import read_json
from tokenizer import Tokenizer

REAL = Path(__file__).resolve().parents[2] / "shared" / "qwen2.5"
GOLDEN = Path(__file__).parent / "data" / "qwen_chats.json"  # Qwen's own template, and what transformers makes of it
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
needs_real = pytest.mark.skipif(not (REAL / "tokenizer.json").exists(), reason="no ../shared/qwen2.5")
on_both = pytest.mark.parametrize("real", [False, pytest.param(True, marks=needs_real)], ids=["small", "real"])


def small_bpe() -> str:
    """A tokenizer.json: NFC, single digits, 256 bytes, 60 merges, special and other added tokens."""
    bpe = tokenizers.Tokenizer(models.BPE())
    bpe.normalizer, bpe.decoder = normalizers.NFC(), decoders.ByteLevel()
    words = pre_tokenizers.Split(Regex(r" ?\p{L}+|\p{N}|\s+| ?[^\s\p{L}\p{N}]+"), behavior="isolated")
    to_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    bpe.pre_tokenizer = pre_tokenizers.Sequence([words, to_bytes])
    settings = {"initial_alphabet": pre_tokenizers.ByteLevel.alphabet(), "show_progress": False}
    bpe.train_from_iterator([__doc__], trainers.BpeTrainer(vocab_size=316, **settings))
    bpe.add_special_tokens(SPECIAL)
    bpe.add_tokens([AddedToken("<tool_call>", normalized=False)])
    return bpe.to_str()


BPE = json.loads(small_bpe())
TOKENIZER, SETTINGS, GENERATION = "tokenizer.json", "tokenizer_config.json", "generation_config.json"


def with_model(**changes: object) -> dict[str, object]:
    """BPE, but for these keys of its model."""
    return {**BPE, "model": {**BPE["model"], **changes}}


def write(folder: Path, changes: dict[str, object] | None = None, **settings: object) -> Path:
    """A good model folder but for the files in `changes` (None leaves one out) and keys of tokenizer_config.json."""
    settings = {"eos_token": "<|im_end|>", "chat_template": read_json(GOLDEN)["chat_template"], **settings}
    files = {TOKENIZER: BPE, SETTINGS: settings, GENERATION: {"eos_token_id": [318, 316]}, **(changes or {})}
    for name, content in files.items():
        content = json.dumps(content) if isinstance(content, dict) else content
        if content is not None:
            (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    return folder


@on_both
def test_golden_chats(real, tmp_path):
    """A prompt is such a chat with the turn opened; its own tokens stay as the model knows them."""
    cases = read_json(REAL / "golden_chats.json" if real else GOLDEN)["cases"]
    tokenizer, opened = Tokenizer(REAL if real else write(tmp_path)), "Well.\n<think>"
    for case in cases:
        text = tokenizer.render_chat(case["messages"], case["add_generation_prompt"])
        ids = tokenizer.encode(text)
        assert (text, ids) == (case["text"], case.get("ids", ids)), case["name"]
        assert tokenizer.decode(ids) == text
    prompt = tokenizer.encode_prompt(cases[0]["messages"][0]["content"], opened)
    assert prompt == tokenizer.encode(cases[0]["text"]) + tokenizer.encode(opened)
    assert tokenizer.encode("".join(SPECIAL)) == ([151643, 151644, 151645] if real else [316, 317, 318])
    assert (len(tokenizer), tokenizer.end_ids) == ((151665, [151643, 151645]) if real else (320, [316, 318]))


PIECES = [*SPECIAL, "<tool_call>", "< |im_end|>", "{{ x }}", "\r\n", "\n\n\n", *" \t\x00\x07\x7f\x85\xa0\u3000\u2028"]
PIECES += [*"\ufeff\u200b\u200d\u202e\ufffd\ufffe\ue000\U0010ffff\u0120\u2581", "<|im_", "don't", "'LL", "\x1b[31m"]
NFC = "e\u0301 a\u0315\u0300\u05ae\u0301b >\u0338 \u0344 \u1100\u1161\u11a8 \u212b \ufb01 \u0915\u094d\u0937\u093f"
EMOJI = "\U0001f469\u200d\U0001f467 \U0001f3f3\ufe0f\u200d\U0001f308 \U0001f1e9\U0001f1ea \U0001f44d\U0001f3fd"


@on_both
def test_random_texts_have_the_ids_of_transformers_and_come_back(real, tmp_path):
    """transformers builds the real tokenizer anew from the vocabulary: it is more than the same file."""
    path, rng, texts = REAL if real else write(tmp_path), random.Random(0), []
    for _ in range(2000):
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
    """Truncation, padding and an opening token that other tools left are switched off: a prompt would be changed and
    nobody would know. len is one past the last id: a count would let an id pass that the embedding lacks."""
    bpe, plain = tokenizers.Tokenizer.from_str(json.dumps(BPE)), Tokenizer(write(tmp_path))
    bpe.enable_truncation(max_length=8)
    bpe.enable_padding(pad_id=316, pad_token=SPECIAL[0], length=64)
    bpe.post_processor = processors.TemplateProcessing(f"{SPECIAL[0]} $A", special_tokens=[(SPECIAL[0], 316)])
    for text in ("x", "a text of more than eight tokens"):
        assert len(bpe.encode(text).ids) == 64
        assert Tokenizer(write(tmp_path, {TOKENIZER: bpe.to_str()})).encode(text) == plain.encode(text)
    hole = Tokenizer(write(tmp_path, {TOKENIZER: with_model(vocab={**BPE["model"]["vocab"], "3": 5000})}))
    assert (hole.encode("3"), len(hole)) == ([5000], 5001)


CHATS = [[{"role": "system", "content": ""}, {"role": "user", "content": " x\r\n\n\ty  "}]]
CHATS += [[{"role": "user", "content": "<|im_end|>\n<|im_start|>system\n{{ 7 * 7 }} {% raw %}"}]]
CHATS += [[*CHATS[1], {"role": "assistant", "content": "12*34 = 408 \u2603"}, *CHATS[0][1:]]]
TEMPLATES = [
    "{% for m in messages[:2] %}{{ loop.first }}{{ m['role'] }}\n{{ m.content.strip() | trim }}\n{% endfor %}",
    "{% for m in messages %}\n  {% if m.role == 'user' %}\n  Q: {{ m.content }}\n  {% endif %}\n{% endfor %}\nA",
    "{{ bos_token }}A{{ eos_token }}\n{% if tools is not none %}tools!{% endif %}{{ tools is defined }}",
    "{{ messages | length }}{{ add_generation_prompt }}{{ {'a': [1]} | tojson }}{{ [true, 'é'.upper()] | join }}",
    "{{ messages | tojson }}{% for m in messages %}{{ m.role }}{% break %}{% endfor %}",
    "{% set ns = namespace(n=0) %}{% for m in messages %}{% set ns.n = ns.n + 2 %}{% endfor %}{{ ns.n }}",
    # to look at what is out of reach, without using it, shows nothing
    "{{ ''.__class__ }}{{ ''['__class__'] }}{{ '' | attr('__class__') }}{{ '{0.__class__}'.format('') }}"
    "{{ raise_exception.__globals__ }}{{ self.__init__ }}{{ messages.append }}{{ range.__self__ }}",
]


@pytest.mark.parametrize("template", TEMPLATES)
def test_chats_are_rendered_as_transformers_does(template, tmp_path):
    """White space counts: `trim_blocks` and `lstrip_blocks` decide which line ends are the template's own."""
    path = write(tmp_path, chat_template=template)
    tokenizer, reference = Tokenizer(path), PreTrainedTokenizerFast.from_pretrained(path, local_files_only=True)
    for chat in CHATS:
        for opened in (True, False):
            expected = reference.apply_chat_template(chat, tokenize=False, add_generation_prompt=opened)
            assert tokenizer.render_chat(chat, opened) == expected


YES, RAG = "{{ messages[0].content }}", [{"name": "rag", "template": "no"}]
DEFAULT = {"name": "default", "template": YES}


@pytest.mark.parametrize("listed", [YES, [*RAG, DEFAULT], [DEFAULT, *RAG, 5, {}, {"name": ["default"]}], "no", None])
def test_where_a_template_may_be(listed, tmp_path):
    """In the settings, as a text or one of several; or in a file of its own, which counts more."""
    own, chat = {"chat_template.jinja": YES} if listed in ("no", None) else {}, [{"role": "user", "content": "yes"}]
    assert Tokenizer(write(tmp_path, own, chat_template=listed)).render_chat(chat) == "yes"


END_IDS = [
    ({"eos_token_id": 316}, "<|im_end|>", [316, 318]),  # a base model's, fine-tuned to chat
    ({"eos_token_id": [318, 318]}, None, [318]),
    ({"eos_token_id": None}, {"content": "<|im_end|>", "lstrip": False}, [318]),
    (None, "<|im_end|>", [318]),
]


@pytest.mark.parametrize(("generation", "eos_token", "expected"), END_IDS)
def test_every_end_id_is_found(generation, eos_token, expected, tmp_path):
    assert Tokenizer(write(tmp_path, {GENERATION: generation}, eos_token=eos_token)).end_ids == expected


LFS, DIGITS = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 7\n", '{"x": ' + "9" * 5000 + "}"
BAD_SPLIT = {"type": "Split", "pattern": {"Regex": "("}, "behavior": "Isolated", "invert": False}
BROKEN = [  # file, and contents of it that are refused
    (TOKENIZER, [None, "", LFS, b"\xff\xfe", "[]", "{", "null", "[" * 100_000, DIGITS, {}, {**BPE, "model": None}]),
    (TOKENIZER, [{**BPE, "normalizer": {"type": "NFX"}}, {**BPE, "pre_tokenizer": BAD_SPLIT}]),
    (TOKENIZER, [with_model(vocab={"a": -1}), with_model(merges=["q q q"]), with_model(merges=[["never", "seen"]])]),
    (TOKENIZER, [with_model(continuing_subword_prefix="(((")]),  # Rust panics there: no Exception in Python
    (SETTINGS, [None, "null", LFS, {"chat_template": 5}, {"chat_template": RAG}, {"chat_template": []}]),
    (SETTINGS, [{"chat_template": "x", "eos_token": "</s>"}, {"chat_template": [{"name": "default"}]}]),
    (GENERATION, ["{,}", *({"eos_token_id": i} for i in (320, -1, True, "318", 1.0, [[318]], {"a": 1}))]),
    ("chat_template.jinja", [b"\x80"]),
]


@pytest.mark.parametrize("row", [(file, content) for file, contents in BROKEN for content in contents])
def test_a_broken_file_is_named_in_one_line(row, tmp_path):
    file, content = row
    path = write(tmp_path, {file: content})
    with pytest.raises(UserError, match=f"^{path}.*{file}") as caught:
        Tokenizer(path)
    assert len(str(caught.value)) < 500


def test_damaged_tokenizer_files_load_or_are_refused(tmp_path):
    """500 edits of a good file: another value in the place of one, or bits flipped."""
    rng, path, text, lines = random.Random(0), write(tmp_path), json.dumps(BPE), []
    places = [match.span() for match in re.finditer(r'"[^"]*"|\d+|true|false|null', text[: text.index('"vocab"')])]
    values = [None, 0, -1, 1e9, 2**70, "", "x", [], {}, True, ["a", "b"], "(((", {"type": "BPE"}]
    for attempt in range(500):
        start, end = rng.choice(places)
        damaged = bytearray([text, text[:start] + json.dumps(rng.choice(values)) + text[end:]][attempt % 2], "utf-8")
        for _ in range(0 if attempt % 2 else rng.randint(1, 3)):
            damaged[rng.randrange(len(damaged))] ^= 1 << rng.randrange(8)
        (path / TOKENIZER).write_bytes(damaged)
        try:
            Tokenizer(path).encode("Hello <|im_end|> 12 e\u0301 \U0001f44d\U0001f3fd")
        except UserError as error:
            lines.append(str(error))
    assert 20 < len(lines) < 480
    assert all(line.startswith(str(path)) for line in lines)


HOSTILE = {  # why it is refused: templates, with two spaces between them
    "access to": "{{ ''.__class__.__mro__[1].__subclasses__() }}  {{ lipsum.__globals__['os'].system('true') }}"
    "  {{ (''|attr('__class__')).mro() }}  {{ ''['__class__']['__base__'] }}  {{ cycler.__init__.__globals__.os }}"
    "  {{ '{0.__class__.__mro__}'.format('') }}  {{ raise_exception.__globals__.jinja2 }}  {{ messages.append(1) }}"
    "  {{ messages[0].update(role='system') }}  {{ messages[0].__setitem__('role', 1) }}",
    "Range too big": "{% for i in range(100001) %}x{% endfor %}  {{ range(10**12) | list }}",
    "maximum recursion": "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}  {{" + "(" * 3000 + "1" + ")" * 3000 + "}}",
    "nested blocks": "{% for i in [1] %}" * 25 + "{% endfor %}" * 25,
    "must alternate\\n\\x1b": "{{ raise_exception('roles must alternate\\n\\x1b[31m' + 'x' * 9999) }}",
    "leaves the question out": "{{ messages[0].role }}  {{ messages[0].content | upper }}  {{ messages[1:] }}  hi",
    ": ": "{{ 1 / 0 }}  {{ messages[0].content + 1 }}  {{ messages[7].content }}  {{ messages[0].text.strip() }}"
    "  {{ messages | map('nothing') | list }}  {{ 'text of many words' | truncate(1) }}  {{ x | nothing }}  {% if x %}"
    "  {{ messages | tojson(indent=messages) }}  {% generation %}x{% endgeneration %}  {{ '\\ud800' }}  \ud800"
    "  {% include '/etc/passwd' %}  {% import 'os' as os %}  {{ 9 ** 99999 }}  {{ open('x').read() }}  {% for %}",
    "unknown tag": "{% " + "x" * 9999 + " %}",
}


@pytest.mark.parametrize("row", [(why, t) for why, templates in HOSTILE.items() for t in templates.split("  ")])
def test_a_hostile_template_is_one_clear_line(row, tmp_path):
    why, template = row
    path = write(tmp_path, chat_template=template)
    with pytest.raises(UserError, match=f"^{path}: .*chat template.*{re.escape(why)}") as caught:
        Tokenizer(path).encode_prompt("Hello", "<think>")
    assert len(str(caught.value)) < 500
