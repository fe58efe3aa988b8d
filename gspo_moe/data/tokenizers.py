"""Text to token ids and back: HF tokenizers, and SentencePiece models, trained on a task's text where none exists."""

from __future__ import annotations

import io
import shutil
from collections.abc import Callable, Iterable
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from gspo_moe.config.model import TokenizerConfig
from gspo_moe.data.end_tokens import GENERATION_FILE, NO_END_TOKENS, EndTokens, read_end_tokens, read_json
from gspo_moe.errors import ConfigError, DataError
from gspo_moe.files import write_whole

if TYPE_CHECKING:
    from gspo_moe.data.chat_template import ChatTemplate
    from gspo_moe.data.special_tokens import SpecialTokens

SENTENCEPIECE_FILE = "tokenizer.model"
HF_FILE = "tokenizer.json"
HF_EOS_FILES = ("tokenizer_config.json", "special_tokens_map.json")  # in order
HF_COPIED = (*HF_EOS_FILES, GENERATION_FILE, "added_tokens.json", "chat_template.jinja", "merges.txt", "vocab.json")
MOST_NAMED = 5

SPACE_PIECE = "\u2581"  # how SentencePiece writes a space; a text may hold the character itself
SMALLEST_VOCABULARY = 260  # unknown, end, space, 256 bytes and one character
TRAINING: dict[str, Any] = {
    "model_type": "char",
    "byte_fallback": True,
    "character_coverage": 1.0,
    "normalization_rule_name": "identity",
    "add_dummy_prefix": False,
    "remove_extra_whitespaces": False,
    # Without a piece of its own a space would become the bytes of U+2581 and decode as that.
    "user_defined_symbols": [SPACE_PIECE],
    "unk_id": 0,
    "eos_id": 1,
    # Control pieces decode to nothing, so a reward would not see a sampled one: none but the end.
    "bos_id": -1,
    "pad_id": -1,
    "max_sentence_length": 1 << 24,
    "minloglevel": 2,
}


class Tokenizer(Protocol):
    """Token ids are 0 to `vocab_size` - 1. `pad_id` fills unused places and may be any token: mask by length.

    eos_id: what a demonstration ends with. eos_ids: every id that ends a rollout, `eos_id` first.
    """

    @property
    def eos_id(self) -> int: ...

    @property
    def eos_ids(self) -> tuple[int, ...]: ...

    @property
    def pad_id(self) -> int: ...

    @property
    def vocab_size(self) -> int: ...

    @property
    def chat_template(self) -> ChatTemplate | None: ...

    @property
    def special(self) -> SpecialTokens | None:
        """None where no word of a text is taken for a special token."""
        ...

    def encode(self, text: str) -> list[int]:
        """Ids of `text` alone: nothing is put before or after it."""
        ...

    def decode(self, ids: Iterable[int]) -> str:
        """Text of `ids`, which need not be valid text: broken bytes become U+FFFD."""
        ...

    def save(self, folder: str | Path) -> None:
        """Writes the files that `load_tokenizer` finds in a model's folder."""
        ...


class SentencePieceTokenizer:
    """A SentencePiece model. With one that `train` made, `decode(encode(text)) == text` for any text.

    It takes no part of a text for a special token, so it has no chat template of its own.
    Raises DataError where it has no end-of-text piece, or `ends` one that it does not know.
    """

    chat_template = None
    special = None

    def __init__(self, model: bytes, ends: EndTokens = NO_END_TOKENS) -> None:
        import sentencepiece  # each kind of tokenizer does without the other's library

        self._model = model
        self._processor = sentencepiece.SentencePieceProcessor(model_proto=model)
        self.eos_id = self._processor.eos_id()
        if self.eos_id < 0:
            raise DataError("the SentencePiece model has no end-of-text piece; train it with an eos_id")
        pad_id = self._processor.pad_id()
        self.pad_id = pad_id if pad_id >= 0 else self.eos_id
        self.vocab_size = self._processor.vocab_size()
        self.eos_ids = ends.with_own(self.eos_id, self.vocab_size)

    @classmethod
    def train(cls, texts: Iterable[str], vocab_size: int) -> SentencePieceTokenizer:
        """One piece a character of `texts`, most frequent first, and the 256 bytes for what is not among them.

        The vocabulary is as small as the texts need; where `vocab_size` is smaller, the rarest characters go.
        Deterministic. Raises ConfigError for a `vocab_size` below 260 and DataError for texts without a character.
        """
        if vocab_size < SMALLEST_VOCABULARY:
            raise ConfigError(
                f"tokenizer.vocab_size={vocab_size} has no place for the 256 bytes and a character; "
                f"raise it to at least {SMALLEST_VOCABULARY}"
            )
        import sentencepiece

        written = io.BytesIO()
        try:
            sentencepiece.SentencePieceTrainer.train(
                sentence_iterator=iter(texts), model_writer=written, vocab_size=vocab_size, **TRAINING
            )
        except RuntimeError as error:
            raise DataError(f"no tokenizer can be trained on this text ({error}); set tokenizer.path to one") from error
        trained = cls(written.getvalue())
        if trained.vocab_size < SMALLEST_VOCABULARY:  # sentencepiece 0.2.2 makes a model of spaces alone
            raise DataError("no tokenizer can be trained on text without a character; set tokenizer.path to one")
        return trained

    @classmethod
    def load(cls, path: str | Path, model_folder: Path | None = None) -> SentencePieceTokenizer:
        """Reads a model file, and end tokens beside it or else in `model_folder`.

        Raises DataError where the file is missing or no SentencePiece model, and for end tokens that it does not have.
        """
        ends = read_end_tokens(Path(path).parent, model_folder)
        try:
            if not (content := Path(path).read_bytes()):
                raise OSError("it is empty")
            return cls(content, ends)
        except (OSError, RuntimeError, UnicodeDecodeError) as error:  # the last of pieces that are no text
            raise DataError(f"{path} is no readable SentencePiece model ({error}); give another file") from error

    def encode(self, text: str) -> list[int]:
        # SentencePiece would take the character for a space, so it goes in as its bytes.
        separator = [self._processor.piece_to_id(f"<0x{byte:02X}>") for byte in SPACE_PIECE.encode()]
        ids: list[int] = []
        for number, part in enumerate(text.split(SPACE_PIECE)):
            ids += (separator if number else []) + self._processor.encode(part)
        return ids

    def decode(self, ids: Iterable[int]) -> str:
        return self._processor.decode(list(ids))

    def save(self, folder: str | Path) -> None:
        write_whole(Path(folder) / SENTENCEPIECE_FILE, self._model, shared=True)


class HFTokenizer:
    """A Hugging Face `tokenizer.json`, read with the `tokenizers` library.

    Special tokens in a text become their ids, and decode to their own text, so that a reward sees them.
    model_folder: where end tokens are looked for if `folder` names none.
    Raises DataError where the file cannot be read, ids below the largest have no token, no end-of-text token is named,
    or one that it does not have.
    """

    def __init__(self, folder: str | Path, model_folder: Path | None = None) -> None:
        import tokenizers

        self._folder = Path(folder)
        try:
            self._tokenizer = tokenizers.Tokenizer.from_file(str(self._folder / HF_FILE))
        except Exception as error:  # the library raises bare Exception
            raise DataError(f"{self._folder / HF_FILE} is no readable tokenizer ({error}); export it again") from error
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self.vocab_size = self._count_tokens()
        settings = [read_json(self._folder / name) for name in HF_EOS_FILES]
        ends = read_end_tokens(self._folder, model_folder)
        self.eos_id = self._find_eos(settings, ends)
        self.eos_ids = ends.with_own(self.eos_id, self.vocab_size)
        pad_id = self._token_id(settings[0].get("pad_token"))
        self.pad_id = self.eos_id if pad_id is None else pad_id

    @cached_property
    def chat_template(self) -> ChatTemplate | None:
        from gspo_moe.data.chat_template import read_chat_template  # text prompts do without Jinja2

        return read_chat_template(self._folder, self.special.named)

    @cached_property
    def special(self) -> SpecialTokens:
        from gspo_moe.data.special_tokens import SpecialTokens

        named = {
            name: value["content"] if isinstance(value, dict) else value
            for file in reversed(HF_EOS_FILES)  # the settings count
            for name, value in read_json(self._folder / file).items()
            if name.endswith("_token") and isinstance(value, str | dict)
        }
        return SpecialTokens(self._tokenizer, named)

    def encode(self, text: str) -> list[int]:
        return self._tokenizer.encode(text, add_special_tokens=False).ids

    def decode(self, ids: Iterable[int]) -> str:
        return self._tokenizer.decode(list(ids), skip_special_tokens=False)

    def save(self, folder: str | Path) -> None:
        Path(folder).mkdir(parents=True, exist_ok=True)
        for name in (HF_FILE, *HF_COPIED):
            if (self._folder / name).is_file():
                shutil.copyfile(self._folder / name, Path(folder) / name)

    def _count_tokens(self) -> int:
        ids = set(self._tokenizer.get_vocab(with_added_tokens=True).values())
        missing = sorted(set(range(max(ids, default=0))) - ids)
        if missing:
            first = ", ".join(map(str, missing[:MOST_NAMED])) + ("" if len(missing) <= MOST_NAMED else ", ...")
            raise DataError(
                f"{self._folder / HF_FILE} has tokens up to id {max(ids)} and none for {len(missing)} ids below it "
                f"({first}), which a policy could sample; add tokens for them (added_tokens)"
            )
        return len(ids)

    def _find_eos(self, settings: list[dict[str, Any]], ends: EndTokens) -> int:
        named = [self._token_id(one.get("eos_token")) for one in settings]
        for eos_id in (*named, *ends.ids):
            if eos_id is not None:
                return eos_id
        raise DataError(
            f"{self._folder} names no end-of-text token; set eos_token in its tokenizer_config.json "
            "to a token of tokenizer.json"
        )

    def _token_id(self, token: Any) -> int | None:
        content = token.get("content") if isinstance(token, dict) else token
        return self._tokenizer.token_to_id(content) if isinstance(content, str) else None


def load_tokenizer(
    config: TokenizerConfig,
    model_folder: str | Path | None,
    training_text: Callable[[], Iterable[str]],
    save_folder: str | Path,
) -> Tokenizer:
    """The tokenizer of a run: `config.path`, else the one in the model's folder, else one trained on the task's text.

    config.kind: "auto" takes what it finds (`tokenizer.json` first) and trains only where there is no model folder;
    "hf" and "sentencepiece" take only their own kind, and "hf" never trains.
    training_text: asked for only where a tokenizer is trained; it is then saved in `save_folder`.
    Every process may call this at once: training is deterministic and files appear whole.
    Raises ConfigError where what the config asks for is not there, DataError for files that cannot be read.
    """
    found = own_tokenizer(config, model_folder)
    if found is not None:
        return found
    if config.kind == "hf" or (config.kind == "auto" and model_folder is not None):
        raise ConfigError(
            f"tokenizer.kind={config.kind} finds no tokenizer in the model's folder ({model_folder}); set "
            "tokenizer.path to one, or tokenizer.kind=sentencepiece to train one on the task's text"
        )
    trained = SentencePieceTokenizer.train(training_text(), config.vocab_size)
    trained.save(save_folder)
    return trained


def own_tokenizer(config: TokenizerConfig, model_folder: str | Path | None) -> Tokenizer | None:
    """The tokenizer of `config.path`, else the one in the model's folder, None where there is none.

    Raises ConfigError where `config.path` holds none, DataError for files that cannot be read.
    """
    model_folder = None if model_folder is None else Path(model_folder)
    if config.path is None:
        return None if model_folder is None else _find(config.kind, model_folder, None)
    tokenizer = _find(config.kind, Path(config.path), model_folder)
    if tokenizer is None:
        raise ConfigError(
            f"tokenizer.path={config.path} with tokenizer.kind={config.kind} holds no such tokenizer; "
            f"give a folder with {HF_FILE} (hf) or {SENTENCEPIECE_FILE} (sentencepiece), or a SentencePiece file"
        )
    return tokenizer


def _find(kind: str, path: Path, model_folder: Path | None) -> Tokenizer | None:
    """The tokenizer of that kind in a folder (or a SentencePiece file itself), None where there is none."""
    if kind != "sentencepiece" and (path / HF_FILE).is_file():
        return HFTokenizer(path, model_folder)
    if kind != "hf":
        for file in (path, path / SENTENCEPIECE_FILE):
            if file.is_file():
                return SentencePieceTokenizer.load(file, model_folder)
    return None
