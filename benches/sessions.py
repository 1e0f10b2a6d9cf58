"""What a session costs as it grows: tokens a second of appending by the million, memory, and milliseconds of a token when it is asked.

usage: sessions.py BINARY MODEL TEXT WORK [--millions 10] [--adapter FOLDER] [--device cuda] [--block_dtype int8] [--ram 512MiB] [--gpu_memory 2GiB]
                   [--turns 6] [--json FILE] [--plot FILE]

WORK is a folder with room for 4.1 GB a million tokens of landmark-12m in int8, 24 GB of SmolLM2-135M in bfloat16. Sessions of 4,000 and 64,000 tokens and of a million are asked, then
the last is appended to in one go, and right after it a fresh session's first million, since a machine that is shared changes its speed in the hour between; then the long one is asked
again, warm and, where the page cache can be dropped, cold. At last the shortest and the longest are asked in turn, so that both meet the same moments of the machine: of these asks are the
medians below the table. Nothing else should run. What was appended stays in WORK and is not appended again.
--plot draws an SVG, and needs matplotlib.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time

MILLION = 1_000_000


def command(args, action, session, *rest):
    reading = ("device", "ram", "gpu_memory")
    names = {"create": ("adapter", "device", "block_dtype"), "append": reading, "ask": reading}.get(action, ())
    flags = [part for name in names if getattr(args, name) for part in (f"--{name}", getattr(args, name))]
    return [args.binary, "session", action, session, *rest, *flags]


def tokens(args, session):
    """What a session has, also while it is appended to."""
    listed = subprocess.run(command(args, "list", args.work, "--json"), capture_output=True, text=True, check=True)
    sessions = [json.loads(line) for line in listed.stdout.splitlines()]
    return next(each["tokens"] for each in sessions if os.path.basename(each["session"]) == os.path.basename(session))


def memory(pid):
    """The most that a process has had, in MB; None if it has ended."""
    try:
        with open(f"/proc/{pid}/status") as file:
            return next(int(line.split()[1]) // 1024 for line in file if line.startswith("VmHWM"))
    except (OSError, StopIteration):
        return None


def append(args, session, until):
    """Yields a row for each million that is read, and one for the end."""
    if not os.path.isdir(session):
        subprocess.run(command(args, "create", session, "--checkpoint", args.model), check=True)
    have = tokens(args, session)
    if have >= until:
        return
    rest = ["--file", args.text, "--skip_tokens", str(have), "--max_tokens", str(until - have)]
    log = os.path.join(args.work, "append.log")
    with open(log, "w") as file:
        process = subprocess.Popen(command(args, "append", session, *rest), stderr=file)
    last, most = (time.time(), have), 0
    while process.poll() is None:
        time.sleep(1)
        most = memory(process.pid) or most
        now, here = time.time(), tokens(args, session)
        if here // MILLION > last[1] // MILLION or process.poll() is not None:
            yield {"tokens": here, "from": last[1], "append_tok_per_s": round((here - last[1]) / (now - last[0])), "append_MB": most}
            last = (now, here)
    if process.returncode:
        sys.exit(f"append ended with {process.returncode}: see {log}")


def ask(args, session, what):
    rest = ["--prompt", "The man said", "--temperature", "0", "--max_new_tokens", "100", "--json"]
    process = subprocess.Popen(command(args, "ask", session, *rest), stdout=subprocess.PIPE, text=True)
    lines = process.stdout.read().splitlines()
    _, status, used = os.wait4(process.pid, 0)
    if status:
        sys.exit(f"ask ended with {os.waitstatus_to_exitcode(status)}")
    answer = json.loads(lines[-1])
    return {
        "tokens": answer["session_tokens"], "asked": what, "first_token_s": round(answer["seconds_to_first_token"], 3),
        "ms_per_token": round(answer["milliseconds_per_token"], 2), "ask_MB": used.ru_maxrss // 1024,
    }  # fmt: skip


def rows(args):
    shortest = os.path.join(args.work, "4000")
    for until in sorted({4000, 64000, MILLION, args.millions * MILLION}):
        session = os.path.join(args.work, "long" if until >= MILLION else str(until))
        yield from append(args, session, until)
        if until > MILLION:
            yield from append(args, os.path.join(args.work, "fresh"), MILLION)
        for what in ("first", "again", "again"):
            yield ask(args, session, what)
    try:
        os.sync()
        with open("/proc/sys/vm/drop_caches", "w") as file:
            file.write("3")
    except OSError as error:
        print(f"the page cache is not dropped: {error}", file=sys.stderr)
    else:
        yield ask(args, session, "cold")
    for _ in range(args.turns):
        for each in (shortest, session):
            yield ask(args, each, "in turn")


def in_turn(rows):
    """What a token of the shortest and of the longest session cost when they were asked in turn."""
    asked = {}
    for row in rows:
        if row.get("asked") == "in turn":
            asked.setdefault(row["tokens"], []).append(row["ms_per_token"])
    (few, of_few), (many, of_many) = sorted(asked.items())
    short, long = statistics.median(of_few), statistics.median(of_many)
    print(f"in turn, medians of {len(of_few)}: {short:.2f} ms a token at {few:,} tokens and {long:.2f} at {many:,}, which is {long / short:.2f} times as long")


def plot(path, rows):
    import matplotlib

    matplotlib.use("svg")
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(10, 3.6), layout="constrained")
    # Of the session that grows: the rate of each stretch, over that stretch.
    appended = [row for row in rows if "append_tok_per_s" in row and row["tokens"] >= MILLION]
    for row in appended:
        left.plot([row["from"] / MILLION, row["tokens"] / MILLION], [row["append_tok_per_s"]] * 2, color="tab:blue", linewidth=3)
    left.set(title="Appending", xlabel="million tokens in the session", ylabel="tokens a second", ylim=(0, None))
    asked = [row for row in rows if "asked" in row]
    for cold, name, mark in ((False, "page cache warm", "o"), (True, "cold", "x")):
        points = [row for row in asked if (row["asked"] == "cold") == cold]
        right.plot([row["tokens"] for row in points], [row["ms_per_token"] for row in points], mark, label=name)
    right.set(title="Decoding", xlabel="tokens in the session", ylabel="ms a token", xscale="log", ylim=(0, None))
    right.legend()
    figure.savefig(path, metadata={"Date": None})


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("binary", "model", "text", "work"):
        parser.add_argument(name)
    parser.add_argument("--millions", type=int, default=10)
    parser.add_argument("--adapter")
    parser.add_argument("--device")
    parser.add_argument("--block_dtype", default="int8")
    parser.add_argument("--ram", default="512MiB")
    parser.add_argument("--gpu_memory")
    parser.add_argument("--turns", type=int, default=6)
    parser.add_argument("--json")
    parser.add_argument("--plot")
    args = parser.parse_args()
    os.makedirs(args.work, exist_ok=True)
    columns = ("tokens", "from", "append_tok_per_s", "append_MB", "asked", "first_token_s", "ms_per_token", "ask_MB")
    print("| " + " | ".join(columns) + " |\n|" + " ---: |" * len(columns))
    kept = []
    for row in rows(args):
        kept.append(row)
        print("| " + " | ".join(f"{row[name]:,}" if isinstance(row.get(name), int) else str(row.get(name, "")) for name in columns) + " |", flush=True)
    if args.turns:
        in_turn(kept)
    if args.json:
        with open(args.json, "w") as file:
            file.writelines(json.dumps(row) + "\n" for row in kept)
    if args.plot:
        plot(args.plot, kept)


if __name__ == "__main__":
    main()
