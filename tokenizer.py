"""Text to token ids and back, and chats to prompts, from a Hugging Face model folder.

The byte-pair encoding itself is the `tokenizers` library reading tokenizer.json. Around it stands what a trainer
needs: the model's own chat template (a jinja2 template that ships with the weights, so it runs in jinja2's sandbox:
a template is data from the internet), and the ids that end an answer.

Left out: truncation, padding and batching (masks come from lengths, see rollout.py), and tool calls in chats.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

import jinja2
from jinja2.sandbox import ImmutableSandboxedEnvironment
from tokenizers import Tokenizer as BytePairTokenizer

from data_types import UserError

TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json")


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file; UserError names the file if it is missing or holds anything else."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path}: file not found; a model folder needs it") from None
    except (OSError, UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        raise UserError(f"{path}: cannot be read as JSON ({error})") from None
    if not isinstance(content, dict):
        raise UserError(f"{path}: must hold a JSON object, found {type(content).__name__}")
    return content


class Tokenizer:
    """The tokenizer of a model folder.

    end_ids: every id that ends an answer; ids from len(self) up stand for no token at all.
    """

    def __init__(self, folder: str | Path) -> None:
        folder = Path(folder)
        path = folder / "tokenizer.json"
        read_json(path)  # names the file when it is missing or broken, which the library does not
        try:
            self._bpe = BytePairTokenizer.from_file(str(path))
        except Exception as error:  # the library raises bare Exception for any malformed content
            raise UserError(f"{path}: not a tokenizer that the tokenizers library can read ({error})") from None
        self._settings = read_json(folder / "tokenizer_config.json")
        self._template = compile_template(chat_template_text(folder, self._settings), folder)
        self.end_ids = self._find_end_ids(folder)

    def __len__(self) -> int:
        return self._bpe.get_vocab_size(with_added_tokens=True)

    def encode(self, text: str) -> list[int]:
        """Token ids of `text`; special tokens written in it become their ids, as in transformers."""
        return self._bpe.encode(text, add_special_tokens=False).ids

    def decode(self, ids: Sequence[int]) -> str:
        """The text of `ids`, special tokens included: what the policy wrote is shown as it is."""
        return self._bpe.decode(list(ids), skip_special_tokens=False)

    def render_chat(self, messages: Sequence[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """The model's own chat template applied to messages such as {"role": "user", "content": "..."}."""
        specials = {name: self._special_token(name) for name in ("bos_token", "eos_token", "pad_token", "unk_token")}
        try:
            return self._template.render(
                messages=list(messages),
                add_generation_prompt=add_generation_prompt,
                **{name: text for name, text in specials.items() if text is not None},
            )
        except (jinja2.TemplateError, TypeError, ValueError, KeyError, ArithmeticError, RecursionError) as error:
            raise UserError(f"the model's chat template fails on a plain chat: {error}") from None

    def encode_prompt(self, question: str, assistant_prefix: str) -> list[int]:
        """Ids of a one-question chat whose assistant turn is already opened with `assistant_prefix`."""
        return self.encode(self.render_chat([{"role": "user", "content": question}]) + assistant_prefix)

    def _special_token(self, name: str) -> str | None:
        token = self._settings.get(name)
        return token.get("content") if isinstance(token, dict) else token

    def _find_end_ids(self, folder: Path) -> list[int]:
        """The ids of generation_config.json's eos_token_id (a number or a list) and the tokenizer's eos_token."""
        path = folder / "generation_config.json"
        listed = read_json(path).get("eos_token_id", []) if path.exists() else []
        ids = set(listed if isinstance(listed, list) else [listed]) - {None}
        if not all(type(i) is int and 0 <= i < len(self) for i in ids):
            raise UserError(f"{path}: eos_token_id {listed} must be ids of the tokenizer, 0 to {len(self) - 1}")
        eos = self._special_token("eos_token")
        if eos is not None and (eos_id := self._bpe.token_to_id(eos)) is not None:
            ids.add(eos_id)
        if not ids:
            raise UserError(f"{folder}: no end token: generation_config.json or tokenizer_config.json must name one")
        return sorted(ids)


def chat_template_text(folder: Path, settings: dict[str, Any]) -> str:
    """The template's source, from chat_template.jinja or from tokenizer_config.json."""
    path = folder / "chat_template.jinja"
    template = path.read_text(encoding="utf-8") if path.exists() else settings.get("chat_template")
    if isinstance(template, list):  # the older form: several named templates
        named = {t.get("name"): t.get("template") for t in template if isinstance(t, dict)}
        template = named.get("default")
    if not isinstance(template, str):
        raise UserError(f"{folder}: no chat template in chat_template.jinja or tokenizer_config.json")
    return template


def compile_template(source: str, folder: Path) -> jinja2.Template:
    """The template in jinja2's sandbox, with the settings and the two helpers that chat templates count on."""

    def raise_exception(message: str) -> NoReturn:
        raise jinja2.TemplateError(message)

    def tojson(value: Any, indent: int | None = None) -> str:
        return json.dumps(value, ensure_ascii=False, indent=indent)

    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
    environment.globals["raise_exception"] = raise_exception
    environment.filters["tojson"] = tojson
    try:
        return environment.from_string(source)
    except jinja2.TemplateError as error:
        raise UserError(f"{folder}: the chat template does not parse: {error}") from None
