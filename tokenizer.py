"""Text to token ids and back, and chats to prompts, from a Hugging Face model folder.

The byte-pair encoding itself is the `tokenizers` library reading tokenizer.json. Around it stands what a
trainer needs: the model's own chat template (a jinja2 template that ships with the weights, so it runs in
jinja2's sandbox: a template is data from the internet), and the ids that end a response.

Left out: truncation, padding and batching (masks come from lengths, see rollout.py), and tools in chats. The
sandbox keeps a template away from all but its own variables; it does not keep one from being slow.
"""

from contextlib import suppress
from pathlib import Path

from tokenizers import Tokenizer as BytePairTokenizer

from plumbing.files import read_json
from plumbing.model_folder import compile_template
from plumbing.terminal import UserError


class Tokenizer:
    """The tokenizer of a model folder.

    end_ids: every id that ends a response; len(self) is one more than the largest id.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self._bpe = load_bpe(self.folder / "tokenizer.json")
        self._size = max(self._bpe.get_vocab(with_added_tokens=True).values(), default=-1) + 1
        settings = read_json(self.folder / "tokenizer_config.json")
        named = {key: value for key, value in settings.items() if key.endswith("_token")}
        texts = {key: v.get("content") if isinstance(v, dict) else v for key, v in named.items()}
        self._special_tokens = {key: text for key, text in texts.items() if isinstance(text, str)}
        self._template = compile_template(self.folder, settings)
        self.end_ids = self._find_end_ids()

    def __len__(self) -> int:
        return self._size

    def encode(self, text: str) -> list[int]:
        """Token ids of `text`; special tokens written in it become their ids, as in transformers."""
        return self._bpe.encode(text, add_special_tokens=False).ids

    def decode(self, ids: list[int]) -> str:
        """The text of `ids`, special tokens included: what the policy wrote is shown as it is."""
        return self._bpe.decode(list(ids), skip_special_tokens=False)

    def render_chat(self, messages: list[dict[str, str]], open_turn: bool = True) -> str:
        """The model's own chat template applied to messages such as {"role": "user", "content": "..."}.

        open_turn: end with the opening of the assistant's turn.
        """
        try:  # tools: templates ask whether they are None
            chat = {"messages": messages, "tools": None, "documents": None, **self._special_tokens}
            text = self._template.render(chat, add_generation_prompt=open_turn)
            return text.encode().decode()  # half of a surrogate pair is no text
        except Exception as error:  # a template is a foreign program, which may raise anything
            raise UserError(f"{self.folder}: the chat template fails: {str(error)[:200]}") from None

    def encode_prompt(self, question: str, assistant_prefix: str) -> list[int]:
        """Ids of a one-question chat whose assistant turn is already opened with `assistant_prefix`."""
        chat = self.render_chat([{"role": "user", "content": question}])
        if question.strip() not in chat:
            raise UserError(f"{self.folder}: the chat template leaves the question out")
        if chat.rstrip().endswith("<think>"):  # once is enough
            assistant_prefix = assistant_prefix.removesuffix("<think>")
        return self.encode(chat + assistant_prefix)

    def _find_end_ids(self) -> list[int]:
        """The ids of the eos_token, of both files' eos_token_id, and of what closes an assistant's turn."""
        eos = self._special_tokens.get("eos_token")
        ids: list = [] if eos is None else [self._bpe.token_to_id(eos)]
        for path in (self.folder / "config.json", self.folder / "generation_config.json"):
            listed = read_json(path).get("eos_token_id") if path.exists() else None
            ids += listed if isinstance(listed, list) else [] if listed is None else [listed]
        special = {i for i, token in self._bpe.get_added_tokens_decoder().items() if token.special}
        said = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "GOODBYE"}]
        with suppress(UserError):  # a template may know no such chat
            after = self.render_chat(said, open_turn=False).partition("GOODBYE")[2]
            ids += [i for i in self.encode(after) if i in special][:1]
        if not ids or not all(type(i) is int and 0 <= i < len(self) for i in ids):
            raise UserError(f"{self.folder}: bad eos_token_id (config.json, {path.name}) or eos_token: {ids}")
        return sorted({*ids})


def load_bpe(path: Path) -> BytePairTokenizer:
    """The tokenizer of tokenizer.json, without the truncation and padding that its last user may have set."""
    try:
        bpe = BytePairTokenizer.from_file(str(path))
    except BaseException as error:  # a bare Exception, or a Rust panic, which is not even that
        raise UserError(f"{path}: not a tokenizer that `tokenizers` can read ({error})") from None
    bpe.no_truncation()
    bpe.no_padding()
    return bpe
