"""Rows of a data set → texts: a column of plain text, a conversation, or a prompt with its answer.

Which of these it is, is decided by the first row, from the names below or from the column that the user names; every later row
has to fit, and one that does not is refused with its place. Rows whose text is empty or null are passed over.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol

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


def row_texts(rows: Iterable[Row], column: str | None, tokenizer) -> Iterator[str]:
    """One text per row. Raises `CalibrationError` with the place of the first row that has none."""
    reader: _Reader | None = None
    for where, row in rows:
        if isinstance(row, str):
            text = row
        elif isinstance(row, dict):
            reader = reader or _reader(row, column, where)
            text = reader.text(row, tokenizer, where)
        else:
            raise CalibrationError(f"{where} is {_kind(row)}; a row is an object with named columns, or a string")
        if text.strip():
            yield _without_surrogates(text)


class _Reader(Protocol):
    """Says where in a row its text is."""

    def text(self, row: dict, tokenizer, where: str) -> str: ...


@dataclass(frozen=True)
class TextColumn:
    """A column of plain text."""

    column: str

    def text(self, row: dict, tokenizer, where: str) -> str:
        value = _value(row, self.column, where)
        if not isinstance(value, (str, type(None))):
            raise CalibrationError(f"{where}: the column {self.column!r} holds {_kind(value)}, not text. {_name_one(row)}")
        return value or ""


@dataclass(frozen=True)
class _Chat:
    """A column of messages, OpenAI's (`role`, `content`) or ShareGPT's (`from`, `value`), through the tokenizer's chat
    template."""

    column: str

    def text(self, row: dict, tokenizer, where: str) -> str:
        value = _value(row, self.column, where)
        return _render(_messages(value, where), tokenizer, where) if value else ""


@dataclass(frozen=True)
class _Turn:
    """A prompt, perhaps something it refers to, and the answer.

    One exchange through the chat template where the tokenizer has one, as an instruction-tuned model would see it; else the parts
    with blank lines between them.
    """

    prompt: str
    context: str | None
    answer: str

    def text(self, row: dict, tokenizer, where: str) -> str:
        prompt, answer = _value(row, self.prompt, where), _value(row, self.answer, where)
        if not prompt or not answer:
            return ""
        if _is_chat(prompt) and _is_chat(answer):
            return _render(_messages(prompt, where) + _messages(answer, where), tokenizer, where)
        context = row.get(self.context) or "" if self.context else ""
        for name, value in ((self.prompt, prompt), (self.context, context), (self.answer, answer)):
            if not isinstance(value, str):
                raise CalibrationError(f"{where}: the column {name!r} holds {_kind(value)}, not text. {_name_one(row)}")
        asked = "\n\n".join(part.strip() for part in (prompt, context) if part.strip())
        if tokenizer is None or not tokenizer.chat_template:
            return f"{asked}\n\n{answer.strip()}"
        return _render([{"role": "user", "content": asked}, {"role": "assistant", "content": answer.strip()}], tokenizer, where)


def _reader(row: dict, column: str | None, where: str) -> _Reader:
    if column is not None:
        return _Chat(column) if _is_chat(_value(row, column, where)) else TextColumn(column)
    for name in CHAT_COLUMNS:
        if isinstance(row.get(name), list):
            return _Chat(name)
    for name in TEXT_COLUMNS:
        if name in row and isinstance(row[name], (str, type(None))):
            return TextColumn(name)
    prompt, context, answer = (_first(names, row) for names in (PROMPT_COLUMNS, CONTEXT_COLUMNS, ANSWER_COLUMNS))
    if prompt and answer:
        return _Turn(prompt, context, answer)
    raise CalibrationError(f"{where}: none of its columns is known to hold text. {_name_one(row)}")


def _first(names: tuple[str, ...], row: dict) -> str | None:
    return next((name for name in names if isinstance(row.get(name), str) or _is_chat(row.get(name))), None)


def _value(row: dict, column: str, where: str) -> Any:
    if column not in row:
        raise CalibrationError(f"{where} has no column {column!r}. {_name_one(row)}")
    return row[column]


def _name_one(row: dict) -> str:
    columns = ", ".join(f"{name} ({_kind(value)})" for name, value in row.items())
    return f"Name the column with --calib-column; there {'are' if len(row) != 1 else 'is'}: {columns or 'none'}"


def _kind(value: Any) -> str:
    names = {
        str: "text",
        bool: "true or false",
        int: "a number",
        float: "a number",
        list: "a list",
        dict: "an object",
        type(None): "null",
    }
    return "messages" if _is_chat(value) else names.get(type(value), type(value).__name__)


# -- conversations -----------------------------------------------------------------------------------------------------


def _is_chat(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and isinstance(value[0], dict) and ("role" in value[0] or "from" in value[0])


def _messages(value: Any, where: str) -> list[dict[str, Any]]:
    """Either form → a list of `{"role", "content", …}`; further keys of a message (such as tool calls) are kept."""
    if not isinstance(value, list) or not all(isinstance(message, dict) for message in value):
        raise CalibrationError(
            f"{where}: a conversation is a list of messages such as {{'role': 'user', 'content': '…'}}, got {_kind(value)}"
        )
    messages = []
    for message in value:
        speaker, content = message.get("role", message.get("from")), message.get("content", message.get("value"))
        if speaker not in ROLES:
            raise CalibrationError(f"{where}: a message has the role {speaker!r}; known: {', '.join(ROLES)}")
        rest = {key: item for key, item in message.items() if key not in ("role", "from", "content", "value")}
        messages.append({"role": ROLES[speaker], "content": _content(content, where), **rest})
    return messages


def _content(content: Any, where: str) -> str:
    if isinstance(content, list) and all(isinstance(part, dict) and isinstance(part.get("text"), str) for part in content):
        return "".join(part["text"] for part in content)
    if not isinstance(content, (str, type(None))):
        raise CalibrationError(f"{where}: a message's content is {_kind(content)}; only text can be used")
    return content or ""


def _render(messages: list[dict[str, Any]], tokenizer, where: str) -> str:
    if tokenizer is None or not tokenizer.chat_template:
        raise CalibrationError(
            f"{where} is a conversation, but the model's tokenizer has no chat template (a base model rarely has one). "
            "Use the instruction-tuned version of the model, name a column of plain text with --calib-column, or use other text"
        )
    try:
        return tokenizer.apply_chat_template(messages, tokenize=False)
    except Exception as error:  # a template is a program: it raises what its author chose
        raise CalibrationError(
            f"{where}: the tokenizer's chat template refuses the roles {', '.join(m['role'] for m in messages)} "
            f"({_first_line(error)}). "
            "Leave such rows out, or name a column of plain text with --calib-column"
        ) from error


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:300]


def _without_surrogates(text: str) -> str:
    """JSON may hold half of a surrogate pair, which is no character and which no tokenizer takes: U+FFFD in its place."""
    try:
        text.encode("utf8")
        return text
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
