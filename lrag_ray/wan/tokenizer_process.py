"""A stranger's tokenizer in a process of its own, with a limit for its memory and its time.

A tokenizer.json of 16 MB can take 6 GB while it is loaded, a chain of replacements in it makes terabytes of one letter,
and a chat template can loop for ever, so none of these happens in the process of a worker. The child speaks JSON, one
line for each request.
"""

from __future__ import annotations

import json
import os
import select
import subprocess
import sys
import threading
import weakref
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

MOST_BYTES = 4 << 30
"""Memory of the child beyond what its imports take; umT5's vocabulary needs 0.7 GB. On Linux alone."""
LOAD_S, ENCODE_S = 300.0, 60.0
"""Longest wait for the child to be ready, and for one answer."""
MOST_TOKENS = 1 << 17
"""Of a conversation. No chat model here reads longer ones, and attention over them takes memory without a limit."""
_MOST_TEXT = 1 << 22
"""Characters that a template or a decoder may make."""
_PASSED_ON = ("PATH", "HOME", "TMPDIR", "LANG", "LC_ALL", "LD_LIBRARY_PATH", "SYSTEMROOT")


class TokenizerError(Exception):
    """A tokenizer that cannot be loaded, or not used within its limits; the text says why."""


class TokenizerProcess:
    """What a folder's tokenizer and chat template make of texts; the process ends with the object."""

    def __init__(self, folder: Path) -> None:
        """Raises TokenizerError where the tokenizer does not load within the limits."""
        kept = {name: os.environ[name] for name in _PASSED_ON if name in os.environ}
        # A session of its own, so that Ctrl-C reaches this process alone.
        self._process = subprocess.Popen(
            [sys.executable, "-P", __file__, str(folder), str(MOST_BYTES)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env=kept | {"PYTHONPATH": os.pathsep.join(sys.path), "TOKENIZERS_PARALLELISM": "false"},
            start_new_session=True,
        )
        self._lock = threading.Lock()
        self._end = weakref.finalize(self, _end, self._process)
        self._answer(LOAD_S)

    def tokens(self, text: str, most: int) -> list[int]:
        """Token ids of a text, at most `most`, end of text included. TokenizerError."""
        return [int(token) for token in self._asked("tokens", text, most)]

    def rendered(self, messages: Sequence[Mapping[str, Any]], template: str) -> str:
        """A conversation as a Jinja template writes it, up to the beginning of the answer.

        It has at most `MOST_TOKENS`. TokenizerError.
        """
        return str(self._asked("rendered", messages, template)[0])

    def decoded(self, tokens: Sequence[int]) -> str:
        """The text of token ids, without special tokens. TokenizerError."""
        return str(self._asked("decoded", tokens)[0])

    def _asked(self, *request: Any) -> list[Any]:
        with self._lock:
            try:
                assert self._process.stdin is not None
                self._process.stdin.write(json.dumps(request).encode() + b"\n")
                self._process.stdin.flush()
            except (OSError, ValueError):
                raise TokenizerError("its process has ended") from None
            return self._answer(ENCODE_S)

    def _answer(self, timeout_s: float) -> list[Any]:
        stream = self._process.stdout
        assert stream is not None
        readable, _, _ = select.select([stream], [], [], timeout_s)
        line = stream.readline() if readable else b""
        if not line:
            self._end()
            limit = f"{MOST_BYTES / 2**30:g} GiB of memory" if readable else f"{timeout_s:g} s"
            raise TokenizerError(f"it takes more than {limit}, as no published tokenizer does")
        answer = json.loads(line)
        if isinstance(answer, str):
            raise TokenizerError(answer)
        return list(answer)


def _end(process: subprocess.Popen[bytes]) -> None:
    process.kill()
    for stream in (process.stdin, process.stdout):
        assert stream is not None
        try:
            stream.close()
        except OSError:
            # What was not written yet.
            continue
    process.wait()


def _serve(folder: str, most_bytes: int) -> None:
    """In the child: load, say so, and answer every line of the standard input."""
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    # Libraries print.
    os.dup2(2, 1)

    def say(answer: object) -> None:
        answers.write(json.dumps(answer) + "\n")
        answers.flush()

    def failure(error: Exception) -> str:
        return (str(error).splitlines() or [type(error).__name__])[0][:500]

    # Tokenizers need no torch, whose import would take longer than all else here.
    sys.modules["torch"] = None  # type: ignore[assignment]
    try:
        from transformers import AutoTokenizer

        _limit_memory(most_bytes)
        tokenizer: Any = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # noqa: BLE001 - the library raises anything over files that are not its own
        say(failure(error))
        return
    say([])
    for line in sys.stdin.buffer:
        what, *arguments = json.loads(line)
        try:
            say(_OPERATIONS[what](tokenizer, *arguments))
        except Exception as error:  # noqa: BLE001 - as above
            say(failure(error))


def _tokens(tokenizer: Any, text: str, most: int) -> Any:
    return tokenizer(text, truncation=True, max_length=most, add_special_tokens=True)["input_ids"]


def _rendered(tokenizer: Any, messages: list[Any], template: str) -> list[str]:
    text = tokenizer.apply_chat_template(messages, chat_template=template, add_generation_prompt=True, tokenize=False)
    _refuse_long(text)
    if (tokens := len(tokenizer(text, add_special_tokens=False)["input_ids"])) > MOST_TOKENS:
        raise ValueError(f"it makes {tokens:,} tokens of the messages, and at most {MOST_TOKENS:,} are read")
    return [text]


def _decoded(tokenizer: Any, tokens: list[int]) -> list[str]:
    text = tokenizer.decode(tokens, skip_special_tokens=True)
    _refuse_long(text)
    return [text]


def _refuse_long(text: str) -> None:
    if len(text) > _MOST_TEXT:
        raise ValueError(f"it makes a text of {len(text):,} characters, and at most {_MOST_TEXT:,} are read")


_OPERATIONS: dict[str, Callable[..., Any]] = {"tokens": _tokens, "rendered": _rendered, "decoded": _decoded}


def _limit_memory(most_bytes: int) -> None:
    try:
        with open("/proc/self/statm", encoding="ascii") as statm:  # noqa: PTH123 - no further import
            taken = int(statm.read().split()[0]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        return
    import resource

    resource.setrlimit(resource.RLIMIT_AS, (taken + most_bytes, taken + most_bytes))


if __name__ == "__main__":
    _serve(sys.argv[1], int(sys.argv[2]))
