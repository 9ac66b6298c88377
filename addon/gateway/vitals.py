"""What /health and /metrics say of the worker that is asked."""

from collections import Counter

from gateway.balancer import Balancer
from gateway.changes import ReloadReport
from gateway.ledger import Ledger
from gateway.replies import Reply, answer
from gateway.routing import Router
from gateway.shared_counters import SharedCounters


class Vitals:
    """`shared` None: limits are counted in the ledger."""

    def __init__(self, router: Router, balancer: Balancer, ledger: Ledger, shared: SharedCounters | None) -> None:
        self._router = router
        self._balancer = balancer
        self._ledger = ledger
        self._shared = shared
        self._outcomes: Counter[str] = Counter()

    def count(self, outcome: str) -> None:
        """A request has ended."""
        self._outcomes[outcome] += 1

    def health(self, report: ReloadReport, loaded_at: str, *, draining: bool) -> Reply:
        """`report`: what became of the config that was read last. `loaded_at`: since when the one in use is."""
        problem = "draining" if draining else None if self._ledger.healthy else "rows can't be written"
        states = {server.name: server.health.state for server in self._router.servers}
        body: dict[str, object] = {
            "status": problem or "ok",
            "servers": {"total": len(states), "up": [*states.values()].count("up"), "states": states},
            "running": sum(server.running for server in self._router.known()),
            "waiting": self._balancer.waiting,
            "config": _config_state(report, loaded_at),
        }
        if self._shared:
            body["limits"] = {"ok": self._shared.healthy, "problem": self._shared.problem}
        return answer(503 if problem else 200, body)

    def metrics(self) -> str:
        """In Prometheus' text format."""
        lines = ["# TYPE llmproxy_requests_total counter"]
        lines += [
            f'llmproxy_requests_total{{outcome="{name}"}} {count}' for name, count in sorted(self._outcomes.items())
        ]
        lines.append("# TYPE llmproxy_running gauge")
        running: Counter[str] = Counter()
        for server in self._router.known():
            running[server.name] += server.running
        lines += [f"llmproxy_running{{server={_label(name)}}} {count}" for name, count in running.items()]
        lines.append("# TYPE llmproxy_server_up gauge")
        lines += [
            f"llmproxy_server_up{{server={_label(server.name)}}} {int(server.health.state == 'up')}"
            for server in self._router.servers
        ]
        lines.append("# TYPE llmproxy_waiting gauge")
        lines.append(f"llmproxy_waiting {self._balancer.waiting}")
        lines.append("# TYPE llmproxy_ledger_healthy gauge")
        lines.append(f"llmproxy_ledger_healthy {int(self._ledger.healthy)}")
        if self._shared:
            lines.append("# TYPE llmproxy_limits_healthy gauge")
            lines.append(f"llmproxy_limits_healthy {int(self._shared.healthy)}")
        return "\n".join(lines) + "\n"


def _config_state(report: ReloadReport, loaded_at: str) -> dict[str, object]:
    state = {"ok": report.ok, "loaded_at": loaded_at}
    if not report.ok:
        return {**state, "problem": report.problem, "at": report.at}
    return {**state, "needs_restart": report.needs_restart} if report.needs_restart else state


def _label(value: str) -> str:
    escaped = value.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
    return f'"{escaped}"'
