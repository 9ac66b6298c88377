"""A scripted server that speaks as much of MongoDB's wire protocol as a driver needs to find documents.

https://www.mongodb.com/docs/manual/reference/mongodb-wire-protocol/: OP_MSG, and the driver's first hello as OP_QUERY.
It knows equality, null, `$gt` and `$or`. No MongoDB is packaged for Debian; its driver is the real one.
"""

import socket
import socketserver
import struct
import threading
from datetime import UTC, datetime
from typing import Any

import bson
from bson.codec_options import CodecOptions
from bson.datetime_ms import DatetimeMS

type Document = dict[str, Any]

OP_REPLY, OP_QUERY, OP_MSG = 1, 2004, 2013
AWARE = CodecOptions[Document](tz_aware=True)
HEADER = struct.Struct("<iiii")
HELLO = {
    "ismaster": True,
    "helloOk": True,
    "maxBsonObjectSize": 16_777_216,
    "maxMessageSizeBytes": 48_000_000,
    "maxWriteBatchSize": 100_000,
    "minWireVersion": 0,
    "maxWireVersion": 21,
    "ok": 1.0,
}


class Mongo:
    """`documents`: by database and collection ("cgc.api_keys"). `asked`: the filters, in order."""

    def __init__(self) -> None:
        self.documents: dict[str, list[Document]] = {}
        self.asked: list[Document] = []
        self.goes_on = threading.Event()
        self.goes_on.set()
        self._open: set[socket.socket] = set()
        self.port = 0
        self.start()

    @property
    def url(self) -> str:
        return f"mongodb://127.0.0.1:{self.port}/"

    def start(self) -> None:
        mongo = self

        class Handler(socketserver.StreamRequestHandler):
            def handle(self) -> None:
                mongo._open.add(self.request)
                try:
                    while header := self.rfile.read(HEADER.size):
                        length, request_id, _, opcode = HEADER.unpack(header)
                        body = self.rfile.read(length - HEADER.size)
                        mongo.goes_on.wait()
                        self.wfile.write(mongo._reply(request_id, opcode, body))
                except (OSError, struct.error):
                    pass
                finally:
                    mongo._open.discard(self.request)

        class Server(socketserver.ThreadingTCPServer):
            allow_reuse_address = True
            daemon_threads = True

        self._server = Server(("127.0.0.1", self.port), Handler)
        self.port = self._server.server_address[1]
        threading.Thread(target=self._server.serve_forever, args=(0.01,), daemon=True).start()

    def stop(self) -> None:
        self._server.shutdown()
        self._server.server_close()
        for connection in list(self._open):
            connection.shutdown(socket.SHUT_RDWR)

    def _reply(self, request_id: int, opcode: int, body: bytes) -> bytes:
        if opcode == OP_QUERY:
            payload = struct.pack("<iqii", 8, 0, 0, 1) + bson.encode({**HELLO, "localTime": datetime.now(UTC)})
            return HEADER.pack(HEADER.size + len(payload), 0, request_id, OP_REPLY) + payload
        (size,) = struct.unpack_from("<i", body, 5)
        command = bson.decode(body[5 : 5 + size], codec_options=AWARE)
        payload = struct.pack("<IB", 0, 0) + bson.encode(self._answer(command))
        return HEADER.pack(HEADER.size + len(payload), 0, request_id, OP_MSG) + payload

    def _answer(self, command: Document) -> Document:
        if "find" not in command:
            return {**HELLO, "localTime": datetime.now(UTC)}
        place = f"{command['$db']}.{command['find']}"
        self.asked.append(command["filter"])
        found = [item for item in self.documents.get(place, []) if _matches(item, command["filter"])]
        return {"cursor": {"id": 0, "ns": place, "firstBatch": found[: command.get("limit") or None]}, "ok": 1.0}


def _matches(document: Document, wanted: Document) -> bool:
    for field, value in wanted.items():
        if field == "$or":
            if not any(_matches(document, each) for each in value):
                return False
        elif isinstance(value, dict):
            if document.get(field) is None or not _ms(document[field]) > _ms(value["$gt"]):
                return False
        elif document.get(field) != value:
            return False
    return True


def _ms(moment: datetime | DatetimeMS) -> int:
    return int(moment if isinstance(moment, DatetimeMS) else DatetimeMS(moment))
