"""`mlxeff chat`: a conversation in the terminal. The KV cache is kept between turns, so a turn computes only new
tokens.
"""

import argparse
import contextlib
import functools
import json
import os
import sys
from dataclasses import dataclass, field

from ..errors import MlxeffError, notices
from ..names import expand, json_text
from . import output, streams
from .runner import Answer, Runner, start

HELP = """\
/reset        begin anew (the system message stays)
/save FILE    write the conversation to a new file, for --resume
//TEXT        send /TEXT: a message that begins with a slash
/stats        tokens and timings of the last answer and of the conversation
/help         this list
/exit         end; so does Ctrl-D. Ctrl-C stops an answer."""


def run(options: argparse.Namespace) -> int:
    """Load the model and talk until the end of the input; returns the exit code."""
    with output.show_notices(options.quiet):
        runner = start(options)
        if not runner.loaded.tokenizer.has_chat_template:
            raise MlxeffError(f"{options.model}: has no chat template: not a chat model; use mlxeff generate")
        chat = Chat(runner, _opening(options))
        if not options.quiet and sys.stdin.isatty():
            print(f"{options.model} on {runner.device}. /help lists the commands.", file=sys.stderr)
        while chat.turn():
            pass
    return 0


def _opening(options: argparse.Namespace) -> list[dict]:
    """The messages that the conversation begins with: those of a saved one, a system message, or none. Raises
    MlxeffError for a file that is no saved conversation."""
    if options.resume is None:
        return [{"role": "system", "content": options.system}] if options.system else []
    if options.system:
        raise MlxeffError("chat: wanted --system or --resume, got both: the saved conversation has its own")
    path = expand(options.resume)
    try:
        messages = json.loads(path.read_bytes())["messages"]
    except OSError as error:
        raise MlxeffError(f"{path}: cannot be read: {error.strerror or error}") from error
    except (ValueError, TypeError, LookupError) as error:
        raise MlxeffError(f"{path}: wanted a conversation that /save wrote, got something else") from error
    if not isinstance(messages, list) or not all(_is_message(message) for message in messages):
        raise MlxeffError(f"{path}: wanted messages with role and content, got others")
    return messages


def _is_message(message: object) -> bool:
    """Whether a JSON value is a message with role and content."""
    return isinstance(message, dict) and all(isinstance(message.get(key), str) for key in ("role", "content"))


def _ask() -> str | None:
    """The next line of standard input, None at its end. A terminal gets a prompt, line editing and a history."""
    if not sys.stdin.isatty():
        return _read_line()
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401 - importing it gives input() line editing and a history
    while True:
        try:
            if sys.stdout.isatty():
                return streams.require_text(input("> "), "standard input")
            print("> ", end="", file=sys.stderr, flush=True)  # standard output is a file or a pipe, for answers
            if (line := _read_line()) is None:
                print(file=sys.stderr)
            return line
        except EOFError:
            print()
            return None
        except UnicodeError as error:
            raise MlxeffError(f"standard input: wanted UTF-8 text, got {error}") from None
        except KeyboardInterrupt:
            print("\n(/exit or Ctrl-D ends)", file=sys.stderr)


def _read_line() -> str | None:
    """The next line of standard input as it was sent, None at its end."""
    data = streams.read_input(line=True)
    return streams.decode(data, "standard input").rstrip("\r\n") if data else None


@dataclass
class Chat:
    """A conversation: its messages, and the statistics of the answers."""

    runner: Runner
    messages: list[dict]  # with "role" and "content"
    last: dict | None = None  # `Runner.stats` of the last answer
    summary: list[str] = field(default_factory=list)  # statistics of the techniques for the last answer, in words
    totals: dict = field(default_factory=lambda: {"turns": 0, "prompt_tokens": 0, "reused_tokens": 0, "generated": 0})

    def turn(self) -> bool:
        """Ask for a line and take it; False ends the chat. No error and no Ctrl-C ends it, lest the conversation be
        lost: each is shown in one line. A reader of the output that went away does."""
        try:
            line = _ask()
        except MlxeffError as error:
            print(f"mlxeff: error: {error}", file=sys.stderr)
            return not getattr(sys.stdin, "was_closed", False)
        try:
            return line is not None and self.take(line)
        except BrokenPipeError:
            raise
        except KeyboardInterrupt:
            print("\n(interrupted)", file=sys.stderr)
        except Exception as error:
            print(f"mlxeff: error: {streams.explain(error)}", file=sys.stderr)
        return True

    def take(self, line: str) -> bool:
        """Run the command in a line, or answer its message; returns False where the chat should end."""
        word, _, rest = line.strip().partition(" ")
        if not word:
            return True
        if word in ("/exit", "/quit"):
            return False
        commands = {"/reset": self.reset, "/save": self.save, "/stats": self.stats, "/help": lambda _: print(HELP)}
        if word in commands:
            commands[word](rest.strip())
        elif word.startswith("//"):
            self.answer(line.lstrip()[1:])
        elif word.startswith("/") and word[1:].isalpha():
            raise MlxeffError(f"unknown command {word}; /help lists them; /{word} sends it as a message")
        else:
            self.answer(line)
        return True

    def answer(self, line: str) -> None:
        """Stream the answer to a message. Of an interrupted answer, the text that was generated is kept."""
        self.messages.append({"role": "user", "content": line})
        answer = Answer()
        try:
            ids = self._prompt_ids()
            with contextlib.closing(self.runner.stream(ids, answer)) as pieces:
                for text in pieces:
                    print(text, end="", flush=True)
        except KeyboardInterrupt:
            answer.interrupted = True
        except BaseException:
            self._keep(answer)
            raise
        if self._keep(answer):
            print()
            self._count(answer)
        else:
            print("\n(interrupted, the message is not part of the conversation)", file=sys.stderr)

    def _keep(self, answer: Answer) -> bool:
        """Add the answer to the conversation as far as it came; without any text its question is removed, and the
        result is False."""
        if answer.token_ids:
            self.messages.append({"role": "assistant", "content": answer.text})
        else:
            self.messages.pop()
        return bool(answer.token_ids)

    def _prompt_ids(self) -> list[int]:
        """Token ids of the conversation. With --truncate its oldest turns are dropped, with a notice, until it fits
        into the context."""
        options, loaded = self.runner.options, self.runner.loaded
        limit = options.context_limit or loaded.model.context_length
        render = functools.partial(loaded.tokenizer.apply_chat_template, special_in_text=options.special_in_text)
        ids = render(self.messages)
        room = min(max(options.max_tokens, 1), limit // 2) if limit else 0
        dropped = 0
        while limit and options.truncate and len(ids) > limit - room and self._drop_turn():
            dropped += 1
            ids = render(self.messages)
        if dropped:
            notices.warning(
                "the conversation is too long: dropped its %d oldest turns to fit %d tokens", dropped, limit
            )
        return ids

    def _drop_turn(self) -> bool:
        """Remove the oldest question with its answer; returns False where only the current question is left."""
        first = 1 if self.messages[0]["role"] == "system" else 0
        if len(self.messages) - first < 3:
            return False
        del self.messages[first : first + 2]
        return True

    def _count(self, answer: Answer) -> None:
        """Add an answer to the statistics, and say where it is not complete."""
        self.last, self.summary = self.runner.stats(answer), self.runner.setup.summary()
        self.totals["turns"] += 1
        for key in ("prompt_tokens", "reused_tokens"):
            self.totals[key] += self.last[key]
        self.totals["generated"] += self.last["generated_tokens"]
        if answer.interrupted:
            print("(interrupted)", file=sys.stderr)
        elif self.last["finish_reason"] in ("length", "memory"):
            print(f"(cut off after {self.last['generated_tokens']} tokens)", file=sys.stderr)

    def reset(self, _: str) -> None:
        """/reset: begin a new conversation with the same system message."""
        self.messages = [message for message in self.messages[:1] if message["role"] == "system"]
        print("(a new conversation)", file=sys.stderr)

    def save(self, name: str) -> None:
        """/save FILE: write the conversation to a new file."""
        if not name:
            raise MlxeffError("/save: wanted a file name")
        path = expand(name)
        document = {"model": self.runner.options.model, "messages": self.messages}
        try:
            if os.path.lexists(path):
                raise MlxeffError(f"{path}: wanted a new file, got one that exists")
            temporary = path.with_name(f".mlxeff-chat.{os.getpid()}")
            try:
                temporary.write_text(json_text(document, indent=2) + "\n", encoding="utf-8")
                os.rename(temporary, path)
            finally:
                with contextlib.suppress(OSError):
                    temporary.unlink(missing_ok=True)
        except (OSError, UnicodeError) as error:
            reason = getattr(error, "strerror", None) or error
            raise MlxeffError(f"{path}: cannot be written: {reason}") from error
        print(f"(saved {len(self.messages)} messages to {path})", file=sys.stderr)

    def stats(self, _: str) -> None:
        """/stats: print tokens and timings of the last answer and of the conversation."""
        if self.last is None:
            print("no answer yet")
            return
        cache = self.runner.session.cache
        cached, nbytes = (cache.length, cache.nbytes) if cache else (0, 0)
        print(output.timing_line(self.last, self.summary))
        print(
            f"conversation: {self.totals['turns']} turns, {self.totals['prompt_tokens']} prompt tokens"
            f" ({self.totals['reused_tokens']} from the cache), {self.totals['generated']} generated;"
            f" KV cache {cached} tokens, {nbytes / 1e6:.1f} MB"
        )
