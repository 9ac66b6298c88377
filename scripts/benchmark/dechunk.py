"""HTTP/1.1 chunked bodies (RFC 9112, 7.1) to their payloads, sans-IO."""


class Dechunk:
    """Feed it what arrives, get the payloads of the chunks that are complete by now. Raises ValueError on nonsense."""

    def __init__(self) -> None:
        self.ended = False
        self._rest = b""

    def feed(self, data: bytes) -> list[bytes]:
        data = self._rest + data if self._rest else data
        payloads: list[bytes] = []
        at = 0
        while (line_end := data.find(b"\r\n", at)) >= 0:
            size = int(data[at:line_end].partition(b";")[0], 16)
            chunk_end = line_end + 2 + size
            if len(data) < chunk_end + 2:
                break
            if size == 0:
                self.ended = True
                break
            payloads.append(data[line_end + 2 : chunk_end])
            at = chunk_end + 2
        self._rest = data[at:]
        return payloads
