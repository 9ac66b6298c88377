"use strict";
// Elements from values. Whatever comes from a server becomes text, never markup: there is no innerHTML here, and the
// page's policy (trusted types) makes the browser refuse it.

const SVG = "http://www.w3.org/2000/svg";

function element(id) {
  return document.getElementById(id);
}

/** make("td", {class: "number", onclick: f}, "text", child, null) */
function make(tag, attributes = {}, ...children) {
  return fill(document.createElement(tag), attributes, children);
}

function draw(tag, attributes = {}, ...children) {
  return fill(document.createElementNS(SVG, tag), attributes, children);
}

function fill(node, attributes, children) {
  for (const [name, value] of Object.entries(attributes)) {
    if (name.startsWith("on")) node.addEventListener(name.slice(2), value);
    else if (value === true) node.setAttribute(name, "");
    else if (value !== null && value !== false && value !== undefined) node.setAttribute(name, value);
  }
  node.append(...children.filter((child) => child !== null && child !== undefined));
  return node;
}

/** Only what differs is touched, so that a selection or a screen reader in it is not disturbed. */
function say(node, text) {
  if (node.textContent !== text) node.textContent = text;
}

function setClass(node, name) {
  if (node.getAttribute("class") !== name) node.setAttribute("class", name);
}

/**
 * Children of `parent`, one for each item. Who has a child keeps it, and with it the focus, the selection and what is
 * being typed in it; `create(item)` makes new ones, `update(child, item)` brings every one up to date.
 */
function sync(parent, items, keyOf, create, update) {
  const old = new Map([...parent.children].map((child) => [child.dataset.key, child]));
  const wanted = items.map((item) => {
    const key = String(keyOf(item));
    const child = old.get(key) ?? create(item);
    old.delete(key);
    child.dataset.key = key;
    update(child, item);
    return child;
  });
  for (const child of old.values()) child.remove();
  wanted.forEach((child, place) => {
    if (parent.children[place] !== child) parent.insertBefore(child, parent.children[place] ?? null);
  });
}

/** A table's row. `cells`: [column's name, class or null]; the first is the row's head. */
function makeRow(cells) {
  const row = make("tr", { role: "row" });
  cells.forEach(([label, name], place) => {
    const isHead = place === 0;
    const attributes = { class: name, "data-label": label, role: isHead ? "rowheader" : "cell" };
    row.append(make(isHead ? "th" : "td", isHead ? { ...attributes, scope: "row" } : attributes));
  });
  return row;
}

function makeTable(caption, columns, isCards = true) {
  const head = columns.map(([label, name]) => make("th", { class: name, scope: "col", role: "columnheader" }, label));
  return make(
    "table",
    { class: isCards ? "cards" : null, role: "table" },
    caption && make("caption", {}, caption),
    make("thead", { role: "rowgroup" }, make("tr", { role: "row" }, ...head)),
    make("tbody", { role: "rowgroup" }),
  );
}
