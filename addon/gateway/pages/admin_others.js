"use strict";
// Keys of other sources than keys.db: what is known of their use. They are managed where they stand.

const otherColumns = [["Key", "name"], ["Today", "number"], ["Now", null], ["Limits", "uses"]];
const otherTable = element("other-table").appendChild(makeTable("", otherColumns));

/** Those that the config file lists, that are counted, or that were used today. */
function othersOf(seen) {
  const used = new Map(seen.today.filter((use) => use.key_id === null).map((use) => [use.key_name, use]));
  const known = seen.callers.map((caller) => ({ ...caller, whose: `${caller.source}/${caller.name}`, today: used.get(caller.name) }));
  for (const caller of seen.callers) used.delete(caller.name);
  const others = [...used.values()].map((today) => ({ name: today.key_name, whose: today.key_name, source: null, team: null, declared: false, running: null, today }));
  return [...known, ...others];
}

function showOthers(seen, wanted) {
  const others = othersOf(seen).filter((other) => `${other.whose} ${other.team ?? ""}`.toLowerCase().includes(wanted));
  element("others").hidden = !others.length;
  sync(otherTable.tBodies[0], others, (other) => JSON.stringify([other.source, other.name]), makeOther, (row, other) => updateOther(row, other, seen));
}

function makeOther() {
  const row = makeRow(otherColumns);
  const [name, today, now, uses] = row.children;
  for (const cell of [name, today, now]) twoLines(cell);
  uses.append(make("ul", { class: "mini" }));
  return row;
}

function updateOther(row, other, seen) {
  const [name, today, now, uses] = row.children;
  const source = other.declared ? `source ${other.source}, in the config file` : other.source ? `source ${other.source}` : "another source";
  sayLines(name, other.name, other.team ? `${source} · team ${other.team}` : source);
  sayToday(today, other.today, seen.currency);
  const isCounted = other.running !== null;
  sayLines(now, isCounted ? `${number(other.running)} running` : "–", isCounted ? `${number(other.requests)} requests, ${short(other.tokens)} tokens in 60 s` : null);
  const limits = usesOf(seen, (use) => use.scope === "key" && use.name === other.whose);
  showUses(uses.firstChild, limits, seen.currency, other.declared ? "no limits" : "known to its source only");
}
