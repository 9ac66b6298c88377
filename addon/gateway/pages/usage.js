"use strict";
// /usage: asks for a key, and shows what GET /v1/usage says of it.

const DAYS = 31;
const COLOURS = 7; // models with a colour of their own; the eighth is for the others together
const NO_MODEL = "no model";

const MEASURES = {
  tokens: { label: "Tokens", of: (row) => row.prompt_tokens + row.completion_tokens, exact: (value) => `${number(value)} tokens` },
  requests: { label: "Requests", of: (row) => row.requests, exact: (value) => `${number(value)} request${value === 1 ? "" : "s"}` },
  cost: { label: "Cost", of: (row) => row.cost, exact: (value) => money(value, told.currency) },
};

let told = null; // the last answer
let told_at = 0;
const chart = new Chart(element("chart"), element("readout"));
const models = element("models").appendChild(makeTable("By model", []));
const days = element("days").appendChild(makeTable("", [], false));

function choice(name) {
  return document.querySelector(`input[name="${name}"]:checked`).value;
}

async function load() {
  told = await session.call("GET", `v1/usage?days=${DAYS}`);
  told_at = performance.now();
}

function clear() {
  told = null;
  for (const id of ["tiles", "readout", "limit-list", "budget-list"]) element(id).replaceChildren();
  for (const table of [models, days]) table.tBodies[0].replaceChildren();
  chart.clear();
  say(element("whose"), "");
}

function show() {
  say(element("whose"), told.key.team ? `${told.key.name} · team ${told.key.team}` : told.key.name);
  element("cost-choice").hidden = !hasCost();
  if (!hasCost() && choice("measure") === "cost") document.querySelector('input[value="tokens"]').checked = true;
  showUse();
  showLimits();
  say(element("news"), `Up to date as of ${CLOCK.format(new Date())}.`);
}

function hasCost() {
  return told.days.some((row) => row.cost > 0) || told.budgets.some((budget) => budget.unit === "money");
}

function showUse() {
  if (!told) return;
  const period = lastDays(Number(choice("days")));
  const rows = told.days.filter((row) => row.day >= period[0]);
  const measure = MEASURES[choice("measure")];
  showTiles(rows, period);
  const colours = colourOf(told.days);
  chart.show({ days: period, series: seriesOf(rows, period, measure, colours), rough: short, ...measure });
  showModels(rows, colours);
  showDays(rows);
}

function sum(rows, of) {
  return rows.reduce((total, row) => total + of(row), 0);
}

function nameOf(row) {
  return row.model ?? NO_MODEL;
}

/** Model -> its colour, the same in every view: those with most tokens first. */
function colourOf(rows) {
  const totals = new Map();
  for (const row of rows.filter((each) => each.model !== null)) {
    totals.set(row.model, (totals.get(row.model) ?? 0) + MEASURES.tokens.of(row) + row.requests);
  }
  const names = [...totals].sort(([a, x], [b, y]) => y - x || (a < b ? -1 : 1)).map(([name]) => name);
  return new Map(names.slice(0, COLOURS).map((name, place) => [name, place]));
}

function seriesOf(rows, period, measure, colours) {
  const series = new Map();
  for (const row of rows) {
    const name = colours.has(row.model) ? row.model : row.model === null ? NO_MODEL : "other models";
    const colour = colours.get(row.model) ?? COLOURS;
    if (!series.has(name)) series.set(name, { name, colour, values: period.map(() => 0) });
    series.get(name).values[period.indexOf(row.day)] += measure.of(row);
  }
  return [...series.values()].filter((each) => each.values.some(Boolean)).sort((a, b) => a.colour - b.colour);
}

function showTiles(rows, period) {
  const today = rows.filter((row) => row.day === period.at(-1));
  const prompt = sum(rows, (row) => row.prompt_tokens);
  const cached = sum(rows, (row) => row.cached_tokens);
  const tiles = [
    [`Tokens, ${period.length} days`, short(sum(rows, MEASURES.tokens.of)), `${short(sum(today, MEASURES.tokens.of))} today`],
    [`Requests, ${period.length} days`, number(sum(rows, MEASURES.requests.of)), `${number(sum(today, MEASURES.requests.of))} today`],
    ["Prompt from cache", prompt ? percent(cached / prompt) : "–", `${short(cached)} of ${short(prompt)} tokens`],
  ];
  if (hasCost()) {
    tiles.push([`Cost, ${period.length} days`, MEASURES.cost.exact(sum(rows, MEASURES.cost.of)), `${MEASURES.cost.exact(sum(today, MEASURES.cost.of))} today`]);
  }
  const create = () => make("div", { class: "tile" }, make("dt"), make("dd"), make("dd"));
  sync(element("tiles"), tiles, (texts) => tiles.indexOf(texts), create, (tile, texts) => texts.forEach((text, i) => say(tile.children[i], text)));
}

function columns(...first) {
  const amounts = ["Requests", "Prompt", "Cached", "Answers"].map((name) => [name, "number"]);
  return [...first.map((name) => [name, "name"]), ...amounts, ...(hasCost() ? [["Cost", "number"]] : [])];
}

function amounts(rows) {
  const names = ["requests", "prompt_tokens", "cached_tokens", "completion_tokens"];
  const texts = names.map((name) => number(sum(rows, (row) => row[name])));
  const cost = rows.every((row) => row.cost === null) ? "–" : MEASURES.cost.exact(sum(rows, MEASURES.cost.of));
  return hasCost() ? [...texts, cost] : texts;
}

function showModels(rows, colours) {
  const groups = [...Map.groupBy(rows, nameOf)].sort(([, a], [, b]) => sum(b, MEASURES.tokens.of) - sum(a, MEASURES.tokens.of));
  const lines = groups.map(([name, group]) => ({ name, colour: colours.get(group[0].model) ?? COLOURS, texts: amounts(group) }));
  element("no-model").hidden = !groups.some(([name]) => name === NO_MODEL);
  showTable(models, columns("Model"), lines.map((line) => ({ ...line, key: line.name, heads: [line.name] })));
}

function showDays(rows) {
  const lines = rows.map((row) => ({ key: `${row.day} ${nameOf(row)}`, heads: [row.day, nameOf(row)], texts: amounts([row]) }));
  showTable(days, columns("Day", "Model"), lines.reverse());
}

function showTable(table, names, lines) {
  table.tHead.replaceChildren(...makeTable("", names).tHead.children);
  const create = () => makeRow(names);
  const update = (row, line) => {
    const texts = [...line.heads, ...line.texts];
    if (row.children.length !== texts.length) row.replaceChildren(...create().children);
    texts.forEach((text, place) => say(row.children[place], text));
    if (line.colour !== undefined) row.firstChild.replaceChildren(make("span", {}, make("i", { class: `dot s${line.colour}` }), line.heads[0]));
  };
  sync(table.tBodies[0], lines, (line) => line.key, create, update);
}

function showLimits() {
  for (const [list, none, limits] of [["limit-list", "no-limits", told.limits], ["budget-list", "no-budgets", told.budgets]]) {
    element(none).hidden = limits.length > 0;
    const keyOf = (limit) => [limit.scope, limit.name, limit.limit, limit.per, limit.unit].join(" ");
    const amount = (limit) => (limit.unit === "money" ? MEASURES.cost.exact : number);
    sync(element(list), limits, keyOf, makeLimit, (item, limit) => updateLimit(item, limit, scopeName(limit), amount(limit)));
  }
  countDown();
}

function countDown() {
  if (!told) return;
  const age_s = (performance.now() - told_at) / 1000;
  for (const [list, limits] of [["limit-list", told.limits], ["budget-list", told.budgets]]) {
    limits.forEach((limit, place) => say(element(list).children[place].lastChild, resetText(limit, age_s)));
  }
}

for (const input of document.querySelectorAll('input[name="measure"], input[name="days"]')) input.addEventListener("change", showUse);
const gate = new Gate({ load, show, clear });
element("refresh").addEventListener("click", () => gate.refresh());
setInterval(countDown, 1000);
