"""Mutations of files: what disks, networks and editors do to them, and what somebody does on purpose.

A mutation is `mutate(random, content) -> content`; everything comes from the given random.Random, so that a seed and a
number give the same input on every machine.
"""

from __future__ import annotations

import json
import re
import struct
from collections.abc import Callable
from random import Random
from typing import Any

from fuzzing.hostile import EXPRESSIONS, PATHS, TEMPLATES, nested

Mutation = Callable[[Random, bytes], bytes]

MARKS = (b"\0", b"\xff\xfe", b"\xc3\x28", b"\xed\xa0\x80", b"\x1b[2J", b"\xe2\x80\xa8", b"\r")
MAGIC = (b"\xef\xbb\xbf", b"\xff\xfe", b"\xfe\xff", b"\0", b"\x1f\x8b\x08", b"PK\x03\x04", b"%PDF-")
EMPTY = (b"", b" ", b"null", b"{}", b"[]", b'""', b"0", b"\0" * 64)
NUMBERS = (b"-1", b"0", b"99999999999999999999", b"18446744073709551615", b"9" * 5000, b"1e999", b"NaN", b"2147483648")
HUGE = (2**31, 2**32, 2**62, 2**63 - 1, 2**63, 2**64, 10**30, -1, -(2**63))


def from_list(texts: tuple[str, ...]) -> Mutation:
    return lambda random, content: random.choice(texts).encode("utf-8", "surrogatepass")


def mixed(*weighted: tuple[int, Mutation]) -> Mutation:
    """One of several mutations, by weight."""
    mutations, weights = [mutation for _, mutation in weighted], [weight for weight, _ in weighted]
    return lambda random, content: random.choices(mutations, weights)[0](random, content)


def damage_bytes(random: Random, content: bytes) -> bytes:
    """One to four damages."""
    data = bytearray(content)
    for _ in range(random.choice((1, 1, 1, 2, 4))):
        data = _damage(random, data)
    return bytes(data)


def _damage(random: Random, data: bytearray) -> bytearray:
    at = random.randrange(len(data) + 1)
    end = min(len(data), at + random.choice((1, 2, 8, 64, 4096)))
    kind = random.randrange(13)
    if kind < 3:
        for _ in range(random.choice((1, 1, 3, 30)) if data else 0):
            data[random.randrange(len(data))] ^= 1 << random.randrange(8)
    elif kind == 3:
        del data[at:]
    elif kind == 4:
        del data[at:end]
    elif kind == 5:
        data[at:at] = random.choice((random.randbytes(random.choice((1, 4, 100))), random.choice(MARKS)))
    elif kind == 6:
        data[at:end] = random.choice((b"\0", b"\xff", b"\x80", b"9")) * (end - at)
    elif kind == 7:
        data[at:at] = data[at:end] * random.choice((1, 3, 200 if end - at < 100 else 2))
    elif kind == 8:
        data[:0] = random.choice(MAGIC)
    elif kind == 9:
        numbers = list(re.finditer(rb"\d+", bytes(data[:100_000])))
        if numbers:
            found = random.choice(numbers)
            data[found.start() : found.end()] = random.choice(NUMBERS)
    elif kind == 10 and random.random() < 0.3:
        return bytearray(random.choice((*EMPTY, random.randbytes(300))))
    elif kind == 11:
        return bytearray(bytes(data).decode("latin-1").encode(random.choice(("utf-16", "utf-32", "utf-8"))))
    else:
        data[at:end] = bytes(reversed(data[at:end]))
    return data


# --- JSON

SMALL = (-1, 0, 1, 2, 3, 7, 64, 255, 4096, 10**5, 10**6, 10**9)
LARGE = (*HUGE, 2**31 - 1, 2**53, 10**400, -(10**30))
OTHER = (float("nan"), float("inf"), float("-inf"), 1e308, 1e-320, 0.5, -0.0, 1.0, 1e6, True, False, None)
TEXTS = (
    "", " ", "a", "0", "1", "auto", "default", "null", "a" * 30000, "\0", "\ud800", "\udfff\ud800", "\x1b[31m",
    "%s%n{0}", "ä🦙" * 300, "\u202e", "<s>", "</s>", "<|im_end|>",
)  # fmt: skip
# put into the text of the JSON, where Python could not write it
MARKED = {
    "@deep@": nested(400), "@deeper@": nested(200_000), "@digits@": "9" * 6000,
    "@object@": '{"a":' * 3000 + "1" + "}" * 3000,
}  # fmt: skip


def value(random: Random) -> Any:
    """A JSON value that nobody expects."""
    containers = (
        [], {}, [[]], [None], {"": ""}, [0] * 3000, ["a"] * 3000, {str(i): i for i in range(3000)}, [{}] * 300,
        {"content": "a"}, {"__class__": 1}, [1, "a", None],
    )  # fmt: skip
    kinds = (SMALL, LARGE, OTHER, TEXTS, (*PATHS, *EXPRESSIONS, *TEMPLATES), containers, tuple(MARKED))
    return random.choice(random.choice(kinds))


def _places(root: Any) -> list[tuple[Any, Any]]:
    """(container, key) of every value inside."""
    found, todo = [], [root]
    while todo:
        container = todo.pop()
        for key in container if isinstance(container, dict) else range(len(container)):
            found.append((container, key))
            if isinstance(container[key], (dict, list)):
                todo.append(container[key])
    return found


def damage_value(random: Random, root: Any) -> Any:
    """Changes a JSON value in place, in one to three places."""
    for _ in range(random.choice((1, 1, 1, 2, 3))):
        places = _places(root) if isinstance(root, (dict, list)) else []
        if not places or random.random() < 0.01:
            return value(random)
        # most among the first ones: a vocabulary would drown all else
        container, key = random.choice(places[:200] if random.random() < 0.7 else places)
        kind = random.randrange(10)
        if kind < 5:
            container[key] = value(random)
        elif kind == 5:
            del container[key]
        elif kind == 6 and isinstance(container, dict):
            names = (key + "x", "", "__class__", "auto_map", "\0", "\ud800", key.upper())
            container[random.choice(names)] = container.pop(key)
        elif kind == 7:
            other, name = random.choice(places)
            if name in other if isinstance(other, dict) else name < len(other):
                container[key] = json.loads(json.dumps(other[name]))  # a copy: a value inside itself is no JSON
        elif kind == 8 and isinstance(container, dict):
            names = ("a", "quantization_config", "auto_map", "trust_remote_code", "sliding_window", "", "1e9")
            container[random.choice(names)] = value(random)
        elif isinstance(container, list):
            container.extend(container[:100] * random.choice((1, 30)))
        else:
            container[key] = [container[key]]
    return root


def to_json(random: Random, root: Any) -> bytes:
    text = json.dumps(root, ensure_ascii=random.random() < 0.5, indent=random.choice((None, None, 1)))
    for mark, replacement in MARKED.items():
        text = text.replace(f'"{mark}"', replacement)
    keys = re.findall(r'"\w+": (?:\d+|"[^"\\]*"|null|true|false)', text[:20_000]) if random.random() < 0.1 else []
    if keys:  # a key twice, with two values
        chosen = random.choice(keys)
        text = text.replace(chosen, f"{chosen}, {random.choice(keys)}, {chosen}", 1)
    return text.encode("utf-8", "surrogatepass")


def damage_json(random: Random, content: bytes) -> bytes:
    return to_json(random, damage_value(random, json.loads(content)))


def damage_json_lines(random: Random, content: bytes) -> bytes:
    lines = content.splitlines()
    at = random.randrange(len(lines))
    lines[at] = damage_json(random, lines[at])
    return b"\n".join(lines * random.choice((1, 1, 1, 50)))


def with_keys(*changes: tuple[str, Any]) -> Mutation:
    """JSON with one of these keys set; a function is asked for its value."""

    def mutate(random: Random, content: bytes) -> bytes:
        key, made = random.choice(changes)
        return to_json(random, {**json.loads(content), key: made(random) if callable(made) else made})

    return mutate


# --- other formats


def damage_safetensors(random: Random, content: bytes) -> bytes:
    """A header that lies: offsets, shapes, dtypes, names, its own length."""
    (length,) = struct.unpack("<Q", content[:8])
    header, body = json.loads(content[8 : 8 + length]), content[8 + length :]
    names = [name for name in header if name != "__metadata__"]
    name = random.choice(names)
    entry, big = header[name], random.choice((*HUGE, len(body) + 1, 0))
    kind = random.randrange(12)
    if kind == 0:
        entry["data_offsets"] = [random.choice((0, big, entry["data_offsets"][0])), big]
    elif kind == 1:
        entry["data_offsets"] = header[random.choice(names)]["data_offsets"]
    elif kind == 2:
        shapes = ([big], [big, 0], [big, big], [0], [], [1] * 5000, [2] * 70, [1.0], ["1"], [True], [None])
        entry["shape"] = random.choice(shapes)
    elif kind == 3:
        entry["dtype"] = random.choice(("F64", "F8_E4M3", "I4", "U8", "BOOL", "", None, 3, "f32", "F32\0"))
    elif kind == 4:
        others = (name + "x", "", "\ud800", "../x", "a" * 9999, "\0", "lm_head.weight", "__metadata__")
        header[random.choice(others)] = header.pop(name)
    elif kind == 5:
        header["__metadata__"] = value(random)
    elif kind == 6:
        size = len(body)
        bodies = (
            b"",
            body[: random.randrange(size)],
            body + b"x",
            b"\xff" * size,
            b"\0" * size,
            random.randbytes(size),
        )
        body = random.choice(bodies)
    elif kind == 7:
        wrong = (0, 1, 2**31, 2**63, 2**64 - 1, 100_000_001, length - 1, length + 1, len(content))
        return struct.pack("<Q", random.choice(wrong)) + content[8:]
    elif kind == 8:
        header["more"] = {"dtype": "F32", "shape": [0], "data_offsets": [len(body), len(body)]}
    else:
        header = damage_value(random, header)
    text = to_json(random, header)
    return struct.pack("<Q", len(text)) + text + body


def damage_csv(random: Random, content: bytes) -> bytes:
    lines = content.split(b"\n")
    at = random.randrange(len(lines))
    lines[at] = random.choice((
        lines[at] + b",extra", lines[at].rpartition(b",")[0], b'"open', b'"a"b,c', b"\0", b"," * 5000, b'"' * 99, b"",
        b'"' + b"x" * 200_000 + b'"', b"\xff\xfe", b"instruction,instruction,output", b",,",
        b"\xef\xbb\xbf" + lines[at], b"a\r\rb,c", b"'a,b", b"1e999,NaN", b"-1,9" + b"9" * 5000,
    ))  # fmt: skip
    return random.choice((b"\n", b"\r\n", b"\r", b"\n\n")).join(lines)


def damage_lines(random: Random, content: bytes) -> bytes:
    """YAML, line by line."""
    lines = content.decode().split("\n")
    at = random.randrange(len(lines))
    name, chosen = lines[at].partition(":")[0], random.choice((value(random), random.choice(PATHS)))
    lines[at] = random.choice((
        f"{name}: {json.dumps(chosen)}", f"{name}: {chosen}", f"  {lines[at]}", f"{name}x: 1", f"{name}:",
        lines[at] * 2, "", lines[at] + "\n" + lines[at], f"- {lines[at]}", f"{name}: [1, 2]", f"{name}: {{a: 1}}",
        f"{name}: !!str 1", f"{name}: &x 1", f"{name}: *x",
    ))  # fmt: skip
    return "\n".join(lines).encode("utf-8", "surrogatepass")


def damage_template(random: Random, content: bytes) -> bytes:
    """A hostile piece somewhere between the tags of a good template, or alone."""
    text, piece = content.decode(), random.choice(TEMPLATES)
    at = random.choice([0, *(match.end() for match in re.finditer(r"[%}]}", text))])
    whole = piece if random.random() < 0.3 else text[:at] + piece + text[at:]
    return whole.encode("utf-8", "surrogatepass")


def damage_protobuf(random: Random, content: bytes) -> bytes:
    """A sentencepiece model with top-level fields dropped, doubled, moved or damaged."""
    fields = _fields(content)
    for _ in range(random.choice((1, 1, 3))):
        last = len(fields) - 1
        at = random.randrange(len(fields)) if random.random() < 0.5 else random.choice((0, 1, 2, 3, last, last - 1))
        kind = random.randrange(6)
        if kind == 0:
            del fields[at]
        elif kind == 1:
            fields.insert(random.randrange(len(fields)), fields[at])
        elif kind == 2:
            fields[at] = damage_bytes(random, fields[at])
        elif kind == 3:  # a normalizer's table, or a piece, of rubbish
            rubbish = random.randbytes(random.choice((1, 4, 5, 100)))
            field = bytes([len(rubbish) + 2, 0x12, len(rubbish)]) + rubbish
            fields.append(random.choice((b"\x1a", b"\x0a", b"\x2a")) + field)
        elif kind == 4 and fields[at]:
            body = bytearray(fields[at])
            body[random.randrange(min(2, len(body) - 1), len(body))] = random.randrange(256)
            fields[at] = bytes(body)
        else:
            random.shuffle(fields)
    return b"".join(fields)


def _fields(content: bytes) -> list[bytes]:
    """A message's top-level fields, all of which are length-delimited here."""
    fields, at = [], 0
    while at < len(content):
        start, size, shift = at, 0, 0
        while True:
            at += 1
            size |= (content[at] & 127) << shift
            shift += 7
            if content[at] < 128:
                break
        at += size + 1
        fields.append(content[start:at])
    return fields
