"""Many clients at once against `landmark serve`: what they get, how soon, and whether the server grows.

usage: serve.py BINARY MODEL [--clients 200] [--seconds 60] [--tokens 32] [--json FILE]

Most clients stream completions, one after the other; told 429 they wait as long as they are told. Some leave after the first token, send half a
request, send it a byte at a time, announce 100 MB, or ask for what cannot be. Ends with an error if an honest request gets anything but 200 and
429, a bad one anything but 4xx, or if the server's memory grew by more than a tenth from the second third of the time to the last.
"""

import argparse
import asyncio
import collections
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time

WORDS = "the old house stood on a hill and nobody had lived in it since the war came to the village in the valley below".split()

# Each of them is wrong: bodies of /v1/completions.
BAD = [
    b"{", b"null", b"[]", b"\xff\xfe", b"[" * 100_000, b'{"prompt": "a", "prompt": "b"}', b'{"prompt": {"a": 1}}', b'{"prompt": [-1]}', b'{"prompt": [99999999]}',
    b'{"prompt": "a", "max_tokens": -1}', b'{"prompt": "a", "max_tokens": 1e400}', b'{"prompt": "a", "max_tokens": 99999999999999999999}', b'{"prompt": "a", "temperature": -1}',
    b'{"prompt": "a", "temperature": 1e300}', b'{"prompt": "a", "temperature": NaN}', b'{"prompt": "a", "top_p": 2}', b'{"prompt": "a", "top_p": -0.5}', b'{"prompt": "a", "n": 0}',
    b'{"prompt": "a", "n": 1000000}', b'{"prompt": "a", "stop": [1]}', b'{"prompt": "a", "seed": "x"}', b'{"prompt": "a", "stream": 7}', b'{"prompt": "a", "logprobs": -3}',
    b'{"prompt": "a", "session": "../../etc"}', b'{"prompt": "a", "no_such_field": 1}', b'{"prompt": "' + b"a" * 9_000_000 + b'"}',
]


def head(body, length=None):
    length = len(body) if length is None else length
    return b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n" % length


class Load:
    def __init__(self, port, tokens, until):
        self.port, self.tokens, self.until = port, tokens, until
        self.statuses = collections.Counter()
        self.first, self.whole, self.written, self.wrong = [], [], 0, []

    async def client(self, number):
        draw = random.Random(number)
        kinds = [self.stream] * 90 + [self.leave] * 4 + [self.half] * 2 + [self.slow] * 1 + [self.huge] * 1 + [self.bad] * 2
        while time.monotonic() < self.until:
            kind = draw.choice(kinds)
            try:
                status = await asyncio.wait_for(kind(draw), 120)
            except (OSError, asyncio.IncompleteReadError, asyncio.TimeoutError) as error:
                status = type(error).__name__
            expected = {"bad": status in range(400, 500), "huge": status in (413, 429), "half": status is None, "leave": status in (None, 200, 429)}
            name = kind.__name__
            self.statuses[name, status] += 1
            if not expected.get(name, status in (200, 429)):
                self.wrong.append((name, status))
            if status == 429:
                await asyncio.sleep(1 + draw.random())

    def body(self, draw):
        prompt = " ".join(draw.choices(WORDS, k=draw.randrange(5, 200)))
        return json.dumps({"prompt": prompt, "max_tokens": self.tokens, "temperature": 0.8, "seed": draw.randrange(10**6), "stream": True}).encode()

    async def status(self, reader):
        line = await reader.readuntil(b"\r\n")
        await reader.readuntil(b"\r\n\r\n")
        return int(line.split()[1])

    async def connect(self):
        return await asyncio.open_connection("127.0.0.1", self.port)

    async def stream(self, draw, leaves=False, slow=False):
        reader, writer = await self.connect()
        try:
            begun = time.monotonic()
            body = self.body(draw)
            if slow:
                for byte in (head(body) + body)[:30]:
                    writer.write(bytes([byte]))
                    await asyncio.sleep(0.1)
                writer.write((head(body) + body)[30:])
            else:
                writer.write(head(body) + body)
            await writer.drain()
            status = await self.status(reader)
            if status != 200:
                return status
            events, rest = 0, b""
            while part := await reader.read(1 << 16):
                *lines, rest = (rest + part).split(b"\n")
                found = sum(line.startswith(b"data: {") for line in lines)
                if found and not events and not slow:
                    self.first.append(time.monotonic() - begun)
                events += found
                if any(b'"error"' in line for line in lines):
                    return "error in the stream"
                if events and leaves:
                    return None
                if b"data: [DONE]" in lines:
                    self.written += self.tokens
                    if not slow:
                        self.whole.append(time.monotonic() - begun)
                    return 200
            return "a stream without an end"
        finally:
            writer.close()

    async def leave(self, draw):
        return await self.stream(draw, leaves=True)

    async def slow(self, draw):
        return await self.stream(draw, slow=True)

    async def half(self, draw):
        _, writer = await self.connect()
        body = self.body(draw)
        writer.write(draw.choice([head(body)[:40], head(body), head(body) + body[:20]]))
        await writer.drain()
        await asyncio.sleep(draw.random())
        writer.close()

    async def huge(self, draw):
        reader, writer = await self.connect()
        try:
            writer.write(head(b"", 100_000_000) + b" " * 1_000_000)
            return await self.status(reader)
        finally:
            writer.close()

    async def bad(self, draw):
        reader, writer = await self.connect()
        try:
            body = draw.choice(BAD)
            writer.write(head(body) + body)
            return await self.status(reader)
        finally:
            writer.close()


def memory(pid):
    with open(f"/proc/{pid}/status") as file:
        return next(int(line.split()[1]) // 1024 for line in file if line.startswith("VmRSS"))


def percentile(values, share):
    values = sorted(values)
    return values[min(len(values) - 1, int(share * len(values)))] if values else float("nan")


async def run(args, port, pid):
    load = Load(port, args.tokens, time.monotonic() + args.seconds)
    rss = []

    async def watch():
        while time.monotonic() < load.until:
            rss.append(memory(pid))
            await asyncio.sleep(1)

    begun = time.monotonic()
    await asyncio.gather(watch(), *(load.client(number) for number in range(args.clients)))
    return load, rss, time.monotonic() - begun


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("binary")
    parser.add_argument("model")
    parser.add_argument("--clients", type=int, default=200)
    parser.add_argument("--seconds", type=int, default=60)
    parser.add_argument("--tokens", type=int, default=32, help="that each request asks for")
    parser.add_argument("--json")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        command = [args.binary, "serve", "--checkpoint", args.model, "--sessions", folder, "--port", "0", "--device", "cpu"]
        server = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        try:
            port = int(server.stdout.readline().split("http://")[1].split("/")[0].rsplit(":", 1)[1])
            load, rss, seconds = asyncio.run(run(args, port, server.pid))
            after = memory(server.pid)
            server.send_signal(signal.SIGTERM)
            code = server.wait(60)
        finally:
            server.kill()
    third = len(rss) // 3
    parts = [max(part, default=0) for part in (rss[:third], rss[third : 2 * third], rss[2 * third :])]
    print("| what | status | requests |\n| --- | --- | ---: |")
    for (kind, status), count in sorted(load.statuses.items(), key=str):
        print(f"| {kind} | {'left' if status is None else status} | {count:,} |")
    figures = {
        "clients": args.clients, "seconds": seconds, "answered": len(load.whole), "written_tok_per_s": load.written / seconds,
        "first_token_s": {"p50": percentile(load.first, 0.5), "p99": percentile(load.first, 0.99)},
        "whole_s": {"p50": percentile(load.whole, 0.5), "p99": percentile(load.whole, 0.99)},
        "rss_mb": {"thirds": parts, "after": after}, "exit_code": code,
    }
    first, whole = figures["first_token_s"], figures["whole_s"]
    print(f"\n{len(load.whole):,} completions of {args.tokens} tokens in {seconds:.0f} s: {figures['written_tok_per_s']:,.0f} tok/s")
    print(f"first token: p50 {first['p50']:.2f} s, p99 {first['p99']:.2f} s; all of it: p50 {whole['p50']:.2f} s, p99 {whole['p99']:.2f} s")
    print(f"RSS, at most, in each third of the time: {parts} MB; after it {after} MB")
    if args.json:
        with open(args.json, "w") as file:
            json.dump(figures | {"requests": [[kind, status, count] for (kind, status), count in load.statuses.items()]}, file)
    problems = [f"{kind}: {status}" for kind, status in sorted(set(load.wrong), key=str)]
    if parts[2] > 1.1 * parts[1]:
        problems.append(f"the server grew from {parts[1]} to {parts[2]} MB")
    if code != 0:
        problems.append(f"the server ended with {code}")
    sys.exit("; ".join(problems) if problems else 0)


if __name__ == "__main__":
    main()
