"use strict";
// Stacked bars, one for each day, as SVG. The chart is a slider over its days: a pointer or the arrow keys choose one,
// which the line below it tells in words. The tables beside it hold the same numbers.

const PAD = { left: 46, right: 20, top: 10, bottom: 24 };
const HEIGHT = 240;

/** Round steps for an axis from 0 to at least `highest`: [0, 200, 400, 600]. */
function ticksTo(highest, count = 4) {
  if (!(highest > 0)) return [0, 1];
  const rough = highest / count;
  const power = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 2.5, 5, 10].map((each) => each * power).find((each) => each >= rough * 0.999);
  return Array.from({ length: Math.ceil(highest / step - 0.001) + 1 }, (_, i) => i * step);
}

class Chart {
  /** `holder` becomes the slider, `readout` tells of the chosen day. */
  constructor(holder, readout) {
    this.svg = draw("svg", { "aria-hidden": "true" });
    this.holder = fill(holder, { role: "slider", tabindex: "0" }, [this.svg]);
    this.readout = readout;
    this.data = null;
    this.chosen = null;
    new ResizeObserver(() => this.draw()).observe(holder);
    holder.addEventListener("keydown", (event) => this.press(event));
    for (const name of ["pointermove", "pointerdown"]) this.svg.addEventListener(name, (event) => this.point(event));
  }

  /**
   * `days`: ISO days. `series`: [{name, colour (0 to 7), values}], a value for each day. `label`: what is counted.
   * `exact`, `rough`: a value as text, for the readout and the axis.
   */
  show(data) {
    const kept = this.data && this.data.days[this.chosen];
    this.data = data;
    const place = data.days.indexOf(kept);
    this.chosen = place < 0 ? data.days.length - 1 : place;
    this.holder.setAttribute("aria-label", `${data.label} by day. Arrow keys choose a day.`);
    this.holder.setAttribute("aria-valuemin", "1");
    this.holder.setAttribute("aria-valuemax", String(data.days.length));
    this.draw();
  }

  clear() {
    this.data = null;
    this.svg.replaceChildren();
    this.holder.removeAttribute("aria-valuetext");
  }

  total(place) {
    return this.data.series.reduce((sum, each) => sum + each.values[place], 0);
  }

  draw() {
    const width = this.holder.clientWidth;
    if (!this.data || !width) return;
    const { days, rough } = this.data;
    const ticks = ticksTo(Math.max(...days.map((_, place) => this.total(place))));
    const inner = { width: width - PAD.left - PAD.right, height: HEIGHT - PAD.top - PAD.bottom };
    const y = (value) => PAD.top + inner.height * (1 - value / ticks.at(-1));
    this.step = inner.width / days.length;
    this.svg.setAttribute("viewBox", `0 0 ${width} ${HEIGHT}`);
    const parts = ticks.flatMap((tick) => [
      draw("line", { x1: PAD.left, x2: width - PAD.right, y1: y(tick), y2: y(tick) }),
      draw("text", { x: PAD.left - 8, y: y(tick) + 4, "text-anchor": "end" }, rough(tick)),
    ]);
    this.columns = days.map((_, place) =>
      draw("rect", { class: "day", x: PAD.left + place * this.step, y: PAD.top, width: this.step, height: inner.height, rx: 3 }),
    );
    this.svg.replaceChildren(...this.columns, ...parts, ...days.flatMap((day, place) => this.bar(day, place, y)));
    this.choose(this.chosen);
  }

  bar(day, place, y) {
    const left = PAD.left + place * this.step;
    const width = Math.min(this.step * 0.72, 44);
    const x = left + (this.step - width) / 2;
    let below = 0;
    const parts = [];
    for (const { colour, values } of this.data.series) {
      const [top, bottom] = [y(below + values[place]), y(below)];
      below += values[place];
      if (values[place] > 0) {
        const height = Math.max(bottom - top - (parts.length ? 1 : 0), 1);
        parts.push(draw("rect", { class: `s${colour}`, x, y: top, width, height, rx: Math.min(2, height / 2) }));
      }
    }
    const every = Math.ceil(56 / this.step);
    if ((this.data.days.length - 1 - place) % every === 0) {
      parts.push(draw("text", { x: left + this.step / 2, y: HEIGHT - 6, "text-anchor": "middle" }, dayLabel(day)));
    }
    return parts;
  }

  choose(place) {
    this.chosen = place;
    this.columns.forEach((column, each) => setClass(column, each === place ? "day chosen" : "day"));
    const { days, series, label, exact } = this.data;
    const used = series.filter((each) => each.values[place] > 0);
    const whole = `${longDay(days[place])}: ${used.length ? exact(this.total(place)) : "nothing used"}`;
    const parts = used.map((each) => `${each.name} ${exact(each.values[place])}`);
    this.holder.setAttribute("aria-valuenow", String(place + 1));
    this.holder.setAttribute("aria-valuetext", [`${whole} (${label})`, ...parts].join(", "));
    const list = used.map((each) =>
      make("span", {}, make("i", { class: `dot s${each.colour}` }), `${each.name} ${exact(each.values[place])}`),
    );
    this.readout.replaceChildren(make("b", {}, whole), ...list);
  }

  press(event) {
    if (!this.data) return;
    const last = this.data.days.length - 1;
    const moves = { ArrowLeft: this.chosen - 1, ArrowRight: this.chosen + 1, Home: 0, End: last };
    moves.ArrowDown = moves.ArrowLeft;
    moves.ArrowUp = moves.ArrowRight;
    if (!(event.key in moves)) return;
    event.preventDefault();
    this.choose(Math.min(Math.max(moves[event.key], 0), last));
  }

  point(event) {
    if (!this.data) return;
    const place = Math.floor((event.clientX - this.svg.getBoundingClientRect().left - PAD.left) / this.step);
    if (place >= 0 && place < this.data.days.length && place !== this.chosen) this.choose(place);
  }
}
