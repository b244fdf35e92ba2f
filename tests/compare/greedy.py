"""Greedy answers of Izar and of llama.cpp to the same prompts, from the same file.

    cargo build --release && python3 tests/compare/greedy.py

Both take the likeliest token each time. Two correct programs may part where two tokens are almost equally likely, for
each rounds in its own way. So an answer passes if it is equal, or if it parts at a place where the two best tokens lie,
by the weights in f32, no further apart than 3 times the median error that quantization makes in such logits. Medians
and every gap are shown; `izar bench greedy` computes them. The exit status is 1 if an answer does not pass.
"""

import argparse
import json
import pathlib
import subprocess
import sys
import tempfile

import llamacpp

HERE = pathlib.Path(__file__).resolve().parent
IZAR = HERE.parents[1] / "target/release/izar"


def arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=pathlib.Path, help="a GGUF file [default: the small model of `izar dev`]")
    parser.add_argument("--prompts", type=pathlib.Path, default=HERE / "prompts.txt", help="one a line")
    parser.add_argument("--tokens", type=int, default=48, help="tokens of an answer")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--quant", default="int4", help="the form of our weights")
    parser.add_argument("--izar", type=pathlib.Path, default=IZAR, help="the program")
    parser.add_argument("--izar-arguments", default="", help="more arguments for `izar bench greedy`")
    parser.add_argument("--json", action="store_true")
    return parser.parse_args()


def answer(context, prompt, tokens):
    """llama.cpp's greedy answer, and the two best tokens each time with their logits. An end token is the last one."""
    context.forget()
    context.decode([(t, at, 0, at == len(prompt) - 1) for at, t in enumerate(prompt)])
    out, best, row = [], [], len(prompt) - 1
    while len(out) < tokens:
        logits = context.logits(row)
        second, first = (int(t) for t in logits.argsort(kind="stable")[-2:])
        best.append([[t, float(logits[t])] for t in (first, second)])
        out.append(first)
        if context.model.ends(first):
            break
        context.decode([(first, len(prompt) + len(out) - 1, 0, True)])
        row = 0
    return {"prompt": prompt, "answer": out, "best": best}


def main():
    llamacpp.enter()
    options = arguments()
    path = options.model or llamacpp.small_model()
    model = llamacpp.Model(path)
    prompts = [line for line in options.prompts.read_text().splitlines() if line.strip()]
    context = llamacpp.Context(model, 1, 1024, options.threads, flash=False, unified=True)
    answers = []
    for text in prompts:
        answers.append({"text": text, **answer(context, model.tokenize(text), options.tokens)})
    with tempfile.NamedTemporaryFile("w", suffix=".json") as file:
        json.dump(answers, file)
        file.flush()
        command = [str(options.izar), "bench", "greedy", "--model", str(path), "--against", file.name]
        command += ["--quant", options.quant, "--threads", str(options.threads), *options.izar_arguments.split()]
        sys.exit(subprocess.run(command + ["--json"] * options.json).returncode)


if __name__ == "__main__":
    main()
