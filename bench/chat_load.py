"""Many clients that stream answers at once: is any lost, are they treated alike, how long do they wait?

    uv run bench/chat_load.py                                    64 clients for a minute, a scripted model
    uv run bench/chat_load.py --clients 64 --places 16           more clients than places: they wait in line
    uv run bench/chat_load.py --url http://127.0.0.1:8000        the server that runs there, with its own model

The scripted model writes a word every --pause seconds, each answer in a thread of its own, so what is measured is the
server: a process with one event loop; the clients are another one. With a scripted model each answer is compared with
what it must be; with any model it must end with its reason, its number of tokens and [DONE].
"""

import argparse
import asyncio
import json
import os
import re
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "support")]

from scripted import ScriptedModel, pieces

from onechip.server import serve
from onechip.tables import table
from onechip.webguard import USUAL_LIMITS, Door

KEY = "ONECHIP_API_KEY"


class Answer(NamedTuple):
    """One answer: when it was asked for, times of its events after that, in seconds, its words and what went wrong."""

    asked: float
    times: list
    tokens: int
    problem: str


def story(number, words):
    """The answer of the scripted model to one question."""
    return " ".join(f"w{number}-{i}" for i in range(words))


def serve_scripted(arguments):
    """Serves a scripted model until the process is ended."""
    script = lambda prompt: pieces(story(prompt[-1]["content"], arguments.words))
    model = ScriptedModel(script, arguments.pause, arguments.places, context=arguments.words + 100)
    limits = USUAL_LIMITS._replace(waiting=max(arguments.clients, 1), queue_seconds=600)
    serve(model.talker(), Door(port=0), limits)


def start_server(arguments):
    """(process, address) of a server with the scripted model."""
    flags = [f"--{name}={getattr(arguments, name)}" for name in ("clients", "places", "words", "pause")]
    command = [sys.executable, __file__, "--serve", *flags]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    return process, re.search(r"at (http://\S+);", process.stdout.readline())[1]


def request_bytes(question, most):
    """A request as it is sent."""
    body = {"stream": True, "stream_options": {"include_usage": True}, "max_tokens": most}
    raw = json.dumps(body | {"messages": [{"role": "user", "content": question}]}).encode()
    key = f"Authorization: Bearer {os.environ[KEY]}\r\n" if os.environ.get(KEY) else ""
    head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\n{key}Content-Type: application/json\r\n"
    return f"{head}Connection: close\r\nContent-Length: {len(raw)}\r\n\r\n".encode() + raw


async def ask(address, question, expected, most):
    """Asks one question; an Answer. expected: its text, None for any."""
    host, port = address.removeprefix("http://").split(":")
    asked, times, text, tokens, reason, done = time.monotonic(), [], "", 0, None, False
    try:
        reader, writer = await asyncio.open_connection(host, int(port))
        writer.write(request_bytes(question, most))
        status = (await reader.readline()).decode()
        async for line in reader:
            if line.startswith(b"data: {"):
                event = json.loads(line[6:])
                tokens = (event.get("usage") or {}).get("completion_tokens", tokens)
                for choice in event["choices"]:
                    if choice["delta"].get("content"):
                        times.append(time.monotonic() - asked)
                        text += choice["delta"]["content"]
                    reason = choice["finish_reason"] or reason
            done = done or line.startswith(b"data: [DONE]")
        writer.close()
    except (OSError, ValueError, KeyError, asyncio.IncompleteReadError) as error:
        return Answer(asked, times, tokens, f"{type(error).__name__}: {error}")
    right = done and reason in ("stop", "length") and tokens > 0 and (expected is None or text == expected)
    return Answer(asked, times, tokens, "" if right else f"{status.strip()} {text[:40]!r} {reason} {done}")


async def run_client(number, address, arguments, end):
    """Asks question after question until the time `end`; a list of Answers."""
    answers = []
    while time.monotonic() < end:
        name = f"{number}.{len(answers)}"
        question, expected = (arguments.question, None) if arguments.url else (name, story(name, arguments.words))
        answers.append(await ask(address, question, expected, arguments.words))
    return answers


async def run_clients(address, arguments):
    """The Answers of all clients, a list for each."""
    end = time.monotonic() + arguments.seconds
    return await asyncio.gather(*(run_client(i, address, arguments, end) for i in range(arguments.clients)))


def percentiles(values):
    """Median, 95 %, 99 % and the largest, in milliseconds."""
    values = sorted(values)
    at = [values[min(int(share * len(values)), len(values) - 1)] for share in (0.5, 0.95, 0.99, 1.0)]
    return [f"{1000 * value:.0f}" for value in at]


def report(clients, seconds, cpu):
    """Prints what happened. cpu: CPU seconds of (server, clients), None where it is not known."""
    answers = [answer for client in clients for answer in client]
    lost = [answer for answer in answers if answer.problem]
    each = [sum(answer.tokens for answer in client) for client in clients]
    fairness = sum(each) ** 2 / (len(each) * sum(n * n for n in each)) if any(each) else 0.0
    gaps = [b - a for answer in answers for a, b in zip(answer.times, answer.times[1:], strict=False)]
    print(f"{len(clients)} clients, {seconds:.0f} s: {len(answers)} answers, {len(lost)} lost")
    for answer in lost[:5]:
        print(f"  lost: {answer.problem}")
    print(f"tokens: {sum(each):,} in all, {sum(each) / seconds:,.0f} per second")
    spread = f"{min(each)} / {statistics.median(each):.0f} / {max(each)}"
    print(f"tokens of a client: {spread} (least / median / most); Jain's fairness {fairness:.4f}")
    firsts = [answer.times[0] for answer in answers if answer.times]
    if firsts and gaps:
        rows = [["to the first text", *percentiles(firsts)], ["between pieces of text", *percentiles(gaps)]]
        print(table(rows, ["ms", "median", "95 %", "99 %", "most"], "<22 >6"))
    print("CPU seconds: " + ", ".join(f"{who} {used:.1f}" for who, used in cpu.items() if used is not None))
    return not lost


def cpu_seconds(process):
    """CPU time of a process so far; None if the kernel does not say."""
    try:
        fields = Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--places", type=int, default=64, help="answers at once, of the scripted model")
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--words", type=int, default=100, help="of an answer; the most tokens with --url")
    parser.add_argument("--pause", type=float, default=0.04, help="seconds before each word of the scripted model")
    parser.add_argument("--url", help=f"of a server that runs; its key, if it has one, is read from {KEY}")
    parser.add_argument("--question", default="Tell me a story.", help="what a server at --url is asked")
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.serve:
        return serve_scripted(arguments)
    process, address = (None, arguments.url.rstrip("/")) if arguments.url else start_server(arguments)
    start = time.monotonic()
    clients = asyncio.run(run_clients(address, arguments))
    used = {"server": cpu_seconds(process) if process else None, "clients": time.process_time()}
    good = report(clients, time.monotonic() - start, used)
    if process:
        process.terminate()
        good &= process.wait(30) == 0
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
