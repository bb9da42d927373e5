"""Verifies what trustd signed, with no trustd at hand: task packets, SignedMessages, and any message of a known kind.

Give it the public key that the registry holds for the signer, and the signer's agent id; both kinds of signatures are
read, direct ones and those of a batch (docs/formats/batch.md). It needs Python 3.9 and the package cryptography, and is
one file, to be copied.

    verifier = Verifier("planner-1", open("key.pem").read())
    verifier.verify_packet(text)            # raises Refused

    python3 trustd_verify.py packet --key key.pem --agent planner-1 < packet.json

A signature that verifies says who signed, and nothing about whether to act on it. Time, audience, replay, revocation and
the state of the key are for whoever asks: trustd checks them all, this file none.
"""

import argparse
import base64
import binascii
import hashlib
import json
import re
import sys
import threading
from collections import OrderedDict
from dataclasses import dataclass
from datetime import datetime

from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, padding, rsa
from cryptography.hazmat.primitives.asymmetric.utils import encode_dss_signature

__all__ = ["Key", "Refused", "Verified", "Verifier", "verify_message", "verify_packet", "verify_signature"]

BATCH_PREFIX = "trustd-batch.v1:"
BATCH_DOMAIN = b"trustd-batch/v1\x00"
MESSAGE_DOMAIN = b"trustd/msg/v1\x00"
KINDS = ("packet", "message", "audit")
MIN_BATCH, MAX_BATCH = 2, 16384
MAX_TEXT = 2048  # characters of a signature
BATCH_HEAD = 2 + 2 + 16  # index, size, salt


class Refused(ValueError):
    """What was given is no valid signature. code is malformed, too_large, unsupported, algorithm_mismatch,
    public_key_mismatch, unknown_agent or invalid_signature, as trustd has it; the text never holds what was given."""

    def __init__(self, code, text=""):
        super().__init__(f"{code}: {text}" if text else code)
        self.code = code


def malformed(text):
    return Refused("malformed", text)


@dataclass(frozen=True)
class Verified:
    """A good signature: mode is direct or batched, signed the bytes that it speaks of. index and size say where in its
    batch the message stands; both are 0 in the mode direct."""

    mode: str
    index: int
    size: int
    signed: bytes


# Keys and raw signatures


@dataclass(frozen=True)
class _Algorithm:
    name: str  # in statements and messages
    wire: str  # in packets
    size: int  # of a signature, in bytes


_ED25519 = _Algorithm("ed25519", "Ed25519", 64)
_ECDSA = {"secp256r1": _Algorithm("ecdsa-p256", "ES256", 64), "secp384r1": _Algorithm("ecdsa-p384", "ES384", 96)}
_RSA = {bits: _Algorithm(f"rsa-{bits}", "PS256", bits // 8) for bits in (2048, 3072, 4096)}

# y of the points of small order, whose signatures say nothing, and of other texts of the same points.
_P = 2**255 - 19
_SMALL_ORDER = {
    0, 1, _P - 1,
    int.from_bytes(bytes.fromhex("26e8958fc2b227b045c3f489f2ef98f0d5dfac05d3c63339b13802886d53fc05"), "little"),
    int.from_bytes(bytes.fromhex("c7176a703d4dd84fba3c0b760d10670f2a2053fa2c39ccc64ec7fd7792ac037a"), "little"),
}


def _algorithm_of(public):
    if isinstance(public, ed25519.Ed25519PublicKey):
        raw = public.public_bytes(serialization.Encoding.Raw, serialization.PublicFormat.Raw)
        y = int.from_bytes(raw, "little") & (2**255 - 1)
        if y >= _P or y in _SMALL_ORDER:
            raise malformed("not a usable Ed25519 point")
        return _ED25519
    if isinstance(public, ec.EllipticCurvePublicKey) and public.curve.name in _ECDSA:
        return _ECDSA[public.curve.name]
    if isinstance(public, rsa.RSAPublicKey) and public.key_size in _RSA and public.public_numbers().e == 65537:
        return _RSA[public.key_size]
    raise Refused("unsupported", "keys are Ed25519, ECDSA on P-256 or P-384, or RSA of 2048, 3072 or 4096 bits")


class Key:
    """A public key as the registry holds it: the PEM text, or the base64 of the DER SubjectPublicKeyInfo."""

    def __init__(self, text):
        if isinstance(text, bytes):
            text = text.decode("ascii", "replace")
        pem = text.startswith("-----")
        try:
            if pem:
                self._public = serialization.load_pem_public_key(text.encode("ascii"))
            else:
                self._public = serialization.load_der_public_key(base64.b64decode(text, validate=True))
        except (ValueError, TypeError, UnsupportedAlgorithm):
            raise malformed("not a public key") from None
        self.algorithm = _algorithm_of(self._public)
        encoded = self._public.public_bytes(serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo)
        self.base64 = base64.b64encode(encoded).decode()
        self.pem = self._public.public_bytes(
            serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo).decode()
        self.fingerprint = hashlib.sha256(encoded).digest()
        if text != (self.pem if pem else self.base64):
            raise malformed("the text of the key is not canonical")

    def verify(self, message, raw):
        """Checks a raw signature, with r and s of fixed width for ECDSA."""
        if len(raw) != self.algorithm.size:
            raise Refused("invalid_signature")
        try:
            if isinstance(self._public, ed25519.Ed25519PublicKey):
                self._public.verify(raw, message)
            elif isinstance(self._public, ec.EllipticCurvePublicKey):
                half = len(raw) // 2
                r, s = int.from_bytes(raw[:half], "big"), int.from_bytes(raw[half:], "big")
                digest = hashes.SHA256() if self.algorithm.name == "ecdsa-p256" else hashes.SHA384()
                self._public.verify(encode_dss_signature(r, s), message, ec.ECDSA(digest))
            else:
                pss = padding.PSS(mgf=padding.MGF1(hashes.SHA256()), salt_length=32)
                self._public.verify(raw, message, pss, hashes.SHA256())
        except (InvalidSignature, ValueError):
            raise Refused("invalid_signature") from None


# Signatures, direct and batched


def _path_length(index, size):
    n, last = 0, size - 1
    while last > 0:
        n += (index ^ 1) <= last
        index, last = index >> 1, last >> 1
    return n


def _fields(domain, *fields):
    return domain + b"".join(len(f).to_bytes(4, "big") + f for f in fields)


def _leaf(kind, agent, salt, message):
    kind, agent = kind.encode(), agent.encode()
    return hashlib.sha256(
        b"\x10" + len(kind).to_bytes(2, "big") + kind + len(agent).to_bytes(2, "big") + agent
        + salt + len(message).to_bytes(8, "big") + message).digest()


def _climb(leaf, index, size, path):
    node, last, at = leaf, size - 1, 0
    while last > 0:
        if (index ^ 1) <= last:
            sibling, at = path[at:at + 32], at + 32
            pair = sibling + node if index & 1 else node + sibling
            node = hashlib.sha256(b"\x01" + pair).digest()
        index, last = index >> 1, last >> 1
    return node


def _parse_direct(text, size):
    try:
        raw = base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError):
        raise malformed("not the base64 of a signature") from None
    if len(raw) != size or base64.b64encode(raw).decode() != text:
        raise malformed("not the one base64 text of a signature of this key")
    return raw


def _parse_batched(text, size_of_signature):
    """Returns index, size, salt, path and the device's signature."""
    rest = text[len(BATCH_PREFIX):]
    if len(text) > MAX_TEXT or not re.fullmatch("[A-Za-z0-9_-]+", rest) or len(rest) % 4 == 1:
        raise malformed("not the base64url of a batched signature")
    b = base64.urlsafe_b64decode(rest + "=" * (-len(rest) % 4))
    if base64.urlsafe_b64encode(b).decode().rstrip("=") != rest or len(b) < BATCH_HEAD:
        raise malformed("not the one base64url text of a batched signature")
    index, size = int.from_bytes(b[0:2], "big"), int.from_bytes(b[2:4], "big")
    if not MIN_BATCH <= size <= MAX_BATCH or index >= size:
        raise malformed("a batch has 2 to 16384 leaves, and this is none of them")
    end = BATCH_HEAD + 32 * _path_length(index, size)
    if len(b) != end + size_of_signature:
        raise malformed("the proof does not have the length that its place asks for")
    return index, size, b[4:BATCH_HEAD], b[BATCH_HEAD:end], b[end:]


class Verifier:
    """Verifies what one agent signed with one key. It may be used by several threads at once.

    It remembers up to `roots` batches whose signature was good, which spares the public-key operation for the other
    messages of the batch."""

    def __init__(self, agent, key, roots=1024):
        if not isinstance(agent, str) or not _AGENT.fullmatch(agent):
            raise malformed("not an agent id")
        self.agent = agent
        self.key = key if isinstance(key, Key) else Key(key)
        self._limit = roots
        self._good = OrderedDict()
        self._lock = threading.Lock()

    def verify_signature(self, kind, message, text):
        """Checks the text of a signature of message, the signed bytes of the kind's own format."""
        if kind not in KINDS:
            raise Refused("unsupported", "a kind is packet, message or audit")
        if not isinstance(text, str) or not text.isascii():
            raise malformed("not the text of a signature")
        message = bytes(message)
        if not text.startswith(BATCH_PREFIX):
            self.key.verify(message, _parse_direct(text, self.key.algorithm.size))
            return Verified("direct", 0, 0, message)
        index, size, salt, path, raw = _parse_batched(text, self.key.algorithm.size)
        root = _climb(_leaf(kind, self.agent, salt, message), index, size, path)
        if not self._remembers((size, root, raw)):
            statement = _fields(
                BATCH_DOMAIN, self.key.fingerprint, self.key.algorithm.name.encode(), size.to_bytes(4, "big"), root)
            self.key.verify(statement, raw)
            self._remember((size, root, raw))
        return Verified("batched", index, size, message)

    def verify_packet(self, data):
        """Checks a TrustHandoff task packet, bytes or text. from_agent is an alias: that it names this agent is for the
        registry to say."""
        packet = _read(data, _PACKET_DEPTH)
        signed, fields = _packet_bytes(packet)
        if fields["signature_algo"] != self.key.algorithm.wire:
            raise Refused("algorithm_mismatch", "signature_algo is not that of the key")
        if fields["public_key"] != self.key.pem:
            raise Refused("public_key_mismatch", "public_key is not the text of the key")
        return self.verify_signature("packet", signed, fields["signature"])

    def verify_message(self, data):
        """Checks a SignedMessage, bytes or text. Its signer must be this agent."""
        signed, m = _message_bytes(_read(data, _MESSAGE_DEPTH, exact=True))
        if m["signer_id"] != self.agent:
            raise Refused("unknown_agent", "signer_id names another agent")
        if m["algorithm"] != self.key.algorithm.name:
            raise Refused("algorithm_mismatch", "algorithm is not that of the key")
        if m["public_key"] != self.key.base64 or m["fingerprint"] != "sha256:" + self.key.fingerprint.hex():
            raise Refused("public_key_mismatch", "public_key and fingerprint are not those of the key")
        return self.verify_signature("message", signed, m["signature"])

    def _remembers(self, name):
        with self._lock:
            if name not in self._good:
                return False
            self._good.move_to_end(name)
            return True

    def _remember(self, name):
        with self._lock:
            self._good[name] = None
            while len(self._good) > self._limit:
                self._good.popitem(last=False)


def verify_signature(key, kind, agent, message, text):
    """Verifier(agent, key).verify_signature(kind, message, text)"""
    return Verifier(agent, key).verify_signature(kind, message, text)


def verify_packet(key, agent, data):
    """Verifier(agent, key).verify_packet(data)"""
    return Verifier(agent, key).verify_packet(data)


def verify_message(key, agent, data):
    """Verifier(agent, key).verify_message(data)"""
    return Verifier(agent, key).verify_message(data)


# JSON, strictly: each member once, no lone surrogates, no NaN; numbers stay as they were written

_MAX_INPUT = 256 << 10
_PACKET_DEPTH, _MESSAGE_DEPTH = 100, 64
_AGENT = re.compile("[A-Za-z0-9](?:[A-Za-z0-9._-]{0,126}[A-Za-z0-9])?")
_TOKEN = re.compile("[!-~]{1,128}")
_DIGEST = re.compile("sha256:[0-9a-f]{64}")
# A string that does not end reaches to the end of the text, so that no text is looked at twice.
_BRACKETS = re.compile(r'"(?:[^"\\]+|\\.)*(?:"|\\?\Z)|[\[\]{}]', re.DOTALL)


class _Number:
    """A number, as it was written."""

    def __init__(self, token):
        if not token.isascii():
            raise malformed("a digit that is not ASCII")
        self.token = token
        self.integer = not set(token) & set(".eE")

    def natural(self, most):
        if not self.integer or self.token[0] == "-" or len(self.token) > len(str(most)) or int(self.token) > most:
            raise malformed(f"not an integer from 0 to {most}")
        return int(self.token)


def _object(pairs):
    members = dict(pairs)
    if len(members) != len(pairs):
        raise malformed("a member stands twice")
    return members


def _constant(_):
    raise malformed("not a JSON value")


def _read(data, depth, exact=False):
    if isinstance(data, str):
        data = data.encode("utf-8", "surrogatepass")
    data = bytes(data)
    if len(data) > _MAX_INPUT:
        raise Refused("too_large", f"more than {_MAX_INPUT} bytes")
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError:
        raise malformed("not UTF-8") from None
    level = 0
    for found in _BRACKETS.finditer(text):
        c = found.group()
        level += (c in "[{") - (c in "]}") if len(c) == 1 else 0
        if level > depth:
            raise malformed(f"nested more than {depth} levels deep")
    try:
        value = json.loads(
            text, object_pairs_hook=_object, parse_int=_Number, parse_float=_Number, parse_constant=_constant)
    except Refused:
        raise
    except (ValueError, RecursionError):
        raise malformed("not JSON") from None
    _check(value, exact)
    if not isinstance(value, dict):
        raise malformed("not a JSON object")
    return value


def _check(value, exact):
    """Refuses lone surrogates and, with exact, numbers that a double does not hold."""
    if isinstance(value, str):
        if any("\ud800" <= c <= "\udfff" for c in value):
            raise malformed("a lone surrogate")
    elif isinstance(value, dict):
        for name, member in value.items():
            _check(name, exact)
            _check(member, exact)
    elif isinstance(value, list):
        for item in value:
            _check(item, exact)
    elif exact and isinstance(value, _Number):
        _double(value)


# Task packets: the bytes that TrustHandoff 0.4.0 signs

_MAX_NAME, _MAX_INT, _MAX_DIGITS = 256, 2**31 - 1, 4300
_TIME = re.compile(
    r"([0-9]{4}-[0-9]{2}-[0-9]{2}T[0-9]{2}:[0-9]{2}:[0-9]{2})(?:\.([0-9]{1,6}))?(Z|[+-][0-9]{2}:[0-9]{2})")


def _text(v):
    if not isinstance(v, str):
        raise malformed("not a string")
    return v


def _name(v):
    if not 1 <= len(_text(v).encode()) <= _MAX_NAME:
        raise malformed(f"not a string of 1 to {_MAX_NAME} bytes")
    return v


def _int(v):
    if not isinstance(v, _Number):
        raise malformed("not an integer")
    return v.natural(_MAX_INT)


def _bool(v):
    if not isinstance(v, bool):
        raise malformed("not a boolean")
    return v


def _texts(v):
    if not isinstance(v, list):
        raise malformed("not an array")
    return [_text(item) for item in v]


def _free(v):
    if not isinstance(v, dict):
        raise malformed("not an object")
    return v


def _time(v):
    found = _TIME.fullmatch(_text(v))
    if not found:
        raise malformed("not a time like 2026-03-08T12:00:00.000000Z or with an offset like +02:00")
    moment, fraction, zone = found.groups()
    try:
        datetime.strptime(moment, "%Y-%m-%dT%H:%M:%S")
    except ValueError:
        raise malformed("not a time that there is") from None
    if moment[17:] > "59" or zone != "Z" and (zone[1:3] > "23" or zone[4:] > "59"):
        raise malformed("not a time that there is")
    micros = (fraction or "").ljust(6, "0")
    return moment + ("." + micros if int(micros) else "") + ("Z" if zone in ("Z", "+00:00", "-00:00") else zone)


def _fixed(**members):
    """Returns a reader of an object that has these members: (reader, default, may be null)."""

    def read(v):
        out = {name: default for name, (_, default, _) in members.items()}
        for name, given in _free(v).items():
            if name not in members:
                raise malformed("a member that the format does not have")
            reader, _, nullable = members[name]
            out[name] = None if given is None and nullable else reader(given)
        return out

    return read


_permissions = _fixed(allowed_actions=(_texts, [], False), max_tool_calls=(_int, None, True))
_constraints = _fixed(
    max_runtime_seconds=(_int, None, True), data_boundary=(_text, None, True),
    requires_human_review=(_bool, False, True))
_provenance = _fixed(origin_workflow=(_text, None, True), delegation_depth=(_int, None, True))

_REQUIRED = object()
_PACKET = {  # name: (reader, default, may be null)
    "ai_provenance": (_free, None, True),
    "capability_token": (_text, None, True),
    "constraints": (_constraints, None, True),
    "context": (_free, {}, False),
    "expires_at": (_time, _REQUIRED, False),
    "from_agent": (_name, _REQUIRED, False),
    "goal": (_text, None, True),
    "intent": (_text, _REQUIRED, False),
    "issued_at": (_time, _REQUIRED, False),
    "memory_refs": (_texts, [], False),
    "nonce": (_name, _REQUIRED, False),
    "packet_id": (_name, _REQUIRED, False),
    "permissions": (_permissions, _REQUIRED, False),
    "provenance": (_provenance, None, True),
    "public_key": (_text, _REQUIRED, False),
    "risk_level": (_text, None, True),
    "signature": (_text, _REQUIRED, False),
    "signature_algo": (_name, _REQUIRED, False),
    "task_id": (_name, _REQUIRED, False),
    "task_type": (_text, None, True),
    "to_agent": (_name, _REQUIRED, False),
    "ttl_seconds": (_int, None, True),
}


def _packet_bytes(packet):
    fields = _fixed(**_PACKET)(packet)
    if any(v is _REQUIRED for v in fields.values()):
        raise malformed("a field is missing")
    if fields["ttl_seconds"] is not None and fields["risk_level"] is None:
        fields["risk_level"] = "read"
    if fields["ttl_seconds"] is None:
        fields["ttl_seconds"] = {"write": 120, "read": 900}.get(fields["risk_level"])
    return _dump({k: v for k, v in fields.items() if k != "signature"}).encode("ascii"), fields


def _dump(v):
    """json.dumps(v, sort_keys=True, separators=(",", ":")), with the numbers that _Number kept."""
    if isinstance(v, dict):
        return "{" + ",".join(json.dumps(k) + ":" + _dump(v[k]) for k in sorted(v)) + "}"
    if isinstance(v, list):
        return "[" + ",".join(map(_dump, v)) + "]"
    if not isinstance(v, _Number):
        return json.dumps(v)
    if not v.integer:
        f = float(v.token)
        if f in (float("inf"), float("-inf")):
            raise malformed("a number is too large for a float")
        return repr(f)
    if len(v.token.lstrip("-")) > _MAX_DIGITS:
        raise malformed(f"an integer has more than {_MAX_DIGITS} digits")
    return "0" if v.token == "-0" else v.token


# SignedMessages: docs/formats/signed-message.md

_MAX_PAYLOAD = _MAX_INPUT - (16 << 10)
_MAX_EXACT = 2**53 - 1
_MESSAGE_TIME = re.compile(r"[0-9]{4}-[0-9]{2}-[0-9]{2}T[0-9]{2}:[0-9]{2}:[0-9]{2}\.[0-9]{6}Z")
_CONTENT_TYPE = re.compile(r"application/json|[a-z0-9.+_-]+/[a-z0-9.+_-]+\+json")
_OPTIONAL = {"expires_at", "prev"}
_NAMES = [a.name for a in (_ED25519, *_ECDSA.values(), *_RSA.values())]


def _must(ok, name):
    if not ok:
        raise malformed(f"{name} does not have its form")


def _matching(pattern):
    return lambda v: isinstance(v, str) and pattern.fullmatch(v) is not None


def _is_moment(v):
    if not _matching(_MESSAGE_TIME)(v) or v[:4] < "1970" or v[17:19] > "59":
        return False
    try:
        datetime.strptime(v[:19], "%Y-%m-%dT%H:%M:%S")
    except ValueError:
        return False
    return True


def _is_integer(v):
    return isinstance(v, _Number) and re.fullmatch("[0-9]{1,16}", v.token) is not None and int(v.token) <= _MAX_EXACT


def _is_audience(v):
    return isinstance(v, list) and len(v) <= 16 and all(map(_matching(_TOKEN), v)) and len(set(v)) == len(v)


_MESSAGE = {
    "v": lambda v: isinstance(v, _Number) and v.token == "1",
    "signer_id": _matching(_AGENT),
    "fingerprint": _matching(_DIGEST),
    "algorithm": lambda v: v in _NAMES,
    "timestamp": _is_moment,
    "expires_at": _is_moment,
    "seq": _is_integer,
    "nonce": _matching(_TOKEN),
    "aud": _is_audience,
    "content_type": lambda v: _matching(_CONTENT_TYPE)(v) and len(v) <= 128,
    "grade": lambda v: v in ("hardware-attested", "hardware-claimed", "software"),
    "key_epoch": _is_integer,
    "view_head": _matching(_DIGEST),
    "view_size": _is_integer,
    "prev": _matching(_DIGEST),
    "payload": lambda v: True,
    "signature": lambda v: isinstance(v, str),
    "public_key": lambda v: isinstance(v, str),
}

_SIGNED = ("v", "signer_id", "fingerprint", "algorithm", "timestamp", "expires_at", "seq", "nonce", "aud",
           "content_type", "grade", "key_epoch", "view_head", "view_size", "prev")


def _message_bytes(m):
    for name in m:
        if name not in _MESSAGE:
            raise malformed("a member that the format does not have")
    for name, has_form in _MESSAGE.items():
        if name in m:
            _must(has_form(m[name]), name)
        else:
            _must(name in _OPTIONAL, name)
    payload = _canonical(m["payload"]).encode()
    if len(payload) > _MAX_PAYLOAD:
        raise Refused("too_large", f"a payload has at most {_MAX_PAYLOAD} bytes in canonical form")
    return _fields(MESSAGE_DOMAIN, *(_header_field(m.get(name, "")) for name in _SIGNED), payload), m


def _header_field(v):
    if isinstance(v, _Number):
        return int(v.token).to_bytes(8, "big")
    if isinstance(v, list):
        return b"".join(len(name).to_bytes(4, "big") + name.encode() for name in v)
    return v.encode()


def _canonical(v):
    """The canonical form of RFC 8785."""
    if isinstance(v, dict):
        names = sorted(v, key=lambda name: name.encode("utf-16-be"))
        return "{" + ",".join(_quote(k) + ":" + _canonical(v[k]) for k in names) + "}"
    if isinstance(v, list):
        return "[" + ",".join(map(_canonical, v)) + "]"
    if isinstance(v, _Number):
        return _ecmascript(_double(v))
    return _quote(v) if isinstance(v, str) else json.dumps(v)


def _quote(s):
    return json.dumps(s, ensure_ascii=False)


def _double(number):
    """The number as a double that has the same value. Others are refused, as are those beyond 2^53-1."""
    f = float(number.token)
    if not abs(f) <= _MAX_EXACT or _decimal(number.token) != _decimal(repr(f)):
        raise malformed("a number is beyond 2^53-1 or has more digits than a double holds")
    return f


def _decimal(token):
    """A number's magnitude: its digits without zeros at either end, and the power of ten of the last."""
    mantissa, _, exponent = token.lstrip("-").lower().partition("e")
    power = 0
    if exponent:
        digits = exponent.lstrip("+-").lstrip("0")
        if len(digits) > 7 or int(digits or "0") > 1 << 20:
            raise malformed("a number with an exponent that no double has")
        power = -int(digits or "0") if exponent[0] == "-" else int(digits or "0")
    whole, _, fraction = mantissa.partition(".")
    digits = (whole + fraction).lstrip("0")
    if not digits:
        return "", 0
    trimmed = digits.rstrip("0")
    return trimmed, power - len(fraction) + len(digits) - len(trimmed)


def _ecmascript(f):
    """Number.prototype.toString of a double up to 2^53-1."""
    digits, power = _decimal(repr(f))
    if not digits:
        return "0"
    sign, point = "-" if f < 0 else "", len(digits) + power  # 0.ddd * 10^point
    if power >= 0:
        return sign + digits + "0" * power
    if point > 0:
        return sign + digits[:point] + "." + digits[point:]
    if point > -6:
        return sign + "0." + "0" * -point + digits
    tail = "." + digits[1:] if len(digits) > 1 else ""
    return f"{sign}{digits[0]}{tail}e-{1 - point}"


# Command line


def main(arguments=None):
    parser = argparse.ArgumentParser(
        description="Verify what trustd signed. Reads standard input and writes one JSON object. The exit code is 0 for a "
                    "valid signature, 1 for another, 2 where the command makes no sense.")
    parser.add_argument("what", choices=("packet", "message", "signature"))
    parser.add_argument("--key", required=True, metavar="FILE", help="the signer's registered public key, PEM or base64")
    parser.add_argument("--agent", required=True, metavar="ID", help="the signer's agent id in the registry")
    parser.add_argument("--kind", choices=KINDS, help="with signature: what standard input is")
    parser.add_argument("--text", help="with signature: the signature's text; standard input holds the signed bytes")
    a = parser.parse_args(arguments)
    if (a.what == "signature") != (a.kind is not None and a.text is not None) or \
            a.what != "signature" and (a.kind is not None or a.text is not None):
        parser.error("signature takes --kind and --text, and nothing else does")
    try:
        with open(a.key, encoding="ascii", errors="replace", newline="") as f:
            key = f.read()
        verifier = Verifier(a.agent, key if key.startswith("-----") else key.rstrip("\r\n"))
    except (OSError, Refused) as e:
        parser.error(f"--key and --agent: {e}")
    data = sys.stdin.buffer.read()
    try:
        if a.what == "packet":
            good = verifier.verify_packet(data)
        elif a.what == "message":
            good = verifier.verify_message(data)
        else:
            good = verifier.verify_signature(a.kind, data, a.text)
    except Refused as e:
        print(json.dumps({"valid": False, "code": e.code, "reason": str(e)}))
        return 1
    print(json.dumps({"valid": True, "mode": good.mode, "index": good.index, "size": good.size}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
