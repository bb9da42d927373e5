"""TrustHandoff at the other end of a pipe, for interop tests.

Reads one JSON object a line and answers with one JSON object a line. Packets travel as strings, so that their text
is theirs and not that of the line around them.

  {"op": "versions"}                                    -> {"trusthandoff", "pydantic", "python"}
  {"op": "identity", "key": HEX}                        -> {"agent_id", "public_key"}
  {"op": "generate", "seed": N, "to_agent": A}          -> {"draft"}: a random packet without what its signer fills in
  {"op": "sign", "key": HEX, "draft": T, "style": S}    -> {"packet", "payload"}: completed and signed by TrustHandoff
  {"op": "verify", "packet": T, "agent": A, "pem": P}   -> {"verified", "verified_json", "valid", "reason", "refusal",
                                                            "payload"}

HEX is the 32-byte seed of an Ed25519 key. A style is 0 to 3: how the packet is written on the wire. "reason" is that
of validate_packet, or the name of an exception that it let out, as verify_packet's are in "refusal". An answer to a
request that failed has the one member "error".
"""

import base64
import hashlib
import importlib.metadata
import json
import math
import random
import struct
import sys
from datetime import datetime, timedelta, timezone

import pydantic
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from trusthandoff.agent_registry import AgentRegistry
from trusthandoff.identity import AgentIdentity
from trusthandoff.packet import SignedTaskPacket
from trusthandoff.signing import sign_packet
from trusthandoff.validation import validate_packet
from trusthandoff.verification import verify_packet

ALPHABETS = [
    [chr(c) for c in range(0x20, 0x7F)],
    [chr(c) for c in range(0x00, 0x20)] + list('"\\/<>&\x7f'),
    list("éüßñÅłžøΩЖяעَक中日本語한"),
    list("\u0080\u00a0\u00ad\u2028\u2029\ufeff\ufffd\ufffe\uffff\uffee\ue000"),
    [chr(c) for c in (0x10000, 0x1F600, 0x1F9D1, 0x1D11E, 0x10FFFF)],
]

FLOATS = [
    0.0, -0.0, 1.0, 0.1, 1e15, 1e16, 1.5e16, 1e17, 123456789012345680.0, 1e21, 1e22, 1e-4, 1e-5, 1.5e-5, 1e-6, 1e-7, 5e-324,
    2.2250738585072014e-308, 1.7976931348623157e308, 9007199254740993.0, 0.30000000000000004,
]

OFFSETS = [0, 0, 0, 120, 330, -210, 845, -719, 1439, -1439]


class Generator:
    """Random packets, the same for the same seed but for the time of day."""

    def __init__(self, seed):
        self.r = random.Random(seed)

    def text(self, least=0):
        r = self.r
        return "".join(r.choice(r.choice(ALPHABETS)) for _ in range(r.randint(least, 12)))

    def integer(self):
        r = self.r
        bits = r.choice([1, 8, 31, 53, 63, 64, 65, 128, 512])
        if r.random() < 0.02:
            bits = 14280  # 4299 digits
        return r.getrandbits(bits) * r.choice([1, -1])

    def real(self):
        r = self.r
        kind = r.random()
        if kind < 0.3:
            return r.choice(FLOATS) * r.choice([1, -1])
        if kind < 0.6:
            return r.uniform(-1, 1) * 10.0 ** r.randint(-20, 25)
        while True:
            f = struct.unpack("<d", struct.pack("<Q", r.getrandbits(64)))[0]
            if math.isfinite(f):
                return f

    def value(self, depth):
        kind = self.r.randint(0, 8 if depth > 0 else 5)
        if kind == 0:
            return None
        if kind == 1:
            return self.r.random() < 0.5
        if kind == 2:
            return self.integer()
        if kind in (3, 4):
            return self.real() if kind == 3 else self.text()
        if kind == 5:
            return self.text(3)
        if kind == 6:
            return [self.value(depth - 1) for _ in range(self.r.randint(0, 4))]
        return self.object(depth - 1)

    def object(self, depth):
        o = {self.text(): self.value(depth) for _ in range(self.r.randint(0, 5))}
        if self.r.random() < 0.3:  # where code points and UTF-16 sort apart
            o["\uffee"], o["\U0001f600"] = self.value(0), self.value(0)
        return o

    def actions(self):
        return list(dict.fromkeys(self.text(1) for _ in range(self.r.randint(0, 4))))

    def draft(self, to_agent):
        r = self.r
        d = {
            "task_id": self.text(1), "to_agent": to_agent, "intent": self.text(),
            "permissions": {"allowed_actions": self.actions()},
            "context": self.object(r.choice([0, 1, 2, 4, 8])),
        }
        if r.random() < 0.5:
            d["permissions"]["max_tool_calls"] = r.choice([None, 0, 1, 5, 2**31 - 1])
        if r.random() < 0.5:
            d["memory_refs"] = [self.text() for _ in range(r.randint(0, 3))]
        for name in ("goal", "task_type", "capability_token"):
            if r.random() < 0.3:
                d[name] = r.choice([None, self.text()])
        if r.random() < 0.4:
            d["constraints"] = self.some(
                max_runtime_seconds=r.choice([None, 0, 30]), data_boundary=r.choice([None, self.text()]),
                requires_human_review=r.choice([None, False, True]))
            d["context"]["human_approval"] = "alice"
        if r.random() < 0.4:
            d["provenance"] = self.some(
                origin_workflow=r.choice([None, self.text()]), delegation_depth=r.choice([None, 0, 3]))
        if r.random() < 0.4:
            d["ai_provenance"] = {**self.object(2), "source": self.text(1)}
        self.times(d)
        members = list(d.items())
        r.shuffle(members)
        return json.dumps(dict(members), ensure_ascii=r.random() < 0.5, indent=r.choice([None, None, 1]))

    def some(self, **members):
        return {k: v for k, v in members.items() if self.r.random() < 0.7}

    def times(self, d):
        r = self.r
        ttl = r.choice([None, None, 60, 61, 119, 120])
        risk = r.choice([None, None, "read", "write"])
        if risk:
            d["risk_level"] = risk
        if ttl:
            d["ttl_seconds"] = ttl
        if r.random() < 0.5:
            issued = datetime.now(timezone(timedelta(minutes=r.choice(OFFSETS))))
            if r.random() < 0.5:
                issued = issued.replace(microsecond=r.choice([0, 1, 500000, 999999]))
            d["issued_at"] = issued.isoformat()
            if r.random() < 0.5:
                expires = issued + timedelta(seconds=ttl or {"write": 120}.get(risk, 900))
                d["expires_at"] = expires.astimezone(timezone(timedelta(minutes=r.choice(OFFSETS)))).isoformat()


def identity(key):
    private = Ed25519PrivateKey.from_private_bytes(bytes.fromhex(key))
    pem = private.public_key().public_bytes(
        serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo).decode()
    name = "agent:" + base64.b64encode(hashlib.sha256(pem.encode()).digest()).decode()[:16]
    secret = private.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()).decode()
    return AgentIdentity(agent_id=name, private_key_pem=secret, public_key_pem=pem)


def payload(packet):
    """What sign_packet signs, to say where two sides differ."""
    return json.dumps(
        packet.model_dump(exclude={"signature"}, mode="json"), sort_keys=True, separators=(",", ":"), ensure_ascii=True)


STYLES = [
    lambda p: json.dumps(p.model_dump(mode="json")),
    lambda p: json.dumps(p.model_dump(mode="json"), sort_keys=True, ensure_ascii=False),
    lambda p: json.dumps(p.model_dump(), sort_keys=True, default=lambda d: d.isoformat(), indent=2),
    lambda p: p.model_dump_json(),
]


def sign(key, draft, style):
    me, d = identity(key), json.loads(draft)
    issued = datetime.now(timezone.utc)
    d = {
        "packet_id": "py-" + random.randbytes(8).hex(), "nonce": random.randbytes(16).hex(), "issued_at": issued,
        "from_agent": me.agent_id, "signature_algo": "Ed25519", "signature": "", "public_key": me.public_key_pem, **d,
    }
    if "expires_at" not in d and d.get("risk_level") is None and d.get("ttl_seconds") is None:
        at = d["issued_at"]
        at = datetime.fromisoformat(at) if isinstance(at, str) else at
        d["expires_at"] = at + timedelta(seconds=900)
    packet = sign_packet(SignedTaskPacket(**d), me)
    return {"packet": STYLES[style](packet), "payload": payload(packet)}


def attempt(check):
    """The result, or the name of the exception that the library let out instead of a verdict."""
    try:
        return check()
    except Exception as e:
        return type(e).__name__


def verify(text, agent, pem):
    registry = AgentRegistry()
    registry.register(agent, pem)
    packet = SignedTaskPacket(**json.loads(text))
    result = attempt(lambda: validate_packet(packet, registry=registry))
    verdict = attempt(lambda: verify_packet(packet, registry))
    return {
        "verified": verdict is True, "refusal": verdict if isinstance(verdict, str) else "",
        "verified_json": attempt(lambda: verify_packet(SignedTaskPacket.model_validate_json(text), registry)) is True,
        "valid": getattr(result, "is_valid", False), "reason": getattr(result, "reason", result),
        "payload": payload(packet),
    }


def answer(q):
    op = q["op"]
    if op == "versions":
        return {"trusthandoff": importlib.metadata.version("trusthandoff"), "pydantic": pydantic.VERSION,
                "python": sys.version.split()[0]}
    if op == "identity":
        me = identity(q["key"])
        return {"agent_id": me.agent_id, "public_key": me.public_key_pem}
    if op == "generate":
        return {"draft": Generator(q["seed"]).draft(q["to_agent"])}
    if op == "sign":
        return sign(q["key"], q["draft"], q.get("style", 0))
    if op == "verify":
        return verify(q["packet"], q["agent"], q["pem"])
    raise ValueError("unknown op")


def main():
    out = open(1, "w", encoding="ascii", closefd=False)
    sys.stdout = sys.stderr  # what the library prints is not an answer
    for line in open(0, "rb", closefd=False):
        try:
            a = answer(json.loads(line))
        except Exception as e:
            a = {"error": f"{type(e).__name__}: {e}"}
        print(json.dumps(a), file=out, flush=True)


main()
