"""What llama.cpp makes of GGUF files: the ids of texts, greedy answers up to its own end tokens, and logits.

    python -m peers.answers        the task as JSON on standard input; the answer is the last line on standard output

Runs in the peers' environment. The task is {"files": [{"path", "prompt", "chat"}], "tokens": at most, "logits": ids}.
"""

import ctypes
import json
import sys

from peers.engines import LlamaCpp

CONTEXT = 256


def ids_of(engine: LlamaCpp, text: str, add_special: bool) -> list[int]:
    """The ids of a text in which control tokens count as such; `add_special`: with BOS where the file wants one."""
    data, room = text.encode(), (ctypes.c_int32 * CONTEXT)()
    vocabulary = engine.library.llama_model_get_vocab(engine.library.llama_get_model(engine.context))
    count = engine.library.llama_tokenize(vocabulary, data, len(data), room, CONTEXT, add_special, True)
    return list(room[:count])


def answer(engine: LlamaCpp, ids: list[int], limit: int) -> list[int]:
    """The greedy answer, its end token the last one."""
    vocabulary, found = engine.library.llama_model_get_vocab(engine.library.llama_get_model(engine.context)), []
    for token in engine.generate(ids, limit):
        found.append(token)
        if engine.library.llama_vocab_is_eog(vocabulary, token):
            break
    return found


def examine(file: dict, limit: int, shown: list[int]) -> dict:
    """{"prompt", "chat": ids; "answer", "chat_answer": ids; "logits": those of `shown` after the prompt}"""
    options = {"path": file["path"], "threads": 1, "context": CONTEXT, "options": {"flash_attention": False}}
    engine = LlamaCpp(options)
    prompt, chat = ids_of(engine, file["prompt"], True), ids_of(engine, file["chat"], False)
    logits = engine.logits([prompt])[-1]
    return {
        "prompt": prompt,
        "chat": chat,
        "answer": answer(engine, prompt, limit),
        "chat_answer": answer(engine, chat, limit),
        "logits": [round(float(logits[token]), 3) for token in shown],
    }


def main() -> None:
    task = json.load(sys.stdin)
    print(json.dumps({"files": [examine(file, task["tokens"], task["logits"]) for file in task["files"]]}))


if __name__ == "__main__":
    main()
