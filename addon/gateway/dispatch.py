"""mitmproxy's dispatch of events to addons, with the handlers of each event looked up once instead of every time.

The same order, the same handling of errors, of `AddonHalt` and of awaitables as `mitmproxy.addonmanager`. Looking
through every addon for a method of the event's name is a large part of what a request costs there.
"""

import inspect
from collections.abc import Callable
from typing import Any

from mitmproxy import exceptions, flow, hooks
from mitmproxy.addonmanager import AddonManager, safecall, traverse


class Dispatch:
    """Takes over `trigger_event` and `handle_lifecycle` of one addon manager."""

    def __init__(self, manager: AddonManager) -> None:
        self._manager = manager
        self._handlers: dict[str, list[Callable[..., Any]]] = {}

    def install(self) -> None:
        manager: Any = self._manager
        manager.trigger_event = self.trigger_event
        manager.handle_lifecycle = self.handle_lifecycle
        for name in ("register", "remove", "add", "clear"):
            setattr(manager, name, self._then_forget(getattr(manager, name)))

    def _then_forget(self, change: Callable[..., Any]) -> Callable[..., Any]:
        """Addons come and go with scripts: after each change, handlers are looked up anew."""

        def changed(*args: Any, **kwargs: Any) -> Any:
            try:
                return change(*args, **kwargs)
            finally:
                self._handlers.clear()

        return changed

    def _of(self, event_name: str) -> list[Callable[..., Any]]:
        handlers = self._handlers.get(event_name)
        if handlers is None:
            found = (getattr(addon, event_name, None) for one in self._manager.chain for addon in traverse([one]))
            handlers = self._handlers[event_name] = [handler for handler in found if callable(handler)]
        return handlers

    async def trigger_event(self, event: hooks.Hook) -> None:
        for handler in self._of(event.name):
            try:
                with safecall():
                    result = handler(*event.args())
                    if result is not None and inspect.isawaitable(result):
                        await result
            except exceptions.AddonHalt:
                return

    async def handle_lifecycle(self, event: hooks.Hook) -> None:
        (message,) = event.args()
        await self.trigger_event(event)
        if isinstance(message, flow.Flow) and self._of(hooks.UpdateHook.name):
            await self.trigger_event(hooks.UpdateHook([message]))
