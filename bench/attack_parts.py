"""The attacks of bench/attack.py. Each: (server, how many, seed) -> facts, "ok" among them."""

from __future__ import annotations

import asyncio
import gc
import json
import random
import shutil
import socket
import subprocess
import tempfile
import threading
import time
from collections import Counter
from typing import Any

import httpx
import psutil

from bench.serving import CHAT, HEADERS, KEY, Running, ask, noise, picture, said, shown

GOLDEN = ask(
    [shown(picture("red")), said("What color is the circle?")], max_tokens=16, logprobs=True
)


def answer_of(reply: dict[str, Any]) -> list[Any]:
    """All that must be equal: text, reason, and every log-probability to the bit."""
    return [(c["message"]["content"], c["finish_reason"], c["logprobs"]) for c in reply["choices"]]


def held(server: Running) -> dict[str, int]:
    """What a process holds once all is at rest."""
    gc.collect()
    me = psutil.Process()
    # Threads of pools and of clients' connections come and go within bounds; the engine's is one.
    return {
        "files": me.num_fds(),
        "threads": threading.active_count(),
        "busy": server.worker.engine.busy,
        "queued": server.worker.engine.queued,
        "compiles": sum(server.worker.engine.generator.compiled.values()),
    }


# Neighbours ----------------------------------------------------------------------------------------


def colliding() -> list[bytes]:
    """Pictures of different sizes or palettes whose decoded bytes are equal, two by two."""
    from PIL import Image

    from bench.serving import encoded

    flat = bytes(range(256)) * 12
    pairs = [encoded(Image.frombytes("RGB", size, flat)) for size in ((32, 32), (64, 16), (16, 64))]
    for palette in ((255, 0, 0, 0, 255, 0), (0, 0, 255, 255, 255, 0)):
        image = Image.frombytes("P", (32, 32), bytes(i % 2 for i in range(1024)))
        image.putpalette(palette)
        pairs.append(encoded(image))
    return pairs


def mixed(i: int, twins: list[bytes]) -> dict[str, Any]:
    """The i-th request, unlike the others: pictures or none, greedy or drawn, short or long."""
    dice = random.Random(i)
    images = [dice.choice(twins) if dice.random() < 0.5 else noise(dice.randrange(40), dice.randrange(20, 90))
              for _ in range(dice.choice((0, 0, 1, 1, 2)))]  # fmt: skip
    words = f"Question {i % 37}: " + "what is here? " * dice.randrange(1, 30)
    how: dict[str, Any] = {"max_tokens": dice.randrange(1, 25), "logprobs": True}
    how["stream"] = dice.random() < 0.3
    if dice.random() < 0.5:
        how |= {"temperature": dice.uniform(0.5, 3), "seed": i, "top_p": dice.choice((1.0, 0.8))}
    if dice.random() < 0.3:
        how |= {"presence_penalty": 0.7, "logit_bias": {"2": -100}}
    if dice.random() < 0.1:
        how |= {"n": 2}
    return ask([*map(shown, images), said(words)], **how)


def isolation(server: Running, count: int, seed: int, clients: int = 64) -> dict[str, Any]:
    """Many clients at once, one in ten leaving midway: each answer is the one the request gets alone."""
    kinds, twins = max(8, count // 8), colliding()
    asked = [mixed(seed + i, twins) for i in range(kinds)]
    alone = [answer_of(server.post({**body, "stream": False}).json()) for body in asked]
    before = held(server)
    order = random.Random(seed).choices(range(kinds), k=count)
    results = asyncio.run(_crowd(server.url, asked, order, clients))
    told = Counter(kind for kind, _, _ in results)
    wrong = [i for kind, i, found in results if kind == "answered" and found != alone[i]]
    rest = server.at_rest()
    after = held(server)
    return {
        "clients": clients,
        "different requests": kinds,
        "results": dict(told),
        "differ from the answer alone": len(wrong),
        "before": before,
        "after": after,
        "ok": rest and not wrong and told["answered"] + told["left"] == count
        and after["compiles"] == before["compiles"] and after["files"] <= before["files"] + 4
        and after["busy"] == after["queued"] == 0 and after["threads"] <= before["threads"] + 2,
    }  # fmt: skip


async def _crowd(url: str, asked: list[dict], order: list[int], clients: int) -> list[tuple]:
    queue, results = list(enumerate(order)), []

    async def client(http: httpx.AsyncClient) -> None:
        while queue:
            number, i = queue.pop()
            results.append(await _one(http, asked[i], i, leaves=number % 10 == 0))

    limits = httpx.Limits(max_connections=clients)
    async with httpx.AsyncClient(base_url=url, headers=HEADERS, timeout=300, limits=limits) as http:
        await asyncio.gather(*(client(http) for _ in range(clients)))
    return results


async def _one(http: httpx.AsyncClient, body: dict, i: int, leaves: bool) -> tuple[str, int, Any]:
    if not (body["stream"] or leaves):
        reply = await http.post(CHAT, json=body)
        return (
            ("answered", i, answer_of(reply.json())) if reply.is_success else (reply.text, i, None)
        )
    async with http.stream("POST", CHAT, json={**body, "stream": True}) as reply:
        if not reply.is_success:
            return (f"status {reply.status_code}", i, None)
        pieces = []
        async for line in reply.aiter_lines():
            if line.startswith("data: {"):
                pieces.append(json.loads(line[6:]))
            if leaves and len(pieces) > 1:
                return ("left", i, None)
    if any("error" in piece for piece in pieces):
        return ("error in a stream", i, None)
    return ("answered", i, joined(pieces)) if not leaves else ("left", i, None)


def joined(pieces: list[dict[str, Any]]) -> list[Any]:
    """What a stream's pieces add up to, as `answer_of` has it."""
    found: dict[int, list[Any]] = {}
    for choice in (c for piece in pieces for c in piece["choices"]):
        text, reason, logprobs = found.setdefault(choice["index"], ["", None, []])
        more = (choice.get("logprobs") or {}).get("content") or []
        found[choice["index"]] = [
            text + (choice["delta"].get("content") or ""),
            choice["finish_reason"] or reason,
            logprobs + more,
        ]
    rows = [found[i] for i in sorted(found)]
    return [(text, reason, {"content": rows_, "refusal": None}) for text, reason, rows_ in rows]


def soak(server: Running, seconds: int, seed: int) -> dict[str, Any]:
    """Mixed requests for so long: the slope of the process's memory, and what it holds at the end."""
    twins, n, points, before = colliding(), 0, [], held(server)
    start = time.monotonic()
    while (now := time.monotonic() - start) < seconds:
        asked = [mixed(seed + n + i, twins) for i in range(64)]
        results = asyncio.run(_crowd(server.url, asked, list(range(64)), 16))
        told = Counter(kind for kind, _, _ in results)
        if told["answered"] + told["left"] != 64:
            return {"ok": False, "replies": dict(told)}
        n += 64
        gc.collect()
        memory = psutil.Process().memory_info()
        # Without pages of files, which the system takes and gives as it likes.
        points.append((now / 60, (memory.rss - memory.shared) / 2**20))
    rest, after = server.at_rest(), held(server)
    late = [point for point in points if point[0] > seconds / 240]  # the first quarter fills caches
    slope, bound = slope_of(late)
    return {"requests": n, "MB": [round(p[1]) for p in points[:: max(1, len(points) // 40)]],
            "slope MB/min": round(slope, 3), "upper 95 % bound MB/min": round(bound, 3), "before": before, "after": after,
            "ok": rest and bound < 1 and after["compiles"] == before["compiles"] and after["busy"] == after["queued"] == 0
            and after["files"] <= before["files"] + 4 and after["threads"] <= before["threads"] + 2}  # fmt: skip


def slope_of(points: list[tuple[float, float]], blocks: int = 12) -> tuple[float, float]:
    """(slope, its upper bound of 95 %) of (x, y); neighbours are alike, so its error is that of means."""
    import numpy as np

    m = len(points) // blocks
    if not m:
        return float("nan"), float("inf")
    x, y = np.array(points).T
    slope, offset = np.polyfit(x, y, 1)
    rest = y - (slope * x + offset)
    xm, rm = (v[: m * blocks].reshape(blocks, m).mean(1) for v in (x, rest))
    error = np.sqrt((rm**2).sum() / (blocks - 2) / ((xm - xm.mean()) ** 2).sum())
    return float(slope), float(slope + 2.23 * error)  # Student's t, 10 degrees of freedom


# Nonsense ------------------------------------------------------------------------------------------

ODD: list[Any] = [None, -1, 0, 2**70, 1e308, "\ud800", "", [], {}, [[]], True, "<image>", "\x00", "é" * 300,
       {"type": "text"}, {"type": "json_schema"}, 0.5, "text", ["a", None], {"2": 1}, "a\n\x1b[31m"]  # fmt: skip
FIELDS = ("messages model n stop logit_bias seed temperature top_p top_k min_p stream stream_options logprobs max_tokens"
    " max_completion_tokens presence_penalty frequency_penalty repetition_penalty top_logprobs response_format tools"
    " user metadata prompt echo modalities").split()  # fmt: skip


def positive(dice: random.Random) -> dict[str, Any]:
    """A request that the document allows."""
    how: dict[str, Any] = {"max_tokens": dice.randrange(1, 4)}
    for name, value in {
        "temperature": dice.uniform(0, 100), "top_p": dice.uniform(1e-6, 1), "top_k": dice.randrange(2**40),
        "min_p": dice.random(), "seed": dice.randrange(-(2**63), 2**63), "n": dice.randrange(1, 5),
        "presence_penalty": dice.uniform(-2, 2), "frequency_penalty": dice.uniform(-2, 2), "logprobs": True,
        "repetition_penalty": dice.uniform(1e-3, 100), "stop": dice.choice(["a", ["b", "\n"]]), "stream": True,
        "logit_bias": {str(dice.randrange(300)): dice.uniform(-100, 100)}, "user": "somebody",
    }.items():  # fmt: skip
        if dice.random() < 0.25:
            how[name] = value
    text = "".join(
        chr(dice.choice((dice.randrange(32, 127), dice.randrange(160, 0xD7FF))))
        for _ in range(dice.randrange(60))
    )
    return ask([said(text or "a"), *[shown(picture())] * dice.randrange(2)], **how)


def negative(dice: random.Random) -> dict[str, Any]:
    """One that is wrong somewhere: a field's type or limit, the structure, a damaged picture."""
    body = ask([said("hi"), shown(picture())], max_tokens=1)
    kind = dice.randrange(3)
    if kind == 0:
        for _ in range(dice.randrange(1, 4)):
            body[dice.choice(FIELDS)] = dice.choice(ODD)
    elif kind == 1:
        data = bytearray(picture())
        for _ in range(dice.choice((1, 8, 60))):
            data[dice.randrange(len(data))] = dice.randrange(256)
        body["messages"][0]["content"][1] = shown(bytes(data[: dice.choice((None, 40, 90))]))
    else:
        part = dice.choice(ODD)
        place = dice.randrange(3)
        if place == 0:
            body["messages"][0]["content"][dice.randrange(2)] = part
        elif place == 1:
            body["messages"][0][dice.choice(("role", "content", "name"))] = part
        else:
            body["messages"] = dice.choice(([part], [body["messages"][0]] * 21, [[]]))
    return body


def raw(dice: random.Random) -> bytes:
    """A body that is no request at all, or one that breaks off."""
    text = json.dumps(ask([said("hi"), shown(picture())], max_tokens=1)).encode()
    kind = dice.randrange(4)
    if kind == 0:
        return dice.randbytes(dice.randrange(3000))
    if kind == 1:
        return text[: dice.randrange(len(text))]
    if kind == 2:
        return dice.choice((b"[", b'{"a":')) * dice.choice((10, 5000, 50_000)) + text
    broken = bytearray(text)
    for _ in range(dice.randrange(1, 9)):
        broken[dice.randrange(len(broken))] = dice.randrange(256)
    return bytes(broken)


def wire(url: str, dice: random.Random) -> None:
    """Bytes that are no HTTP, or hardly: the connection may be closed, and nothing else."""
    host, port = url.removeprefix("http://").split(":")
    head = f"POST {CHAT} HTTP/1.1\r\nHost: a\r\nAuthorization: Bearer {KEY}\r\n".encode()
    forms = (
        dice.randbytes(200), b"\x16\x03\x01\x02\x00\x01", b"GET / HTTP/9.9\r\n\r\n", b"G" * 70_000,
        head + b"Content-Length: -1\r\n\r\n", head + b"Content-Length: 5\r\nContent-Length: 6\r\n\r\nabcde",
        head + b"Transfer-Encoding: chunked\r\n\r\nzz\r\n", head + b"Content-Length: 100\r\n\r\n{",
        head + b"X: " + b"a" * 100_000 + b"\r\n\r\n", head + b"Content-Length: 99999999999999999999\r\n\r\n",
        b"POST http://evil/ HTTP/1.1\r\nHost: \xff\r\n\r\n", head + b"Transfer-Encoding: gzip, chunked\r\n\r\n0\r\n\r\n",
    )  # fmt: skip
    with socket.create_connection((host, int(port)), timeout=10) as link:
        try:
            link.sendall(dice.choice(forms))
            link.shutdown(socket.SHUT_WR)
            while link.recv(65536):
                pass
        except (ConnectionError, BrokenPipeError):  # closed on us: a fair answer
            return


def fuzz(server: Running, count: int, seed: int) -> dict[str, Any]:
    """Valid, invalid and raw requests: no 5xx, no hang, and the golden prompt's answer stays."""
    golden = answer_of(server.post(GOLDEN).json())
    before, dice, told, bad, slowest = held(server), random.Random(seed), Counter(), [], 0.0
    for _ in range(count):
        kind = dice.choices(("positive", "negative", "raw", "wire"), (4, 4, 3, 1))[0]
        start = time.monotonic()
        if kind == "wire":
            wire(server.url, dice)
            told[f"{kind}: over"] += 1
        else:
            make = {"positive": positive, "negative": negative, "raw": raw}[kind]
            made = make(dice)
            content = made if isinstance(made, bytes) else json.dumps(made).encode()
            reply = server.http.post(CHAT, content=content)
            told[f"{kind}: {reply.status_code}"] += 1
            leaks = any(s in reply.text for s in ("Traceback", " at 0x", "site-packages"))
            if reply.status_code >= 500 or leaks or '"server_error"' in reply.text:
                bad.append([kind, reply.status_code, reply.text[:200]])
        slowest = max(slowest, time.monotonic() - start)
    rest, again = server.at_rest(), answer_of(server.post(GOLDEN).json())
    after = held(server)
    return {"replies": dict(sorted(told.items())), "bad": bad[:20], "slowest_seconds": round(slowest, 2),
            "golden answer stays": again == golden, "before": before, "after": after,
            "ok": rest and again == golden and not bad and slowest < 10 and after["busy"] == 0
            and after["compiles"] == before["compiles"] and server.worker.state == "ready"}  # fmt: skip


def schema(server: Running, count: int, seed: int) -> dict[str, Any]:
    """schemathesis asks what the served OpenAPI document allows and forbids, so many a route and phase."""
    tool = shutil.which("schemathesis")
    if tool is None:
        return {"ok": False, "why": "schemathesis is not installed"}
    checks = "not_a_server_error,status_code_conformance,content_type_conformance,response_schema_conformance"
    words = [tool, "run", f"{server.url}/openapi.json", "-H", f"Authorization: Bearer {KEY}", "-n", str(count),
             "--checks", checks, "--seed", str(seed), "--request-timeout", "60", "--mode", "all", "--no-color",
             "--max-response-time", "10"]  # fmt: skip
    golden = answer_of(server.post(GOLDEN).json())
    with tempfile.TemporaryDirectory() as folder:  # it keeps a cache where it runs
        done = subprocess.run(words, capture_output=True, text=True, cwd=folder)
    stays = server.at_rest() and answer_of(server.post(GOLDEN).json()) == golden
    lines = [line.rstrip() for line in done.stdout.splitlines() if line.strip()]
    return {"exit code": done.returncode, "golden answer stays": stays, "report": lines[-40:],
            "ok": done.returncode == 0 and stays}  # fmt: skip


# Slow and large ------------------------------------------------------------------------------------


def slow(server: Running, count: int, seed: int, size: int = 2**30) -> dict[str, Any]:
    """So many connections that send a byte now and then, and a chunked body of 1 GB: others hardly notice."""
    host, port = server.url.removeprefix("http://").split(":")
    address, stop = (host, int(port)), threading.Event()
    head = f"POST {CHAT} HTTP/1.1\r\nHost: a\r\nAuthorization: Bearer {KEY}\r\n"
    idle = _times(server, 100)

    def dribble() -> None:
        links = [socket.create_connection(address) for _ in range(count)]
        for i, link in enumerate(links):
            more = "Content-Length: 9000\r\n\r\n{" if i % 2 else "X-Slow: "
            link.sendall((head + more).encode())
        while not stop.wait(0.5):
            for link in links:
                try:
                    link.send(b"a")
                except OSError:  # the server has had enough of it
                    continue
        for link in links:
            link.close()

    sent = 0

    def flood() -> None:
        nonlocal sent
        with socket.create_connection(address) as link:
            link.sendall((head + "Transfer-Encoding: chunked\r\n\r\n").encode())
            piece = b"100000\r\n" + b" " * 2**20 + b"\r\n"
            try:
                while sent < size and not stop.is_set():
                    link.sendall(piece)
                    sent += 2**20
            except OSError:
                return

    threads = [threading.Thread(target=t, daemon=True) for t in (dribble, flood)]
    memory = psutil.Process().memory_info().rss
    for thread in threads:
        thread.start()
    time.sleep(2)
    busy = _times(server, 100)
    stop.set()
    for thread in threads:
        thread.join(60)
    grown = (psutil.Process().memory_info().rss - memory) / 2**20
    p99 = [sorted(times)[-2] for times in (idle, busy)]
    # A step of the system's clock on a busy machine is not the server's.
    return {"p99_idle_seconds": round(p99[0], 4), "p99_busy_seconds": round(p99[1], 4), "MB taken of the flood": sent >> 20,
            "MB grown": round(grown), "ratio": round(p99[1] / p99[0], 2),
            "ok": p99[1] <= 2 * p99[0] and sent < size and server.at_rest()}  # fmt: skip


def _times(server: Running, count: int) -> list[float]:
    """Seconds of so many normal requests, one by one."""
    found = []
    for _ in range(count):
        start = time.monotonic()
        reply = server.post(ask("What is it?", max_tokens=8, logit_bias={"2": -100}))
        found.append(time.monotonic() - start)
        if not reply.is_success:
            raise SystemExit(f"a normal request was refused: {reply.text}")
    return found


# Words ---------------------------------------------------------------------------------------------

TOKENS = ("<image>", "</s>", "<s>", "[INST]", "[/INST]", "<unk>", "<<SYS>>", "<im_start>", "<im_end>", "USER:",
    "ASSISTANT:", "<0x0A>", "<image><image>", "<|im_end|>", "<pad>", "-200", "▁", "<IMAGE>", "< image >")  # fmt: skip


def words(server: Running, count: int, seed: int) -> dict[str, Any]:
    """Texts of words that look like tokens: as many image slots as pictures, no token of a special id."""
    from llava_jax.text.constants import IMAGE_TOKEN
    from llava_jax.text.prompt import build_prompt

    model, dice, wrong = server.worker.model, random.Random(seed), []
    tokenizer, per = model.tokenizer, model.config.image_tokens
    for n in range(count):
        text = " ".join(dice.choice((*TOKENS, "what", "is")) for _ in range(dice.randrange(1, 12)))
        images = dice.randrange(3)
        content = [{"type": "text", "text": text}, *[{"type": "image", "image": b""}] * images]
        rows = [{"role": "user", "content": content}]
        ids = build_prompt(rows, tokenizer, model.config.template).ids.tolist()
        reply = server.post(ask([said(text), *[shown(picture())] * images], max_tokens=1)).json()
        want = len(ids) + images * (per - 1)
        fine = ids.count(IMAGE_TOKEN) == images and ids.count(tokenizer.bos_id) == 1
        fine = fine and tokenizer.eos_id not in ids and reply["usage"]["prompt_tokens"] == want
        if not fine:
            wrong.append([n, text, images])
    return {"wrong": wrong[:20], "ok": not wrong and server.at_rest()}
