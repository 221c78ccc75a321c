"""
`arriero chat`: a conversation with a model at the terminal.

The conversation is kept here and sent whole with each message; the pool keeps what it has computed of it.
Lines are edited, and remembered across sessions, with prompt_toolkit.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import typer
from prompt_toolkit import PromptSession
from prompt_toolkit.formatted_text import HTML
from prompt_toolkit.history import FileHistory
from prompt_toolkit.key_binding import KeyBindings, KeyPressEvent

from app.cli import output
from app.cli.chat import options
from app.cli.chat.answer import Answer, written
from app.cli.client import Client, connected
from app.cli.output import settings_of
from app.kernel.errors import ArrieroError, NotFound, Unavailable

#: The file of earlier lines, below the data directory.
_HISTORY = "chat-history"
_HELP = """\
/help            this list
/system [TEXT]   set the system message; without a text, remove it
/clear           forget the conversation
/undo            forget the last message and its answer
/again           answer the last message again
/bye             leave (or Ctrl-D)
Enter sends; Alt-Enter, or Enter after a \\ or inside \"\"\" … \"\"\", begins a new line. Ctrl-C stops an answer."""
#: Opens and closes a message of several lines.
_QUOTES = '"""'


@dataclass(slots=True)
class Conversation:
    """The messages of a conversation."""

    system: str | None = None
    messages: list[dict[str, str]] = field(default_factory=list)
    #: It is stored by the API, which has what was said before: only the last message is sent.
    is_stored: bool = False

    def to_send(self) -> list[dict[str, str]]:
        """The messages for the model."""
        system = [{"role": "system", "content": self.system}] if self.system else []
        return [*system, *(self.messages[-1:] if self.is_stored else self.messages)]

    def undo(self) -> str | None:
        """Forget the last message of the user and what follows; return it."""
        while self.messages:
            last = self.messages.pop()
            if last["role"] == "user":
                return last["content"]
        return None


def chat(
    context: typer.Context,
    model: options.ModelName,
    system: options.SystemMessage = None,
    max_tokens: options.MaxTokens = None,
    temperature: options.Temperature = None,
    seed: options.Seed = None,
    stored: options.ConversationName = None,
    user: options.MemoryUser = None,
) -> None:
    """
    Chat with a model. /help lists the commands of a conversation.

    Without a terminal, standard input is one message. Example: arriero chat smollm2:135m --system "Answer briefly."
    """
    settings = settings_of(context)
    given = options.parameters(max_tokens, temperature, seed)
    conversation = Conversation(system, is_stored=stored is not None)
    with connected(settings) as client:
        given |= options.stored(client, stored, user)
        if not sys.stdin.isatty():
            _piped(client, model, conversation, given)
            return
        client.get("/v1/catalog/select", model=model)  # an unknown model is an error before the first message
        output.notes().print(f"[dim]{model}; /help for commands, Ctrl-D to leave[/]")
        _converse(client, model, conversation, given, _session(settings.data_dir))


def _piped(client: Client, model: str, conversation: Conversation, given: dict[str, Any]) -> None:
    text = sys.stdin.read()
    if text.strip():
        conversation.messages.append({"role": "user", "content": text})
        written(client, model, conversation.to_send(), given)
        sys.stdout.write("\n")


def _converse(
    client: Client, model: str, conversation: Conversation, given: dict[str, Any], session: PromptSession[str]
) -> None:
    notes = output.notes()
    while True:
        try:
            text = _message(session.prompt(HTML("<ansigreen>&gt;&gt;&gt; </ansigreen>")))
        except KeyboardInterrupt:
            notes.print("[dim]Ctrl-D or /bye to leave[/]")
            continue
        except EOFError:
            return
        if text in ("/bye", "/exit", "/quit"):
            return
        if text.startswith("/"):
            again = _command(text, conversation)
            if again is None:
                continue
            text = again
        if not text.strip():
            continue
        conversation.messages.append({"role": "user", "content": text})
        try:
            answer = written(client, model, conversation.to_send(), given)
        except (Unavailable, NotFound):
            raise
        except ArrieroError as error:
            conversation.undo()
            notes.print(f"[bold red]error:[/] {str(error).replace('[', chr(92) + '[')}")
            continue
        _keep(conversation, answer)


def _keep(conversation: Conversation, answer: Answer) -> None:
    """Keep the answer, as far as it was written."""
    if not answer.text:
        conversation.undo()
        return
    if answer.stopped and conversation.is_stored:
        conversation.undo()
        output.notes().print("[dim]stopped; the turn is not kept[/]")
        return
    conversation.messages.append({"role": "assistant", "content": answer.text})
    if answer.stopped:
        output.notes().print("[dim]stopped[/]")
    elif answer.finish == "length":
        output.notes().print("[dim]cut: the context, or --max-tokens, has no more room; /clear begins anew[/]")


def _command(text: str, conversation: Conversation) -> str | None:
    """Carry out a command. Returns a message to answer, or None."""
    notes = output.notes()
    name, _, argument = text.partition(" ")
    match name:
        case "/help" | "/?":
            typer.echo(_HELP)
        case "/system":
            conversation.system = argument.strip() or None
            notes.print(f"[dim]the system message is {'set' if conversation.system else 'removed'}[/]")
        case "/clear" | "/undo" | "/again" if conversation.is_stored:
            notes.print(
                "[dim]a stored conversation is not rewritten; fork it at a message: arriero conversations fork[/]"
            )
        case "/clear":
            conversation.messages.clear()
            notes.print("[dim]the conversation is forgotten[/]")
        case "/undo":
            undone = conversation.undo() is not None
            notes.print(f"[dim]{'the last message is forgotten' if undone else 'there is nothing to forget'}[/]")
        case "/again":
            last = conversation.undo()
            if last is None:
                notes.print("[dim]there is no message to answer[/]")
            return last
        case _:
            notes.print(f"[red]there is no command {name!r}[/]; /help lists them")
    return None


def _message(text: str) -> str:
    """The message of what was typed, without the marks of several lines."""
    text = text.replace("\\\n", "\n").strip()
    if len(text) >= 2 * len(_QUOTES) and text.startswith(_QUOTES) and text.endswith(_QUOTES):
        return text[len(_QUOTES) : -len(_QUOTES)].strip("\n")
    return text


def _session(data_dir: Path) -> PromptSession[str]:
    """The editor of messages."""
    keys = KeyBindings()

    @keys.add("enter")
    def _(event: KeyPressEvent) -> None:
        buffer = event.current_buffer
        before = buffer.document.text_before_cursor
        open_quotes = before.lstrip().startswith(_QUOTES) and before.count(_QUOTES) % 2 == 1
        if before.endswith("\\") or open_quotes:
            buffer.insert_text("\n")
        else:
            buffer.validate_and_handle()

    @keys.add("escape", "enter")
    def _(event: KeyPressEvent) -> None:
        event.current_buffer.insert_text("\n")

    history = data_dir / _HISTORY
    history.parent.mkdir(parents=True, exist_ok=True)
    history.touch(mode=0o600)
    return PromptSession(
        history=FileHistory(str(history)), multiline=True, key_bindings=keys, prompt_continuation="... "
    )
