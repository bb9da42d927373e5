"""clients/python/trustd_verify.py at the other end of a pipe, for tests: one JSON object a line, one answer a line.

  {"op": "signature", "key", "agent", "kind", "message": BASE64, "text"}    -> {"mode", "index", "size"} or {"code"}
  {"op": "packet" or "message", "key", "agent", "data": BASE64}             -> the same
  {"op": "packet bytes" or "message bytes", "data": BASE64}                 -> {"signed": BASE64} or {"code"}

"error" stands in the answer where the library let out anything but a Refused.
"""

import base64
import json
import sys

sys.path.insert(0, sys.argv[1])
import trustd_verify  # noqa: E402

verifiers = {}


def answer(q):
    op, data = q["op"], base64.b64decode(q.get("data", ""))
    if op == "packet bytes":
        packet = trustd_verify._read(data, trustd_verify._PACKET_DEPTH)
        return {"signed": base64.b64encode(trustd_verify._packet_bytes(packet)[0]).decode()}
    if op == "message bytes":
        message = trustd_verify._read(data, trustd_verify._MESSAGE_DEPTH, exact=True)
        return {"signed": base64.b64encode(trustd_verify._message_bytes(message)[0]).decode()}
    name = q["agent"], q["key"]
    if name not in verifiers:
        verifiers[name] = trustd_verify.Verifier(q["agent"], q["key"], roots=4)
    v = verifiers[name]
    if op == "signature":
        good = v.verify_signature(q["kind"], base64.b64decode(q["message"]), q["text"])
    else:
        good = v.verify_packet(data) if op == "packet" else v.verify_message(data)
    return {"mode": good.mode, "index": good.index, "size": good.size}


for line in sys.stdin:
    try:
        a = answer(json.loads(line))
    except trustd_verify.Refused as e:
        a = {"code": e.code}
    except Exception as e:
        a = {"error": f"{type(e).__name__}: {e}"}
    print(json.dumps(a), flush=True)
