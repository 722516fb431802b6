"""What a person's programs do with a model file, each in a process of its own.

Rule: imports come before the clock. The process prints `ready`, waits for a line, acts on it, and prints one
line of JSON with `seconds`; so two files are compared by what reading them costs, not by what starting Python
costs. Each line on stdin is a path to act on.

    python runtimes.py first-byte|metadata|tokens [ARG]
    python runtimes.py layer LAYER-PREFIX
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path

TOKENS = 16


def first_byte() -> Callable[[str], dict[str, object]]:
    def act(path: str) -> dict[str, object]:
        with open(path, "rb", buffering=0) as file:
            return {"byte": file.read(1).hex()}

    return act


def metadata() -> Callable[[str], dict[str, object]]:
    import gguf

    def act(path: str) -> dict[str, object]:
        reader = gguf.GGUFReader(path)
        fields = ("general.architecture", "llama.block_count", "llama.embedding_length")
        found = {name: reader.fields[name].contents() for name in fields}
        return {"fields": found, "tensors": len(reader.tensors)}

    return act


def layer(prefix: str) -> Callable[[str], dict[str, object]]:
    from safetensors import safe_open

    def act(path: str) -> dict[str, object]:
        whole = hashlib.sha256()
        count = nbytes = 0
        with safe_open(path, framework="numpy") as model:
            for name in model.keys():  # noqa: SIM118  not a dict
                if name.startswith(prefix):
                    values = model.get_tensor(name)
                    whole.update(name.encode() + values.tobytes())
                    count += 1
                    nbytes += values.nbytes
        return {"tensors": count, "bytes": nbytes, "sha256": whole.hexdigest()}

    return act


def tokens(mode: str = "MMAP") -> Callable[[str], dict[str, object]]:
    import xllamacpp

    def act(path: str) -> dict[str, object]:
        started = time.monotonic()
        params = xllamacpp.CommonParams()
        params.model.path = path
        params.n_predict = TOKENS
        params.n_ctx = 128
        params.warmup = False
        params.n_parallel = 1
        params.cpuparams.n_threads = 2
        params.fit_params = False
        params.port = 0
        params.load_mode = getattr(xllamacpp.llama_load_mode, f"LLAMA_LOAD_MODE_{mode}")
        server = xllamacpp.Server(params)
        loaded = time.monotonic() - started
        times: list[float] = []
        texts: list[str] = []

        def on_token(piece: dict[str, list[dict[str, str]]]) -> bool:
            times.append(time.monotonic() - started)
            texts.append(piece["choices"][0]["text"])
            return False

        question = {"prompt": "hello", "max_tokens": TOKENS, "temperature": 0, "seed": 1, "stream": True}
        server.handle_completions(question, on_token)
        return {"loaded": loaded, "first": times[0], "text": "".join(texts), "pieces": len(texts)}

    return act


ACTS: dict[str, Callable[..., Callable[[str], dict[str, object]]]] = {
    "first-byte": first_byte,
    "metadata": metadata,
    "layer": layer,
    "tokens": tokens,
}


def main() -> None:
    act = ACTS[sys.argv[1]](*sys.argv[2:])
    # llama.cpp writes to file descriptor 1 as well: what we answer goes to a copy of it, the rest to stderr.
    with os.fdopen(os.dup(1), "w", buffering=1) as answer:
        os.dup2(2, 1)
        print("ready", file=answer)
        for line in sys.stdin:
            started = time.monotonic()
            found = act(str(Path(line.strip())))
            print(json.dumps({"seconds": time.monotonic() - started, **found}), file=answer)


if __name__ == "__main__":
    main()
