"""Izar's engine against llama.cpp: the same file, the same threads, one sitting, in turns (A B A B), medians.

    cargo build --release && python3 tests/compare/llama.py                # the small model
    python3 tests/compare/llama.py --model shape.gguf --formats Q4_0       # another, see make_gguf.py

llama.cpp is given its best case: a native build, flash attention on or off and a joint or a separate cache as it runs
fastest (tried for each figure with the first file, before anything is counted), no sampling in its times (greedy
picking is in the JSON). Izar is measured through its whole engine, sampling included.
It lies here and is no test, because it asserts nothing: it prints figures.
"""

import argparse
import itertools
import json
import os
import pathlib
import random
import statistics
import subprocess
import sys
import time

import llamacpp

ROOT = pathlib.Path(__file__).resolve().parents[2]

# Which form of ours meets which format of theirs.
OURS = {"Q4_1": "int4", "Q4_0": "int4", "Q4_0-pure": "int4", "Q8_0": "int8"}


def arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=pathlib.Path, help="a GGUF file [default: the small model of `izar dev`]")
    parser.add_argument("--formats", default="Q4_1,Q4_0,Q4_0-pure,Q8_0", help="llama.cpp's; the file is converted")
    parser.add_argument("--prompt", type=int, default=128, help="tokens of a prompt")
    parser.add_argument("--batch", default="1,8,32", help="numbers of streams")
    parser.add_argument("--tokens", type=int, default=64, help="tokens that each stream decodes")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--izar", type=pathlib.Path, default=ROOT / "target/release/izar", help="the program")
    parser.add_argument("--izar-arguments", default="", help="more arguments for `izar bench engine`")
    parser.add_argument("--only", choices=["izar", "llama.cpp"], help="measure one side alone")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    options.batch = [int(n) for n in options.batch.split(",")]
    options.formats = options.formats.split(",")
    for name in options.formats:
        if name not in OURS:
            parser.error(f"--formats {name}: use {', '.join(OURS)}")
    return options


class Llama:
    """llama.cpp with one file."""

    # Flash attention, and one cache for all sequences.
    VARIANTS = list(itertools.product([True, False], [True, False]))

    def __init__(self, path, options, best):
        self.options = options
        self.model = llamacpp.Model(path)
        self.random = random.Random(1)
        # The variant for each number of streams; 0 is the first token.
        self.best = best
        # Contexts whose prompts are computed, and the first tokens of the answers.
        self.begun = {}

    def prompt(self):
        return [self.random.randrange(self.model.vocabulary) for _ in range(self.options.prompt)]

    def context(self, streams, variant):
        each = self.options.prompt + self.options.tokens + 1
        return llamacpp.Context(self.model, streams, each, self.options.threads, *variant)

    def first(self, context):
        """Seconds until the first token of a new prompt, and of the same prompt again."""
        prompt, last = self.prompt(), self.options.prompt - 1
        context.forget()
        cold = context.decode([(t, at, 0, at == last) for at, t in enumerate(prompt)])
        context.forget(0, last)
        return cold, context.decode([(prompt[last], last, 0, True)])

    def begin(self, streams, variant):
        """A context with a prompt for each stream, and the first tokens of the answers."""
        context, last, drawn = self.context(streams, variant), self.options.prompt - 1, []
        for sequence in range(streams):
            context.decode([(t, at, sequence, at == last) for at, t in enumerate(self.prompt())])
            drawn.append(int(context.logits(last).argmax()))
        return context, drawn

    def decode(self, context, drawn, tokens):
        """Tokens a second after the prompts, and the seconds that greedy picking took besides."""
        length, streams = self.options.prompt, len(drawn)
        for sequence in range(streams):
            context.forget(sequence, length)
        seconds = picking = 0.0
        for step in range(tokens):
            seconds += context.decode([(drawn[s], length + step, s, True) for s in range(streams)])
            begun = time.perf_counter()
            drawn = [int(context.logits(s).argmax()) for s in range(streams)]
            picking += time.perf_counter() - begun
        return streams * tokens / seconds, picking

    def choose(self):
        """Finds the fastest variant for each figure. Which it is depends on attention, so one file tells for all."""
        firsts, rates = {}, {streams: {} for streams in self.options.batch}
        for variant in self.VARIANTS:
            context = self.context(1, variant)
            firsts[variant] = min(self.first(context)[0] for _ in range(3))
            context.close()
            for streams in self.options.batch:
                context, drawn = self.begin(streams, variant)
                rates[streams][variant] = max(self.decode(context, drawn, 8)[0] for _ in range(2))
                context.close()
        self.best[0] = min(firsts, key=firsts.get)
        self.best.update({streams: max(each, key=each.get) for streams, each in rates.items()})

    def round(self):
        if not self.begun:
            self.begun[0] = self.context(1, self.best[0])
            # What is set up at first use is not counted.
            self.first(self.begun[0])
            self.begun.update({n: self.begin(n, self.best[n]) for n in self.options.batch})
        cold, again = self.first(self.begun[0])
        figures = {"prefill": self.options.prompt / cold, "ttft_ms": cold * 1e3, "again_ms": again * 1e3}
        for streams in self.options.batch:
            rate, picking = self.decode(*self.begun[streams], self.options.tokens)
            figures[f"decode {streams}"] = rate
            figures[f"picking {streams} ms a step"] = picking / self.options.tokens * 1e3
        return figures


def izar(path, quant, options):
    """One round of `izar bench engine`: the figures of `Llama.round`, and its whole report."""
    command = [str(options.izar), "bench", "engine", "--json", "--rounds", "1", "--model", str(path)]
    command += ["--quant", quant, "--threads", str(options.threads), "--prompt", str(options.prompt)]
    command += ["--batch", ",".join(map(str, options.batch)), "--tokens", str(options.tokens)]
    command += options.izar_arguments.split()
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        sys.exit(f"{' '.join(command)}: {done.stderr.strip()}")
    report = json.loads(done.stdout)
    figures = {
        "prefill": report["prefill_tokens_per_s"],
        "ttft_ms": report["ttft_ms"],
        "again_ms": report["ttft_again_ms"],
    }
    for row in report["decode"]:
        figures[f"decode {row['streams']}"] = row["tokens_per_s"]
    return figures, report


def say(what):
    print(f"{time.strftime('%H:%M:%S')} {what}", file=sys.stderr)


def medians(rounds):
    return {name: statistics.median(r[name] for r in rounds) for name in rounds[0]}


def ratios(ours, theirs):
    """How many times faster we are: rates as they are, times upside down."""
    both = [n for n in ours if n in theirs]
    return {n: theirs[n] / ours[n] if n.endswith("ms") else ours[n] / theirs[n] for n in both}


def table(result):
    columns = ["prefill", *[f"decode {n}" for n in result["batch"]], "ttft_ms", "again_ms"]
    width = max([24] + [len(r["name"]) for r in result["rows"]])
    lines = [" " * width + "".join(f"{c:>12}" for c in columns)]
    for row in result["rows"]:
        digits = 2 if row["ratio"] else 1
        cells = (f"{row['figures'][c]:12.{digits}f}" if c in row["figures"] else " " * 12 for c in columns)
        lines.append(f"{row['name']:<{width}}" + "".join(cells))
    return "\n".join(lines)


def main():
    llamacpp.enter()
    options = arguments()
    source = options.model or llamacpp.small_model()
    files, theirs, best = {}, {}, {}
    for name in options.formats:
        kind, _, pure = name.partition("-")
        own = source.stem.rsplit(".", 1)[-1] == kind and not pure
        files[name] = source if own else llamacpp.quantize(source, kind, pure == "pure")
    if options.only != "izar":
        theirs = {name: Llama(path, options, best) for name, path in files.items()}
        say("choosing the fastest variants of llama.cpp")
        next(iter(theirs.values())).choose()
    # Ours reads the file of its format; one run serves all formats of one form, from the first of them.
    ours = {OURS[name]: path for name, path in reversed(files.items())} if options.only != "llama.cpp" else {}
    rounds, reports = {}, {}
    for number in range(options.rounds):
        for name, llama in theirs.items():
            say(f"round {number + 1}: llama.cpp {name}")
            rounds.setdefault(f"llama.cpp {name}", []).append(llama.round())
        for quant, path in ours.items():
            say(f"round {number + 1}: izar {quant}")
            figures, reports[quant] = izar(path, quant, options)
            rounds.setdefault(f"izar {quant}", []).append(figures)
    figures = {name: medians(each) for name, each in rounds.items()}
    rows = [{"name": name, "ratio": False, "figures": f} for name, f in figures.items()]
    for name in theirs:
        if OURS[name] in ours:
            pair = ratios(figures[f"izar {OURS[name]}"], figures[f"llama.cpp {name}"])
            rows.append({"name": f"{OURS[name]} / {name}", "ratio": True, "figures": pair})
    result = {
        "model": source.name,
        "instruction_sets": llamacpp.instruction_sets(),
        "llama.cpp": llamacpp.PACKAGES[0],
        "system": llamacpp.system() if theirs else None,
        "threads": options.threads,
        "prompt": options.prompt,
        "tokens": options.tokens,
        "batch": options.batch,
        "rounds": options.rounds,
        "load_average": os.getloadavg(),
        "bytes": {name: llama.model.bytes for name, llama in theirs.items()},
        "variants": {str(n): {"flash": v[0], "unified": v[1]} for n, v in best.items()},
        "rows": rows,
        "all_rounds": rounds,
        "izar": reports,
    }
    if options.json:
        print(json.dumps(result, indent=2))
        return
    print(f"{source.name}, {options.threads} threads, {result['instruction_sets']}, medians of {options.rounds} rounds")
    print("prefill and decode in tokens/s, times in ms, again: the same prompt a second time; above 1 izar is faster")
    print(table(result))
    if os.getloadavg()[0] > options.threads + 0.7:
        say(f"other programs were running (load {os.getloadavg()[0]:.1f}): measure again on an idle machine")


if __name__ == "__main__":
    main()
