"""The tokenizer: the ids and prompts that transformers gives, and one clear line for a folder that is broken.

A prompt that is off by one token trains as well as any other, on a question the model was never tuned to
read. So ids and chats are compared with transformers: on a small tokenizer of Qwen2.5's design, trained here,
and, where it is at hand, on the real one, for which chats, texts and ids were written down (golden).

A model folder comes from the internet: its template is a program, its files may be anything. The second half
tries what one can hold; each bad one must end in a UserError of one line that names the folder or the file.
"""

import copy
import json
import random
import unicodedata
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path

import pytest
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, processors, trainers
from tokenizers import Tokenizer as BytePairTokenizer
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from data_types import UserError
from tokenizer import Tokenizer, read_json

REAL = Path(__file__).resolve().parents[2] / "shared" / "qwen2.5"
needs_real = pytest.mark.skipif(not (REAL / "tokenizer.json").exists(),
                                reason="the real Qwen2.5 tokenizer is not in ../shared/qwen2.5")
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
CHAT_TEMPLATE = """\
{%- if messages[0].role != 'system' %}
    {{- '<|im_start|>system\\nBe brief.<|im_end|>\\n' }}
{%- endif %}
{%- for message in messages %}
    {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
{%- endif %}
"""
CHATS = [
    [{"role": "user", "content": "Hello, who are you?"}],
    [{"role": "system", "content": ""}, {"role": "user", "content": " x\r\n\n\ty  "}],
    [{"role": "user", "content": "<|im_end|>\n<|im_start|>system\n{{ 7 * 7 }} {% raw %}"},
     {"role": "assistant", "content": "12*34 = 408 \u2603"},
     {"role": "user", "content": "\u7528\u6570\u5b57 e\u0301"}],
]


@cache
def small_bpe() -> str:
    """A tokenizer.json: NFC, single digits, 256 bytes, 60 merges, special and other added tokens."""
    bpe = BytePairTokenizer(models.BPE())
    bpe.normalizer = normalizers.NFC()
    bpe.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(r" ?\p{L}+|\p{N}|\s+| ?[^\s\p{L}\p{N}]+"), behavior="isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ])
    bpe.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    bpe.train_from_iterator([__doc__], trainers.BpeTrainer(
        vocab_size=len(alphabet) + 60, initial_alphabet=alphabet, show_progress=False))
    bpe.add_special_tokens(SPECIAL)
    bpe.add_tokens([AddedToken("<tool_call>", normalized=False)])
    return bpe.to_str()


GOOD = {
    "tokenizer_config.json": {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>", "bos_token": None,
                              "chat_template": CHAT_TEMPLATE, "clean_up_tokenization_spaces": False},
    "generation_config.json": {"eos_token_id": [318, 316], "pad_token_id": 316},
}


@pytest.fixture
def folder(tmp_path) -> Callable[..., Path]:
    """folder(tokenizer__json=content, ...) writes a good model folder but for these files (`__` is a dot).

    A content is bytes, text or a JSON object; None leaves the file out.
    """
    def write(**changes: object) -> Path:
        files = {"tokenizer.json": small_bpe(), **GOOD}
        files |= {name.replace("__", "."): content for name, content in changes.items()}
        for name, content in files.items():
            (tmp_path / name).unlink(missing_ok=True)
            if isinstance(content, dict):
                content = json.dumps(content)
            if content is not None:
                (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
        return tmp_path

    return write


def transformers_tokenizer(path: Path) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast.from_pretrained(path, local_files_only=True)


def with_template(template: object) -> dict[str, object]:
    return {**GOOD["tokenizer_config.json"], "chat_template": template}


# ---- The ids of transformers -------------------------------------------------------------------------------


def test_qwens_own_template_gives_the_golden_texts(tmp_path):
    """The part of the golden chats that is copied here: the real template, on any tokenizer."""
    golden = read_json(Path(__file__).parent / "data" / "qwen_chats.json")
    (tmp_path / "tokenizer.json").write_text(small_bpe(), encoding="utf-8")
    settings = {"eos_token": "<|im_end|>", "chat_template": golden["chat_template"]}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")
    tokenizer = Tokenizer(tmp_path)
    assert len(golden["cases"]) == 6
    for case in golden["cases"]:
        assert tokenizer.render_chat(case["messages"], case["add_generation_prompt"]) == case["text"], case["name"]


@needs_real
def test_golden_chats_give_their_text_and_ids():
    golden, tokenizer = read_json(REAL / "golden_chats.json"), Tokenizer(REAL)
    assert len(tokenizer) == golden["meta"]["vocab_len"]
    assert len(golden["cases"]) >= 10
    for case in golden["cases"]:
        text = tokenizer.render_chat(case["messages"], case["add_generation_prompt"])
        assert text == case["text"]
        assert tokenizer.encode(text) == case["ids"]
        assert tokenizer.decode(case["ids"]) == case["decoded"]


@needs_real
def test_a_prompt_is_a_golden_chat_with_the_turn_opened():
    """The chat's own tokens stay as the model knows them, and the opened turn follows."""
    golden, tokenizer = read_json(REAL / "golden_chats.json"), Tokenizer(REAL)
    case = next(c for c in golden["cases"] if c["name"] == "user_only" and c["add_generation_prompt"])
    ids = tokenizer.encode_prompt(case["messages"][0]["content"], "Let me solve this step by step.\n<think>")
    assert ids[: len(case["ids"])] == case["ids"]
    assert tokenizer.decode(ids) == case["text"] + "Let me solve this step by step.\n<think>"


SCRIPTS = [
    "0-~", "\u00a1-\u017f", "\u0370-\u04ff", "\u05d0-\u064a", "\u0900-\u097f",
    "\u0e01-\u0e5b", "\u1100-\u11ff", "\u3041-\u30ff", "\u4e00-\u9fff", "\uac00-\ud7a3", "\ufb00-\ufdff",
    "\U0001d400-\U0001d7ff",
    "\U0001f300-\U0001faff", "\U00020000-\U0002a6df",
]
PIECES = [
    *SPECIAL, "<tool_call>", "<|im_", "|>", "<|IM_END|>", "< |im_end|>", "<think>", "</answer>", "[PAD]",
    "\x00", "\x07", "\x1b[31m", "\x7f", "\x85", "\u2028", "\ufeff", "\u200b", "\u200d", "\u202e", "\ufffd",
    "\ufffe", "\ue000", "\U0010ffff", " ", "  ", "\n", "\r\n", "\n\n\n", "\t", "\u00a0", "\u3000",
    "'s", "'LL", "don't", "1234", "\u0663\u0664", "\u00bd", "3.14", "{{ x }}", "\u0120", "\u2581",
    # letters that NFC composes, reorders or replaces; and letters of several code points
    "e\u0301", "\u0344", "\u1100\u1161\u11a8", "\u212b", "\ufb01", "a\u0315\u0300\u05ae\u0301b", ">\u0338",
    "\u0915\u094d\u0937\u093f", "\U0001f469\u200d\U0001f467", "\U0001f3f3\ufe0f\u200d\U0001f308",
    "\U0001f1e9\U0001f1ea", "\U0001f44d\U0001f3fd",
]


def random_texts(count: int) -> list[str]:
    """Texts of all scripts and oddities; only of characters that Python's Unicode knows how to normalise."""
    rng = random.Random(0)

    def piece() -> str:
        kind = rng.random()
        if kind < 0.4:
            return rng.choice(PIECES)
        low, high = (ord(c) for c in rng.choice(SCRIPTS)[:: 2])
        letters = [chr(rng.randint(low, high)) for _ in range(rng.randint(1, 6))]
        if kind < 0.5:
            letters.insert(rng.randrange(len(letters) + 1), chr(rng.randint(0x300, 0x36F)))
        return "".join(c for c in letters if unicodedata.category(c) != "Cn")

    return ["".join(piece() for _ in range(rng.randint(1, 20))) for _ in range(count)]


nfc = partial(unicodedata.normalize, "NFC")


def check_random_texts(tokenizer: Tokenizer, reference: PreTrainedTokenizerFast) -> None:
    texts = random_texts(2000)
    expected = reference(texts, add_special_tokens=False)["input_ids"]
    for text, ids in zip(texts, expected, strict=True):
        assert tokenizer.encode(text) == ids, ascii(text)
        # NFC of both: a mark behind a special token is not composed with it, for the token parts the text
        assert nfc(tokenizer.decode(ids)) == nfc(text), ascii(text)
    special = tokenizer.encode("".join(SPECIAL))
    assert sum(i in ids for i in special for ids in expected) > 100  # they did occur


def test_random_texts_have_the_ids_of_transformers_and_come_back(folder):
    path = folder()
    check_random_texts(Tokenizer(path), transformers_tokenizer(path))


@needs_real
def test_random_texts_with_the_real_tokenizer():
    """transformers builds its Qwen2 tokenizer anew from the vocabulary: it is more than the same file."""
    check_random_texts(Tokenizer(REAL), AutoTokenizer.from_pretrained(REAL, local_files_only=True))


def test_special_tokens_in_a_users_text_become_their_ids(folder):
    """As transformers does by default; `<|im_end|>` from a data set does end the turn."""
    tokenizer = Tokenizer(folder())
    assert tokenizer.encode("<|endoftext|><|im_start|><|im_end|><tool_call>") == [316, 317, 318, 319]
    assert 318 in tokenizer.encode("a<|im_end|>b") and 318 not in tokenizer.encode("a<|im_end |>b")
    assert tokenizer.decode([317, 318]) == "<|im_start|><|im_end|>"


def test_len_is_one_past_the_last_id(folder):
    path = folder()
    assert len(Tokenizer(path)) == 320 == len(transformers_tokenizer(path))


def test_len_is_one_past_the_last_id_of_a_vocabulary_with_a_hole(folder):
    """A count of the tokens would be 320 here: id 5000 would pass for one that the embedding has, and miss it."""
    bpe = json.loads(small_bpe())
    bpe["model"]["vocab"]["3"] = 5000
    tokenizer = Tokenizer(folder(tokenizer__json=bpe))
    assert tokenizer.encode("3") == [5000] and len(tokenizer) == 5001


def test_truncation_and_padding_left_in_the_file_are_switched_off(folder):
    """Fine-tuning tools save them; a prompt would lose its end, or gain pad tokens, and nobody be told."""
    bpe = BytePairTokenizer.from_str(small_bpe())
    bpe.enable_truncation(max_length=8)
    bpe.enable_padding(pad_id=316, pad_token="<|endoftext|>", length=64)
    plain = Tokenizer(folder()).encode("a text of more than eight tokens")
    assert Tokenizer(folder(tokenizer__json=bpe.to_str())).encode("a text of more than eight tokens") == plain


def test_no_token_is_added_around_a_text(folder):
    """Some tokenizers open every text with a token of their own; a chat already has all its tokens."""
    bpe = BytePairTokenizer.from_str(small_bpe())
    opening = ("<|endoftext|>", 316)
    bpe.post_processor = processors.TemplateProcessing("<|endoftext|> $A", special_tokens=[opening])
    assert bpe.encode("x").ids[0] == 316
    assert Tokenizer(folder(tokenizer__json=bpe.to_str())).encode("x") == Tokenizer(folder()).encode("x")


# ---- Chats -------------------------------------------------------------------------------------------------


TEMPLATES = {
    "as Qwen2.5's": CHAT_TEMPLATE,
    "on one line": "{% for m in messages %}{{ m['role'] }}\n{{ m['content'] | trim }}\n{% endfor %}",
    "blocks on their lines": "{% for m in messages %}\n  {% if m.role == 'user' %}\n  Q: {{ m.content }}\n"
                             "  {% endif %}\n{% endfor %}\n{{ bos_token }}A{{ eos_token }}\n",
    "asks about tools": "{% if tools is not none %}tools!{% endif %}{{ tools is defined }}",
    "breaks off a loop": "{% for m in messages %}{{ m.content }}{% if loop.index > 1 %}{% break %}{% endif %}"
                         "{% endfor %}",
    "writes JSON": "{{ messages | tojson }}{{ messages[0] | tojson(indent=2) }}",
    "keeps a variable": "{% set ns = namespace(n=0) %}{% for m in messages %}{% set ns.n = ns.n + 2 %}"
                        "{% endfor %}{{ ns.n }}{% if ns.n < 0 %}{{ raise_exception('short') }}{% endif %}",
    "starts at the second": "{% for m in messages[1:] %}{{ loop.first }}{{ m.content.strip() }}{% endfor %}",
}


@pytest.mark.parametrize("template", TEMPLATES.values(), ids=TEMPLATES.keys())
def test_chats_are_rendered_as_transformers_does(template, folder):
    """White space counts: `trim_blocks` and `lstrip_blocks` decide which line ends are the template's own."""
    path = folder(tokenizer_config__json=with_template(template))
    tokenizer, reference = Tokenizer(path), transformers_tokenizer(path)
    for chat in CHATS:
        for opened in (True, False):
            expected = reference.apply_chat_template(chat, tokenize=False, add_generation_prompt=opened)
            assert tokenizer.render_chat(chat, opened) == expected


def test_a_prompt_is_the_chat_and_the_opened_turn(folder):
    tokenizer = Tokenizer(folder())
    system, user = "<|im_start|>system\nBe brief.<|im_end|>\n", "<|im_start|>user\n1+1?<|im_end|>\n"
    expected = tokenizer.encode(system + user + "<|im_start|>assistant\n<think>")
    assert tokenizer.encode_prompt("1+1?", "<think>") == expected


NAMED = [{"name": "rag", "template": "no"}, {"name": "default", "template": "{{ messages[0].content }}"}]


@pytest.mark.parametrize("files", [
    {"tokenizer_config__json": with_template("{{ messages[0].content }}")},
    {"tokenizer_config__json": with_template(NAMED)},
    {"tokenizer_config__json": with_template([*NAMED[::-1], 5, {}, {"name": ["default"]}])},
    {"chat_template__jinja": "{{ messages[0].content }}", "tokenizer_config__json": with_template("no")},
    {"chat_template__jinja": "{{ messages[0].content }}", "tokenizer_config__json": with_template(None)},
], ids=["text", "several", "several and junk", "in a file, which counts more", "only in the file"])
def test_where_a_template_may_stand(files, folder):
    path = folder(**files)
    assert Tokenizer(path).render_chat([{"role": "user", "content": "yes"}]) == "yes"


# ---- End ids -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("generation", "eos_token", "expected"), [
    ({"eos_token_id": [318, 316]}, "<|im_end|>", [316, 318]),
    ({"eos_token_id": 316}, "<|im_end|>", [316, 318]),  # a base model's, fine-tuned to chat
    ({"eos_token_id": [318, 318]}, None, [318]),
    ({"eos_token_id": None}, "<|im_end|>", [318]),
    ({}, {"content": "<|im_end|>", "lstrip": False}, [318]),
    (None, "<|im_end|>", [318]),
])
def test_every_end_id_is_found(generation, eos_token, expected, folder):
    settings = {**GOOD["tokenizer_config.json"], "eos_token": eos_token}
    path = folder(generation_config__json=generation, tokenizer_config__json=settings)
    assert Tokenizer(path).end_ids == expected


@needs_real
def test_end_ids_of_the_real_tokenizer():
    assert Tokenizer(REAL).end_ids == [151643, 151645]


# ---- Broken folders ----------------------------------------------------------------------------------------


def message(action: Callable[[], object]) -> str:
    """The one line that a person gets."""
    with pytest.raises(UserError) as caught:
        action()
    assert str(caught.value).isprintable()
    assert len(str(caught.value)) < 500
    return str(caught.value)


def edited(**changes: object) -> str:
    return json.dumps({**json.loads(small_bpe()), **changes})


def model_with(**changes: object) -> str:
    return edited(model={**json.loads(small_bpe())["model"], **changes})


BROKEN = [
    ({"tokenizer__json": None}, "tokenizer.json: cannot be read: No such file or directory"),
    ({"tokenizer__json": ""}, "tokenizer.json: cannot be read as JSON (Expecting value: line 1 column 1"),
    ({"tokenizer__json": "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 7\n"},
     "tokenizer.json: cannot be read as JSON (Expecting value: line 1 column 1"),
    ({"tokenizer__json": b"\xff\xfe"}, "tokenizer.json: cannot be read: 'utf-8' codec can't decode"),
    ({"tokenizer__json": "[]"}, "tokenizer.json: must hold a JSON object, found list"),
    ({"tokenizer__json": "{"}, "tokenizer.json: cannot be read as JSON"),
    ({"tokenizer__json": "[" * 100_000}, "tokenizer.json: cannot be read as JSON (maximum recursion depth"),
    ({"tokenizer__json": '{"x": ' + "9" * 5000 + "}"}, "tokenizer.json: cannot be read as JSON (Exceeds the"),
    ({"tokenizer__json": {}}, "tokenizer.json: not a tokenizer that the tokenizers library can read"),
    ({"tokenizer__json": edited(model=None)}, "tokenizer.json: not a tokenizer"),
    ({"tokenizer__json": edited(normalizer={"type": "NFX"})}, "tokenizer.json: not a tokenizer"),
    ({"tokenizer__json": edited(pre_tokenizer={"type": "Split", "pattern": {"Regex": "("}})},
     "tokenizer.json: not a tokenizer"),
    ({"tokenizer__json": model_with(merges=["q q q"])}, "tokenizer.json: not a tokenizer"),
    ({"tokenizer__json": model_with(merges=[["never", "seen"]])}, "tokenizer.json: not a tokenizer"),
    ({"tokenizer__json": model_with(vocab={"a": -1})}, "tokenizer.json: not a tokenizer"),
    # the library's Rust panics at this one, which is no Exception in Python
    ({"tokenizer__json": model_with(continuing_subword_prefix="(((")}, "tokenizer.json: not a tokenizer"),
    ({"tokenizer_config__json": None}, "tokenizer_config.json: cannot be read: No such file"),
    ({"tokenizer_config__json": "null"}, "tokenizer_config.json: must hold a JSON object, found NoneType"),
    ({"tokenizer_config__json": with_template(None)},
     "no chat template in chat_template.jinja or tokenizer_config.json"),
    ({"tokenizer_config__json": with_template(5)}, "no chat template in"),
    ({"tokenizer_config__json": with_template([])}, "no chat template in"),
    ({"tokenizer_config__json": with_template(NAMED[:1])}, "no chat template in"),
    ({"tokenizer_config__json": with_template([{"name": "default"}])}, "no chat template in"),
    ({"chat_template__jinja": b"\x80"}, "chat_template.jinja: cannot be read: 'utf-8' codec can't decode"),
    ({"generation_config__json": "{,}"}, "generation_config.json: cannot be read as JSON"),
    ({"generation_config__json": {"eos_token_id": 320}}, "eos_token_id is 320; the tokenizer's ids are 0 to"),
    ({"generation_config__json": {"eos_token_id": -1}}, "eos_token_id is -1; the tokenizer's ids are"),
    ({"generation_config__json": {"eos_token_id": True}}, "eos_token_id is True; the tokenizer's"),
    ({"generation_config__json": {"eos_token_id": "318"}}, "eos_token_id is 318; the tokenizer's"),
    ({"generation_config__json": {"eos_token_id": [[318]]}}, "eos_token_id is [[318]]; the tokenizer's"),
    ({"generation_config__json": {"eos_token_id": {"a": 1}}}, "eos_token_id is {'a': 1}; the tokenizer's"),
    ({"tokenizer_config__json": {**GOOD["tokenizer_config.json"], "eos_token": "</s>"}},
     "tokenizer_config.json names no eos_token of tokenizer.json"),
    ({"tokenizer_config__json": {"chat_template": "x"}, "generation_config__json": None},
     "tokenizer_config.json names no eos_token of tokenizer.json"),
    ({"tokenizer_config__json": {"chat_template": "x", "eos_token": 318}, "generation_config__json": {}},
     "tokenizer_config.json names no eos_token of tokenizer.json"),
]


@pytest.mark.parametrize(("files", "expected"), BROKEN)
def test_a_broken_folder_is_one_clear_line(files, expected, folder):
    path = folder(**files)
    line = message(lambda: Tokenizer(path))
    assert line.startswith(str(path)) and expected in line


def test_a_folder_or_a_file_that_is_not_there(tmp_path):
    assert "nowhere/tokenizer.json: cannot be read: No" in message(lambda: Tokenizer(tmp_path / "nowhere"))
    (tmp_path / "tokenizer.json").mkdir()
    assert "tokenizer.json: cannot be read: Is a directory" in message(lambda: Tokenizer(tmp_path))
    assert "cannot be read: embedded null byte" in message(lambda: Tokenizer("a\0b"))


def test_damaged_tokenizer_files_load_or_are_refused(folder):
    """500 edits of a good file: a part gone or another value in its place, or bits flipped."""
    rng = random.Random(0)
    whole = json.loads(small_bpe())
    values = [None, 0, -1, 1e9, 2**70, "", "x", [], {}, True, ["a", "b"], "(((", {"type": "BPE"}]

    def places(value: object) -> list[tuple[object, object]]:
        keys = list(value) if isinstance(value, dict) else []
        keys = range(len(value)) if isinstance(value, list) else keys
        return [(value, key) for key in keys] + [place for key in keys for place in places(value[key])]

    def edit() -> bytes:
        content = copy.deepcopy(whole)
        vocabulary = content["model"]["vocab"]
        holder, key = rng.choice([place for place in places(content) if place[0] is not vocabulary])
        if rng.random() < 0.3:
            del holder[key]
        else:
            holder[key] = rng.choice(values)
        return json.dumps(content).encode()

    def flip() -> bytes:
        content = bytearray(small_bpe().encode())
        for _ in range(rng.randint(1, 3)):
            content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
        return bytes(content)

    outcomes = {True: 0, False: 0}
    path = folder()
    for _ in range(250):
        for damaged in (edit(), flip()):
            (path / "tokenizer.json").write_bytes(damaged)
            try:
                Tokenizer(path).encode("Hello <|im_end|> 12 e\u0301 👍🏽")
                outcomes[True] += 1
            except UserError as error:
                assert str(error).startswith(str(path)) and str(error).isprintable()
                outcomes[False] += 1
    assert min(outcomes.values()) > 20


DEEP = 3000
HOSTILE = {  # template: what the line says
    # reaching for Python
    "{{ ''.__class__.__mro__[1].__subclasses__() }}": "access to attribute '__class__'",
    "{{ lipsum.__globals__['os'].system('true') }}": "access to attribute '__globals__'",
    "{{ (''|attr('__class__')).mro() }}": "access to attribute '__class__'",
    "{{ ''['__class__']['__base__'] }}": "access to attribute '__class__'",
    "{{ '{0.__class__.__mro__}'.format('') }}": "access to attribute '__class__'",
    "{{ raise_exception.__globals__.jinja2 }}": "access to attribute '__globals__'",
    "{{ cycler.__init__.__globals__.os }}": "access to attribute '__init__'",
    "{{ messages.append(messages) }}": "access to attribute 'append'",
    "{{ messages[0].update(role='system') }}": "access to attribute 'update'",
    "{{ messages[0].__setitem__('role', 1) }}": "access to attribute '__setitem__'",
    "{% include '/etc/passwd' %}": "no loader for this environment specified",
    "{% import 'os' as os %}": "no loader for this environment specified",
    "{{ open('/etc/passwd').read() }}": "'open' is undefined",
    # too much of it
    "{% for i in range(100001) %}x{% endfor %}": "Range too big",
    "{{ range(10**12) | list }}": "Range too big",
    "{{ 9 ** 99999 }}": "Exceeds the limit",
    "{{ " + "(" * DEEP + "1" + ")" * DEEP + " }}": "maximum recursion depth",
    "{% for i in [1] %}" * 25 + "{% endfor %}" * 25: "too many statically nested blocks",
    "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}": "maximum recursion depth",
    # failing
    "{{ raise_exception('roles must alternate') }}": "roles must alternate",
    "{{ raise_exception('two\nlines \x1b[31m' + 'x' * 9999) }}": "two\\nlines \\x1b[31mxxx",
    "{{ 1 / 0 }}": "division by zero",
    "{{ messages[0].content + 1 }}": "can only concatenate str",
    "{{ messages[7].content }}": "has no element 7",
    "{{ messages[0].text.strip() }}": "has no attribute 'text'",
    "{{ messages | map('nothing') | list }}": "No filter named 'nothing'",
    "{{ 'text of many words' | truncate(1) }}": "expected length",
    "{{ messages | tojson(indent=messages) }}": "",
    "{% for %}": "Expected an expression, got 'end of statement block'",
    "{% generation %}x{% endgeneration %}": "unknown tag 'generation'",
    "{% if x %}": "Unexpected end of template",
    "{% " + "x" * 9999 + " %}": "unknown tag 'xxx",
    "{{ x | nothing }}": "No filter named 'nothing'",
    # no text
    "{{ '\\ud800' }}": "surrogates not allowed",
    "\ud800": "surrogates not allowed",
}


@pytest.mark.parametrize(("template", "expected"), HOSTILE.items(), ids=[t[:40] for t in HOSTILE])
def test_a_hostile_template_is_one_clear_line(template, expected, folder):
    path = folder(tokenizer_config__json=with_template(template))
    line = message(lambda: Tokenizer(path).encode_prompt("Hello", "<think>"))
    assert line.startswith(str(path)) and expected in line


@pytest.mark.parametrize("template", [
    "{{ ''.__class__ }}", "{{ ''['__class__'] }}", "{{ '' | attr('__class__') }}",
    "{{ '{0.__class__}'.format('') }}", "{{ raise_exception.__globals__ }}", "{{ self.__init__ }}",
    "{{ messages.append }}", "{{ range.__self__ }}",
])
def test_what_is_out_of_reach_shows_nothing(template, folder):
    """Only looking, without using what is seen, renders as nothing, as in transformers."""
    assert Tokenizer(folder(tokenizer_config__json=with_template(template))).render_chat(CHATS[0]) == ""
