"""Rows of a data set → texts: a column of plain text, a conversation, or a prompt with its answer.

Which of these it is, is decided by the first row, from the names below or from the column that the user names; every later row
has to fit, and one that does not is refused with its place. Rows whose text is empty or null are passed over.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

from cloq.calibration.options import CALIBRATION, Options
from cloq.errors import CalibrationError

TEXT_COLUMNS = ("text", "content", "document", "article", "body", "passage", "raw_content", "markdown", "code", "sentence")
CHAT_COLUMNS = ("messages", "conversations", "conversation")
PROMPT_COLUMNS = ("instruction", "prompt", "question", "query", "problem")
CONTEXT_COLUMNS = ("input", "context")
ANSWER_COLUMNS = ("response", "output", "completion", "answer", "solution")

ROLES = {
    **{role: role for role in ("system", "user", "assistant", "tool")},
    **{"human": "user", "gpt": "assistant", "chatgpt": "assistant", "model": "assistant", "bot": "assistant"},
    **{"developer": "system", "function_call": "assistant", "function": "tool", "observation": "tool"},
}
"""Speakers as data sets call them, ShareGPT's among them → the roles that chat templates know."""

Row = tuple[str, Any]
"""Where a row stands, in words for a message, and the row itself."""

Message = dict[str, Any]
"""`{"role", "content", …}`; further keys, such as tool calls, are kept."""


class Turn(NamedTuple):
    """A prompt, perhaps something it refers to (else the empty string), and the answer."""

    prompt: str
    context: str
    answer: str


Content = str | Turn | list[Message]
"""What a row holds: plain text, one exchange, or a conversation."""


@dataclass(frozen=True)
class Columns:
    """Which columns hold what; `None` is found by name. flag: the option that names a column, for messages."""

    text: str | None = None
    prompt: str | None = None
    context: str | None = None
    answer: str | None = None
    flag: str = CALIBRATION.column


def row_texts(rows: Iterable[Row], column: str | None, tokenizer, options: Options = CALIBRATION) -> Iterator[str]:
    """One text per row. Raises `CalibrationError` with the place of the first row that has none."""
    columns = Columns(column, flag=options.column)
    for where, _, content in row_contents(rows, columns):
        text = written(content, tokenizer, where, columns.flag)
        if text.strip():
            yield text


def row_contents(rows: Iterable[Row], columns: Columns) -> Iterator[tuple[str, Any, Content]]:
    """Where each row stands, the row, and what it holds; a row of null or empty text holds the empty string. Raises
    `CalibrationError` with the place of the first row that does not fit."""
    reader: Reader | None = None
    for where, row in rows:
        if isinstance(row, str):
            yield where, row, without_surrogates(row)
        elif isinstance(row, dict):
            reader = reader or find_reader(row, columns, where)
            yield where, row, reader.content(row, where)
        else:
            raise CalibrationError(f"{where} is {_kind(row)}; a row is an object with named columns, or a string")


def written(content: Content, tokenizer, where: str, flag: str = CALIBRATION.column) -> str:
    """The content as one text.

    A conversation goes through the tokenizer's chat template. So does an exchange where the tokenizer has one, as an
    instruction-tuned model would see it; else its parts stand with blank lines between them.
    """
    if isinstance(content, str):
        return content
    if isinstance(content, Turn):
        asked = question(content)
        if tokenizer is None or not tokenizer.chat_template:
            return f"{asked}\n\n{content.answer.strip()}"
        content = [{"role": "user", "content": asked}, {"role": "assistant", "content": content.answer.strip()}]
    return without_surrogates(render(content, tokenizer, where, flag))


def question(turn: Turn) -> str:
    """Prompt and context as one text."""
    return "\n\n".join(part.strip() for part in (turn.prompt, turn.context) if part.strip())


# -- columns -----------------------------------------------------------------------------------------------------------


class Reader(Protocol):
    """Says where in a row its content is; the empty string where there is none."""

    def content(self, row: dict, where: str) -> Content: ...


@dataclass(frozen=True)
class TextColumn:
    """A column of plain text."""

    column: str
    flag: str = CALIBRATION.column

    def content(self, row: dict, where: str) -> str:
        return without_surrogates(text_value(row, self.column, where, self.flag))


@dataclass(frozen=True)
class ChatColumn:
    """A column of messages, OpenAI's (`role`, `content`) or ShareGPT's (`from`, `value`)."""

    column: str
    flag: str

    def content(self, row: dict, where: str) -> Content:
        found = value(row, self.column, where, self.flag)
        return messages(found, where) if found else ""


@dataclass(frozen=True)
class TurnColumns:
    """A prompt, perhaps a context, and the answer, each in its column; both ends may be conversations instead."""

    prompt: str
    context: str | None
    answer: str
    flag: str

    def content(self, row: dict, where: str) -> Content:
        prompt, answer = (value(row, name, where, self.flag) for name in (self.prompt, self.answer))
        if not prompt or not answer:
            return ""
        if _is_chat(prompt) and _is_chat(answer):
            return messages(prompt, where) + messages(answer, where)
        context = text_value(row, self.context, where, self.flag) if self.context and self.context in row else ""
        parts = (text_value(row, self.prompt, where, self.flag), context, text_value(row, self.answer, where, self.flag))
        return Turn(*map(without_surrogates, parts))


def find_reader(row: dict, columns: Columns, where: str) -> Reader:
    """The reader for rows like this one, from the columns that were named or else from their names."""
    if columns.text is not None:
        chat = _is_chat(value(row, columns.text, where, columns.flag))
        return ChatColumn(columns.text, columns.flag) if chat else TextColumn(columns.text, columns.flag)
    named = (columns.prompt, columns.context, columns.answer)
    if any(named):
        return _turn_columns(row, columns, where)
    for name in CHAT_COLUMNS:
        if isinstance(row.get(name), list):
            return ChatColumn(name, columns.flag)
    for name in TEXT_COLUMNS:
        if name in row and isinstance(row[name], (str, type(None))):
            return TextColumn(name, columns.flag)
    return _turn_columns(row, columns, where)


def _turn_columns(row: dict, columns: Columns, where: str) -> TurnColumns:
    for name in (columns.prompt, columns.context, columns.answer):
        if name is not None:
            value(row, name, where, columns.flag)
    prompt = columns.prompt or first_of(PROMPT_COLUMNS, row)
    context = columns.context or first_of(CONTEXT_COLUMNS, row)
    answer = columns.answer or first_of(ANSWER_COLUMNS, row)
    if prompt is None or answer is None:
        raise CalibrationError(f"{where}: none of its columns is known to hold text. {name_one(row, columns.flag)}")
    return TurnColumns(prompt, context, answer, columns.flag)


def first_of(names: tuple[str, ...], row: dict) -> str | None:
    """The first of these columns that holds text or messages."""
    return next((name for name in names if isinstance(row.get(name), str) or _is_chat(row.get(name))), None)


def value(row: dict, column: str, where: str, flag: str) -> Any:
    """What stands in a column. Raises `CalibrationError` with the columns that there are if it is not one of them."""
    if column not in row:
        raise CalibrationError(f"{where} has no column {column!r}. {name_one(row, flag)}")
    return row[column]


def text_value(row: dict, column: str, where: str, flag: str) -> str:
    """The text in a column, the empty string for null. Raises `CalibrationError` if it holds something else."""
    found = value(row, column, where, flag)
    if not isinstance(found, (str, type(None))):
        raise CalibrationError(f"{where}: the column {column!r} holds {_kind(found)}, not text. {name_one(row, flag)}")
    return found or ""


def name_one(row: dict, flag: str) -> str:
    """The remedy for a message: the option, and the columns to choose from."""
    columns = ", ".join(f"{name} ({_kind(found)})" for name, found in row.items())
    return f"Name the column with {flag}; there {'are' if len(row) != 1 else 'is'}: {columns or 'none'}"


def _kind(found: Any) -> str:
    names = {
        str: "text",
        bool: "true or false",
        int: "a number",
        float: "a number",
        list: "a list",
        dict: "an object",
        type(None): "null",
    }
    return "messages" if _is_chat(found) else names.get(type(found), type(found).__name__)


# -- conversations -----------------------------------------------------------------------------------------------------


def _is_chat(found: Any) -> bool:
    return isinstance(found, list) and bool(found) and isinstance(found[0], dict) and ("role" in found[0] or "from" in found[0])


def messages(found: Any, where: str) -> list[Message]:
    """A conversation in either form. Raises `CalibrationError` if it is none, or has an unknown speaker."""
    if not isinstance(found, list) or not all(isinstance(message, dict) for message in found):
        raise CalibrationError(
            f"{where}: a conversation is a list of messages such as {{'role': 'user', 'content': '…'}}, got {_kind(found)}"
        )
    result = []
    for message in found:
        speaker, content = message.get("role", message.get("from")), message.get("content", message.get("value"))
        if speaker not in ROLES:
            raise CalibrationError(f"{where}: a message has the role {speaker!r}; known: {', '.join(ROLES)}")
        rest = {key: item for key, item in message.items() if key not in ("role", "from", "content", "value")}
        result.append({"role": ROLES[speaker], "content": _content(content, where), **rest})
    return result


def _content(content: Any, where: str) -> str:
    if isinstance(content, list) and all(isinstance(part, dict) and isinstance(part.get("text"), str) for part in content):
        return "".join(part["text"] for part in content)
    if not isinstance(content, (str, type(None))):
        raise CalibrationError(f"{where}: a message's content is {_kind(content)}; only text can be used")
    return content or ""


def render(conversation: list[Message], tokenizer, where: str, flag: str, ask: bool = False) -> str:
    """The conversation as the tokenizer's chat template writes it. ask: with what comes before the next answer.

    Raises `CalibrationError` if there is no template, or it refuses the conversation.
    """
    if tokenizer is None or not tokenizer.chat_template:
        raise CalibrationError(
            f"{where} is a conversation, but the model's tokenizer has no chat template (a base model rarely has one). "
            f"Use the instruction-tuned version of the model, name a column of plain text with {flag}, or use other text"
        )
    try:
        return tokenizer.apply_chat_template(conversation, tokenize=False, **({"add_generation_prompt": True} if ask else {}))
    except Exception as error:  # a template is a program: it raises what its author chose
        raise CalibrationError(
            f"{where}: the tokenizer's chat template refuses the roles {', '.join(m['role'] for m in conversation)} "
            f"({_first_line(error)}). "
            f"Leave such rows out, or name a column of plain text with {flag}"
        ) from error


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:300]


def without_surrogates(text: str) -> str:
    """JSON may hold half of a surrogate pair, which is no character and which no tokenizer takes: U+FFFD in its place."""
    try:
        text.encode("utf8")
        return text
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
