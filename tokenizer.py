"""Text to token ids and back, and chats to prompts, from a Hugging Face model folder.

The byte-pair encoding itself is the `tokenizers` library reading tokenizer.json. Around it stands what a
trainer needs: the model's own chat template (a jinja2 template that ships with the weights, so it runs in
jinja2's sandbox: a template is data from the internet), and the ids that end a response.

Left out: truncation, padding and batching (masks come from lengths, see rollout.py), and tools in chats. The
sandbox keeps a template away from all but its own variables; it does not keep one from being slow.
"""

import json
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

import jinja2
from jinja2.sandbox import ImmutableSandboxedEnvironment
from tokenizers import Tokenizer as BytePairTokenizer

from data_types import UserError
from files import read_json, read_text

# vocab.json and merges.txt are the older form of tokenizer.json, kept for other programs
TOKENIZER_FILES = ["tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json"]
TOKENIZER_FILES += ["vocab.json", "merges.txt"]


class Tokenizer:
    """The tokenizer of a model folder.

    end_ids: every id that ends a response; len(self) is one more than the largest id.
    """

    def __init__(self, folder: str | Path) -> None:
        self._folder = Path(folder)
        self._bpe = load_bpe(self._folder / "tokenizer.json")
        self._size = max(self._bpe.get_vocab(with_added_tokens=True).values(), default=-1) + 1
        settings = read_json(self._folder / "tokenizer_config.json")
        named = {key: value for key, value in settings.items() if key.endswith("_token")}
        texts = {key: v.get("content") if isinstance(v, dict) else v for key, v in named.items()}
        self._special_tokens = {key: text for key, text in texts.items() if isinstance(text, str)}
        self._template = compile_template(self._folder, settings)
        self.end_ids = self._find_end_ids()

    def __len__(self) -> int:
        return self._size

    def encode(self, text: str) -> list[int]:
        """Token ids of `text`; special tokens written in it become their ids, as in transformers."""
        return self._bpe.encode(text, add_special_tokens=False).ids

    def decode(self, ids: list[int]) -> str:
        """The text of `ids`, special tokens included: what the policy wrote is shown as it is."""
        return self._bpe.decode(list(ids), skip_special_tokens=False)

    def render_chat(self, messages: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """The model's own chat template applied to messages such as {"role": "user", "content": "..."}."""
        try:  # tools: templates ask whether they are None
            chat = {"messages": messages, "tools": None, "add_generation_prompt": add_generation_prompt}
            text = self._template.render(self._special_tokens, **chat)
            text.encode()  # half of a surrogate pair is no text
        except Exception as error:  # a template is a foreign program, which may raise anything
            raise UserError(f"{self._folder}: the chat template fails: {str(error)[:200]}") from None
        return text

    def encode_prompt(self, question: str, assistant_prefix: str) -> list[int]:
        """Ids of a one-question chat whose assistant turn is already opened with `assistant_prefix`."""
        chat = self.render_chat([{"role": "user", "content": question}])
        if question.strip() not in chat:
            raise UserError(f"{self._folder}: the chat template leaves the question out")
        return self.encode(chat + assistant_prefix)

    def _find_end_ids(self) -> list[int]:
        """The ids in generation_config.json's eos_token_id (one or a list) and of the eos_token."""
        path = self._folder / "generation_config.json"
        listed = read_json(path).get("eos_token_id") if path.exists() else None
        ids = listed if isinstance(listed, list) else [] if listed is None else [listed]
        if not all(type(i) is int and 0 <= i < len(self) for i in ids):
            raise UserError(f"{path}: eos_token_id is {listed}; the tokenizer's ids are 0 to {len(self) - 1}")
        eos = self._special_tokens.get("eos_token")
        eos_ids = [] if eos is None else [self._bpe.token_to_id(eos)]
        if None in eos_ids or not ids + eos_ids:
            raise UserError(f"{self._folder}: tokenizer_config.json names no eos_token of tokenizer.json")
        return sorted({*ids, *eos_ids})


def load_bpe(path: Path) -> BytePairTokenizer:
    """The tokenizer of tokenizer.json, without the truncation and padding that its last user may have set."""
    try:
        bpe = BytePairTokenizer.from_file(str(path))
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # a bare Exception, or a Rust panic, which is not even that
        raise UserError(f"{path}: not a tokenizer that the tokenizers library can read ({error})") from None
    bpe.no_truncation()
    bpe.no_padding()
    return bpe


def compile_template(folder: Path, settings: dict[str, Any]) -> jinja2.Template:
    """The folder's chat template in jinja2's sandbox, with the settings and helpers that templates expect."""
    path = folder / "chat_template.jinja"
    source = read_text(path) if path.exists() else settings.get("chat_template")
    if isinstance(source, list):  # the older form: several named templates
        source = {str(t.get("name")): t.get("template") for t in source if isinstance(t, dict)}.get("default")
    if not isinstance(source, str):
        raise UserError(f"{folder}: no chat template in chat_template.jinja or tokenizer_config.json")

    def raise_exception(message: str) -> NoReturn:
        raise jinja2.TemplateError(message)

    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
    environment.add_extension("jinja2.ext.loopcontrols")
    environment.globals["raise_exception"] = raise_exception
    environment.filters["tojson"] = partial(json.dumps, ensure_ascii=False)  # jinja2's own would escape < and >
    try:
        return environment.from_string(source)
    except Exception as error:  # a TemplateError, or what Python says to a program that is nested too deep
        raise UserError(f"{folder}: bad chat template: {' '.join(str(error).split())[:200]}") from None
