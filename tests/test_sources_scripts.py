"""Scripts as key sources: what they may give, what a hostile or broken one can't do, and that a changed one is used."""

import asyncio
import os
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from gateway.keys import Key
from gateway.limits import Limits
from gateway.secret import Secret
from gateway.sources.scripts import LuaScript, PythonScript, Script
from gateway.sources.settings import Lua, Python
from gateway.sources.source import Asked, Refused, SourceFailed
from gateway.yaml_text import ConfigError
from waiting import eventually

ASKED = Asked(Secret("sk-secret"), "5ec2e7", "10.0.0.1")
ALICE = Key(
    id=0, name="alice", hint="", created_at="", disabled=False, expires_at=None, models=("m",), limits=Limits(rpm=3)
)


def lua(folder: Path, text: str, timeout_s: float = 20, max_instructions: int = 1_000_000) -> Script:
    (folder / "who.lua").write_text(text)
    return LuaScript(Lua(path=folder / "who.lua", timeout_s=timeout_s, max_instructions=max_instructions))


def python(folder: Path, text: str, timeout_s: float = 20) -> Script:
    (folder / "who.py").write_text(text)
    return PythonScript(Python(path=folder / "who.py", timeout_s=timeout_s))


LANGUAGES = {"lua": lua, "python": python}

GIVES: dict[str, tuple[str, str, object]] = {
    "a key": ("lua", 'function find(r) return {name = "alice", models = {"m"}, rpm = 3} end', ALICE),
    "a key in Python": ("python", 'def find(r): return {"name": "alice", "models": ("m",), "rpm": 3}', ALICE),
    "nothing": ("lua", "function find(r) end", None),
    "nothing in Python": ("python", "def find(r): pass", None),
    "no": ("lua", "function find(r) return false end", Refused("key_disabled")),
    "no, and why": (
        "python",
        'def find(r): return {"allowed": False, "reason": "unpaid"}',
        Refused("key_disabled", "unpaid"),
    ),
    "what it was asked": (
        "lua",
        "function find(r) return {allowed = false, reason = r.key .. r.sha256 .. r.address} end",
        Refused("key_disabled", "sk-secret5ec2e710.0.0.1"),
    ),
    "what it was asked in Python": (
        "python",
        'def find(r): return {"allowed": False, "reason": r.key + r.sha256 + r.address}',
        Refused("key_disabled", "sk-secret5ec2e710.0.0.1"),
    ),
    "a print is no answer": ("python", 'def find(r):\n    print("hello")\n    return None', None),
    "its texts may use patterns": (
        "lua",
        'function find(r) return {allowed = false, reason = r.key:match("^sk%-(%a+)$")} end',
        Refused("key_disabled", "secret"),
    ),
}


@pytest.mark.parametrize(("language", "text", "expected"), GIVES.values(), ids=GIVES)
def test_what_it_gives(tmp_path: Path, language: str, text: str, expected: object) -> None:
    script = LANGUAGES[language](tmp_path, text)
    assert script.find(ASKED) == expected
    script.close()


LOOP = "while true do end"
FAILS: dict[str, tuple[str, str, str]] = {
    "an endless loop": ("lua", f"function find(r) {LOOP} end", "has used up its instructions"),
    "one within pcall": ("lua", f"function find(r) while true do pcall(function() {LOOP} end) end end", "instructions"),
    "one that ignores the end": (
        "lua",
        f"function find(r) pcall(function() {LOOP} end) return {{name = 'x'}} end",
        "instr",
    ),
    "one in a callback of sort": (
        "lua",
        f"function find(r) table.sort({{3, 2, 1}}, function() {LOOP} end) end",
        "instr",
    ),
    "one in a callback of gsub": (
        "lua",
        f"function find(r) ('x'):gsub('x', function() {LOOP} end) end",
        "instructions",
    ),
    "a recursion": ("lua", "function find(r) return 1 + find(r) end", "memory"),
    "a file": ("lua", 'function find(r)\n  return io.open("/etc/passwd"):read("a")\nend', "throws an error at line 2"),
    "a command": ("lua", 'function find(r) os.execute("id") end', "throws an error at line 1"),
    "a module": ("lua", 'function find(r) require("io") end', "throws an error"),
    "another file": ("lua", 'function find(r) dofile("/etc/passwd") end', "throws an error"),
    "other code": ("lua", 'function find(r) load("x = 1")() end', "throws an error"),
    "bytecode": ("lua", "function find(r) return {name = string.dump(find)} end", "throws an error"),
    "bytecode, by a text's method": ("lua", 'function find(r) return {name = (""):dump()} end', "throws an error"),
    "taking the hook away": ("lua", "function find(r) debug.sethook() end", "throws an error"),
    "a coroutine": ("lua", f"function find(r) coroutine.wrap(function() {LOOP} end)() end", "throws an error"),
    "a finalizer": ("lua", "function find(r) setmetatable({}, {__gc = find}) end", "throws an error"),
    "Python": ("lua", 'function find(r) return python.eval("1") end', "throws an error"),
    "the real globals": ("lua", "function find(r) return _G.io end", "throws an error"),
    "a text of a gigabyte": ("lua", 'function find(r) return {name = ("x"):rep(1e9)} end', "memory"),
    "a text that doubles": ("lua", 'function find(r) local s = "x" while true do s = s .. s end end', "memory"),
    "tables without end": ("lua", "function find(r) local t = {} for i = 1, 1e9 do t[i] = {} end end", "memory"),
    "it throws": ("lua", 'function find(r)\n\n  error("for " .. r.key)\nend', "throws an error at line 3"),
    "it throws a table": ("lua", "function find(r) error({}) end", "throws an error at line ?"),
    "it throws in Python": ("python", "def find(r):\n\n    raise ValueError(r.key)", "throws ValueError at line 3"),
    "a function": ("lua", "function find(r) return {name = find} end", "returns a function"),
    "a table within itself": ("lua", "function find(r) local t = {} t.t = t return t end", "returns a table"),
    "not UTF-8": ("lua", 'function find(r) return {name = "\\255"} end', "not UTF-8"),
    "no JSON in Python": ("python", "def find(r): return {'name': object()}", "returns a object"),
    "not a number": ("python", "def find(r): return {'name': 'a', 'rps': float('nan')}", "rps: expected a number"),
    "nonsense": ("lua", "function find(r) return 5 end", "int instead of fields"),
    "negative": ("lua", 'function find(r) return {name = "a", rpm = -1} end', "rpm"),
    "a very long answer": ("python", "def find(r): return {'name': 'a' * 1_000_000}", "more than 100,000 bytes"),
    "its own end": ("python", "import os\ndef find(r): os._exit(0)", "ended without an answer"),
}


@pytest.mark.parametrize(("language", "text", "expected"), FAILS.values(), ids=FAILS)
def test_what_fails(tmp_path: Path, language: str, text: str, expected: str) -> None:
    """Twice: a script that failed is asked again. The text of an error may hold the key, and is not told."""
    script = LANGUAGES[language](tmp_path, text)
    for _ in range(2):
        with pytest.raises(SourceFailed) as caught:
            script.find(ASKED)
        assert expected in str(caught.value)
        assert "secret" not in str(caught.value)
    script.close()


ENDLESS: dict[str, tuple[str, str]] = {
    "a pattern": ("lua", 'function find(r) return ("a"):rep(40):find(("a*"):rep(40) .. "b") end'),
    "pcall within pcall": ("lua", "local function f() while true do pcall(f) end end\nfunction find(r) f() end"),
    "a loop in Python": ("python", "def find(r):\n    while True: pass"),
    "sleep in Python": ("python", "import time\ndef find(r): time.sleep(60)"),
    "one that takes no signal": (
        "python",
        "import signal\nsignal.signal(signal.SIGALRM, signal.SIG_IGN)\ndef find(r):\n    while True: pass",
    ),
}


@pytest.mark.parametrize(("language", "text"), ENDLESS.values(), ids=ENDLESS)
async def test_what_does_not_end_is_ended(tmp_path: Path, language: str, text: str) -> None:
    """Its process is, and the event loop goes on meanwhile."""
    script = LANGUAGES[language](tmp_path, text, timeout_s=0.5)
    asking = asyncio.ensure_future(asyncio.to_thread(script.find, ASKED))
    ticks = 0
    while not asking.done():
        await asyncio.sleep(0.01)
        ticks += 1
    assert ticks > 10
    assert "answer" in str(asking.exception())
    assert script._pool.has_free is False
    script.close()


def test_a_script_that_outlives_the_gateway_ends_by_itself(tmp_path: Path) -> None:
    pid_file = tmp_path / "pid"
    text = f"import os\nopen({str(pid_file)!r}, 'w').write(str(os.getpid()))\ndef find(r):\n    while True: pass"
    script = python(tmp_path, text, timeout_s=0.5)
    pid = int(pid_file.read_text())
    with script._pool.one() as child:
        assert child._process.stdin
        child._process.stdin.write(b'{"id": "", "key": "", "sha256": "", "address": ""}\n')
        eventually(lambda: child._process.poll() is not None, "its end", 10)
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


def test_a_changed_script_is_used_at_the_next_question(tmp_path: Path) -> None:
    script = lua(tmp_path, "function find(r) return nil end")
    assert script.find(ASKED) is None
    (tmp_path / "who.lua").write_text('function find(r) return {name = "alice", models = {"m"}, rpm = 3} end')
    assert script.find(ASKED) == ALICE
    (tmp_path / "who.lua").write_text("function find(r")
    with pytest.raises(SourceFailed, match=r"who\.lua:1:"):
        script.find(ASKED)
    (tmp_path / "who.lua").write_text("function find(r) return false end")
    assert script.find(ASKED) == Refused("key_disabled")
    script.close()


AT_THE_START: dict[str, tuple[str, str, str]] = {
    "no Lua": ("lua", "function find(", "who.lua:1:"),
    "no function": ("lua", "x = 1", "has no function 'find'"),
    "an endless loop": ("lua", "while true do end", "has used up its instructions"),
    "no Python": ("python", "def find(", "SyntaxError"),
    "no function in Python": ("python", "find = 1", "has no function 'find'"),
    "a missing module": ("python", "import nothing_of_this_name", "ModuleNotFoundError"),
}


@pytest.mark.parametrize(("language", "text", "expected"), AT_THE_START.values(), ids=AT_THE_START)
def test_what_is_wrong_at_the_start(tmp_path: Path, language: str, text: str, expected: str) -> None:
    with pytest.raises(ConfigError) as caught:
        LANGUAGES[language](tmp_path, text)
    assert expected in str(caught.value)


def test_no_file(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="can't be read: No such file"):
        LuaScript(Lua(path=tmp_path / "none.lua"))


def test_a_script_is_asked_by_as_many_processes_as_threads_ask(tmp_path: Path) -> None:
    script = python(
        tmp_path, "import os, time\ndef find(r):\n    time.sleep(0.2)\n    return {'name': str(os.getpid())}"
    )

    async def ask() -> set[str]:
        answers = await asyncio.gather(*(asyncio.to_thread(script.find, ASKED) for _ in range(3)))
        return {answer.name for answer in answers if isinstance(answer, Key)}

    began = time.monotonic()
    assert len(asyncio.run(ask())) > 1
    assert time.monotonic() - began < 30
    script.close()


def test_a_process_of_an_old_script_answers_nobody_else(tmp_path: Path) -> None:
    """Not even when it was busy while the file changed."""
    started = tmp_path / "started"
    old = f"""
import time, pathlib
def find(request):
    if request.address == "slow":
        pathlib.Path({str(started)!r}).touch()
        while pathlib.Path({str(started)!r}).exists():
            time.sleep(0.01)
    return {{"name": "old"}}
"""
    script = python(tmp_path, old)
    with ThreadPoolExecutor(1) as pool:
        slow = pool.submit(script.find, Asked(Secret("sk-1"), "1", "slow"))
        eventually(started.exists)
        (tmp_path / "who.py").write_text("def find(request): pass  # everybody is out")
        assert script.find(ASKED) is None
        started.unlink()
        assert isinstance(slow.result(), Key)
    assert [script.find(ASKED) for _ in range(5)] == [None] * 5
    script.close()


def test_a_script_that_forks_answers_each_question_once(tmp_path: Path) -> None:
    text = """
import os, time
def find(request):
    if request.key == "alice":
        if os.fork() == 0:
            time.sleep(0.05)
        return {"name": "alice"}
    time.sleep(0.1)
"""
    script = python(tmp_path, text)
    for _ in range(3):
        assert isinstance(script.find(Asked(Secret("alice"), "a", "")), Key)
        assert [script.find(Asked(Secret(f"{number}"), "", "")) for number in range(3)] == [None] * 3
    script.close()


# Written where its answers go, whatever number that has.
SAY = """
import os, stat, threading, time
def say(text, pipes=[number for number in range(3, 30) if os.path.exists(f"/proc/self/fd/{number}")]):
    for number in pipes:
        if stat.S_ISFIFO(os.fstat(number).st_mode):
            os.write(number, text)
"""
SURPLUS: dict[str, tuple[str, list[str]]] = {
    "before its answer": (
        'def find(request):\n    say(b\'{"answer": {"name": "evil"}}\\n\')\n    time.sleep(0.2)',
        ["answers another question"] * 2,
    ),
    "with its answer": (
        "def find(request):\n    say(b'{} ')",
        ["says more than its answer"] * 2,
    ),
    "an old answer again": (
        'def find(request):\n    say(b\'{"id": null, "answer": {"name": "evil"}}\\n\')\n    time.sleep(0.2)',
        ["answers another question"] * 2,
    ),
    "after its answer": (
        'def find(request):\n    threading.Timer(0.05, say, [b\'{"answer": {"name": "evil"}}\\n\']).start()',
        ["None", "has ended, or has said something without being asked"],
    ),
}


@pytest.mark.parametrize(("text", "expected"), SURPLUS.values(), ids=SURPLUS)
def test_what_a_script_says_without_being_asked_answers_nobody(tmp_path: Path, text: str, expected: list[str]) -> None:
    script = python(tmp_path, SAY + text)
    found = []
    for _ in expected:
        try:
            found.append(str(script.find(ASKED)))
        except SourceFailed as error:
            found.append(str(error))
        eventually(lambda: not script._pool._free or script._pool._free[-1]._poll.poll(0))
    assert found == expected
    script.close()


def test_what_a_script_has_started_ends_with_it(tmp_path: Path) -> None:
    pid_file = tmp_path / "pid"
    text = f"""
import subprocess
open({str(pid_file)!r}, "w").write(str(subprocess.Popen(["sleep", "600"]).pid))
def find(request): pass
"""
    script = python(tmp_path, text)
    pid = int(pid_file.read_text())
    os.kill(pid, 0)
    script.close()
    eventually(lambda: not _runs(pid), "its end")


def _runs(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False
