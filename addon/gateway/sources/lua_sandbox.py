"""A function of Lua that can only count, compare and return: no files, no system, no Python, no other code.

Every call may execute so many instructions and no more: a hook counts them, which the script can neither see nor take
away, and which fails at each further instruction, also within a pcall. What would escape the hook is not there:
coroutines have no hook, handlers of xpcall and finalizers (setmetatable) run while it is switched off. What takes long
within one instruction (patterns) is ended by the process's own end; memory has a bound as well.
"""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

# PUC Lua: LuaJIT's compiled loops call no hook.
from lupa.lua54 import LuaError, LuaMemoryError, LuaRuntime, lua_type

from gateway.sources.source import ScriptOver, SourceFailed

SANDBOX = """
local budget, step, text, name = ...
local sethook, pcall, error, load = debug.sethook, pcall, error, load
local allowed = {}
local words = "assert error ipairs next pairs pcall select tonumber tostring type math string table utf8"
for word in words:gmatch("%a+") do
    allowed[word] = _G[word]
end
string.dump = nil
local spent = 0
local function count()
    spent = spent + step
    if spent >= budget then
        sethook(count, "", 1)
        error("over", 0)
    end
end
local function call(f, ...)
    spent = 0
    sethook(count, "", step)
    local result = f(...)
    sethook()
    return result
end
local chunk, problem = load(text, "=" .. name, "t", allowed)
if not chunk then error(problem, 0) end
call(chunk)
return call, allowed
"""
STEP = 1000
MAX_DEPTH = 8


def load(path: Path, function: str, options: dict[str, Any]) -> Callable[[dict[str, str]], object]:
    """`options`: max_instructions and max_memory_bytes. Raises SourceFailed, and so does what it returns."""
    lua = LuaRuntime(
        register_eval=False,
        register_builtins=False,
        unpack_returned_tuples=True,
        attribute_filter=_deny,
        max_memory=options["max_memory_bytes"],
    )
    name = path.name

    def guarded(work: Callable[[], Any], *, has_key: bool = True) -> Any:
        try:
            return work()
        except LuaMemoryError:
            raise ScriptOver("uses more memory than it may") from None
        except LuaError as error:
            if str(error).partition("\n")[0] == "over":
                raise ScriptOver("has used up its instructions") from None
            if not has_key:
                raise SourceFailed(str(error)) from None
            line = re.match(rf"{re.escape(name)}:(\d+):", str(error))
            raise SourceFailed(f"throws an error at line {line[1] if line else '?'}") from None
        except UnicodeDecodeError:
            raise SourceFailed("returns text that is not UTF-8") from None

    try:
        text = path.read_bytes()
    except OSError as error:
        raise SourceFailed(f"can't be read: {error.strerror}") from None
    chunk = lua.execute("return load(...)", SANDBOX, "=sandbox")
    call, allowed = guarded(lambda: chunk(options["max_instructions"], STEP, text, name), has_key=False)
    lua.globals().python = None
    found = allowed[function]
    if lua_type(found) != "function":
        raise SourceFailed(f"has no function {function!r}")
    return lambda question: guarded(lambda: _plain(call(found, lua.table_from(question))))


def _deny(*_: object) -> str:
    raise AttributeError("nothing of Python is for scripts")


def _plain(value: Any, depth: int = 0) -> object:
    """A table of 1, 2, … is a list; an empty one, too."""
    if value is None or isinstance(value, str | int | float | bool):
        return value
    if lua_type(value) != "table" or depth > MAX_DEPTH:
        raise SourceFailed(f"returns a {lua_type(value) or type(value).__name__}")
    items = [(key, _plain(item, depth + 1)) for key, item in value.items()]
    if [key for key, _ in items] == [*range(1, len(items) + 1)]:
        return [item for _, item in items]
    return {str(key): item for key, item in items}
