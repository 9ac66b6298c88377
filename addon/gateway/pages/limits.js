"use strict";
// A limit or a budget as a bar with words: what is used, what running requests hold, what is left.

const LIMIT_NAMES = {
  rpm: "Requests per minute",
  rps: "Burst of requests",
  tpm: "Tokens per minute",
  concurrency: "Requests at once",
};
const PERIOD_NAMES = { day: "per day", week: "per week", month: "per month", total: "in total" };

/** `limit`: an entry of `limits` or `budgets` of GET /v1/usage. */
function limitName(limit) {
  if (!limit.per) return LIMIT_NAMES[limit.limit] ?? limit.limit;
  return `${limit.unit === "money" ? "Money" : "Tokens"} ${PERIOD_NAMES[limit.per] ?? limit.per}`;
}

function scopeName(limit) {
  return { key: "this key", all: "everybody together" }[limit.scope] ?? `${limit.scope} ${limit.name}`;
}

function makeLimit() {
  return make(
    "li",
    {},
    make("p", { class: "limit-name" }, make("b"), make("span")),
    makeBar(),
    make("p", { class: "small number" }),
    make("p", { class: "small quiet number", "data-resets": "" }),
  );
}

/** `amount`: a value of this limit as text. */
function updateLimit(item, limit, scope, amount) {
  const [name, bar, words] = item.children;
  say(name.children[0], limitName(limit));
  say(name.children[1], scope);
  const text = limit.allowed > 0 ? [...takenText(limit, amount), `${amount(limit.left)} left`].join(" · ") : "Nothing is allowed.";
  updateBar(bar, limit, `${limitName(limit)}, ${scope}`, text);
  say(words, text);
}

function makeBar() {
  return make("div", { class: "bar", role: "meter", "aria-valuemin": "0" }, make("i", { class: "used" }), make("i", { class: "held" }));
}

/** `limit`: anything with allowed, used and held. */
function updateBar(bar, limit, label, text) {
  const share = (value) => (limit.allowed > 0 ? Math.min(value / limit.allowed, 1) : 1);
  const taken = share(limit.used + limit.held);
  setClass(bar, `bar ${taken >= 1 ? "bad" : taken >= 0.8 ? "warn" : ""}`.trim());
  bar.children[0].style.width = `${share(limit.used) * 100}%`;
  bar.children[1].style.width = `${Math.min(share(limit.held), 1 - share(limit.used)) * 100}%`;
  bar.setAttribute("aria-label", label);
  bar.setAttribute("aria-valuemax", String(limit.allowed));
  bar.setAttribute("aria-valuenow", String(Math.min(limit.used + limit.held, limit.allowed)));
  bar.setAttribute("aria-valuetext", text);
}

function takenText(limit, amount) {
  if (limit.limit === "concurrency") return [`${amount(limit.held)} of ${amount(limit.allowed)} running`];
  const used = `${amount(limit.used)} of ${amount(limit.allowed)} used`;
  return limit.held > 0 ? [used, `${amount(limit.held)} held`] : [used];
}

/** When a limit is free again, `age_s` seconds after its state was told. */
function resetText(limit, age_s) {
  if (limit.resets_in_s === null) return limit.per === "total" ? "Never resets." : "";
  const left = limit.resets_in_s - age_s;
  if (limit.per) return left > 0 ? `Resets in ${span(left)}: ${moment(limit.resets_at)}` : "Has reset since.";
  if (!(limit.used > 0)) return limit.held > 0 ? "Free again as running requests end." : "All of it is free.";
  return left > 0 ? `All of it is free again in ${span(left)}.` : "All of it is free again.";
}
