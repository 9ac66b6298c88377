"""The recordings are whole: each is what one POST got, with its framing in order."""

import pytest

from recordings import Recording, recordings


@pytest.mark.parametrize("recording", recordings().values(), ids=recordings())
def test_recording(recording: Recording) -> None:
    response = recording.response
    assert recording.method == "POST"
    assert recording.path.startswith("/")
    assert 200 <= recording.status < 600
    assert len(recording.request.body) == int(recording.request.headers["content-length"])
    if response.chunks:
        framed = b"".join(b"%x\r\n%b\r\n" % (len(chunk), chunk) for chunk in (*response.chunks, b""))
        assert response.raw.endswith(b"\r\n\r\n" + framed)
        assert recording.streamed
    else:
        assert len(response.body) == int(response.headers["content-length"])


def test_there_are_all_of_them() -> None:
    assert len(recordings()) == 107
    assert sum(recording.streamed for recording in recordings().values()) > 20
