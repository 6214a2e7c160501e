// Values under the pointer, and another horizontal axis, for the charts that nanochat/reporting/charts.py drew.
"use strict";
const page = JSON.parse(document.getElementById("chart-data").textContent);
const SVG = "http://www.w3.org/2000/svg";
let axis = "step", log = 0;

function position(scale, value) {
  const { low, high } = scale;
  return scale.log ? Math.log(Math.max(value, low) / low) / Math.log(high / low) : (value - low) / (high - low);
}

function format(value, unit, digits = 4) {
  if (unit === "share") return Number((100 * value).toPrecision(digits)) + "%";
  if (unit === "flops") return value.toPrecision(3).replace("e+", "e");
  if (unit === "step") return Math.round(value).toLocaleString("en");
  if (unit === "seconds") {
    const s = Math.round(value), pair = (n, unit) => String(n).padStart(2, "0") + unit;
    if (s >= 3600) return Math.floor(s / 3600) + "h" + pair(Math.floor(s / 60) % 60, "m");
    return s >= 60 ? Math.floor(s / 60) + "m" + pair(s % 60, "s") : s + "s";
  }
  return Math.abs(value) >= 1000
    ? Intl.NumberFormat("en", { notation: "compact", maximumSignificantDigits: digits }).format(value)
    : String(Number(value.toPrecision(digits)));
}

function make(parent, name, attributes, text = "") {
  const made = parent.appendChild(document.createElementNS(SVG, name));
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  made.textContent = text;
  return made;
}

class Chart {
  constructor(svg) {
    Object.assign(this, page.charts[svg.dataset.chart]);
    this.svg = svg;
    this.output = svg.closest("figure").querySelector("output");
    this.rest = this.output.textContent;
    this.names = [...svg.querySelectorAll(".name")];
    this.labels = this.names.map((name) => name.textContent);
    this.paths = [...svg.querySelectorAll("[data-line]")];
    this.point = -1;  // of the first line, where the arrow keys are
    svg.tabIndex = 0;
    svg.addEventListener("pointermove", (event) => this.pointAt(event.clientX));
    svg.addEventListener("pointerdown", (event) => this.pointAt(event.clientX));
    svg.addEventListener("pointerleave", () => this.leave());
    svg.addEventListener("blur", () => this.leave());
    svg.addEventListener("keydown", (event) => this.key(event));
    this.use();
  }

  use() {  // the chosen axis, or steps where this chart does not have it
    this.axis = this.x[axis] ? axis : "step";
    const scales = this.x[this.axis];
    this.horizontal = scales[log] ?? scales[0];
    this.vertical = this.y[this.horizontal.log ? 1 : 0];
  }

  across(value) { return this.frame[2] * position(this.horizontal, value); }
  down(value) { return this.frame[3] * (1 - position(this.vertical, value)); }

  draw() {
    this.use();
    const [left, top, width, height] = this.frame;
    const [y, x] = [this.svg.querySelector(".y"), this.svg.querySelector(".x")];
    y.replaceChildren();
    for (const [value, text] of this.vertical.ticks) {
      make(y, "path", { d: `M${left} ${top + this.down(value)}h${width}` });
      make(y, "text", { class: "end", x: left - 5, y: top + this.down(value) + 4 }, text);
    }
    x.replaceChildren();
    make(x, "path", { d: `M${left} ${top + height}h${width}` });
    for (const [value, text] of this.horizontal.ticks) {
      make(x, "path", { d: `M${left + this.across(value)} ${top + height}v4` });
      make(x, "text", { class: "middle", x: left + this.across(value), y: top + height + 15 }, text);
    }
    this.svg.querySelector(".axis").textContent = page.axes[this.axis] + (this.horizontal.log ? ", log" : "");
    for (const path of this.paths) {
      const line = this.lines[path.dataset.line];
      const values = path.classList.contains("pale") || !line.smooth.length ? line.values : line.smooth;
      const points = values.map((value, i) => `${this.across(line.axes[this.axis][i])} ${this.down(value)}`);
      path.setAttribute("d", path.classList.contains("dots") ? points.map((p) => `M${p}h0`).join("") : "M" + points.join("L"));
    }
    this.placeNames();
    this.leave();
  }

  placeNames() {  // as `spread` in charts.py
    const [, top, , height] = this.frame;
    const ends = this.lines.map((line) => (line.smooth.length ? line.smooth : line.values).at(-1));
    const order = this.names.map((name, i) => [name, Math.min(height, Math.max(4, this.down(ends[i])))]);
    order.sort((a, b) => a[1] - b[1]);
    for (let i = 1; i < order.length; i++) order[i][1] = Math.max(order[i][1], order[i - 1][1] + this.gap);
    let limit = height;
    for (const [name, y] of order.reverse()) {
      name.setAttribute("y", top + Math.min(y, limit) + 4);
      limit = Math.min(y, limit) - this.gap;
    }
  }

  pointAt(clientX) {
    const box = this.svg.getBoundingClientRect(), [left, , width] = this.frame;
    const at = ((clientX - box.left) * this.svg.viewBox.baseVal.width) / box.width - left;
    if (at >= -8 && at <= width + 8) this.show(at);
    else this.leave();
  }

  key(event) {
    const points = this.lines[0].axes[this.axis], last = points.length - 1;
    const moves = { ArrowLeft: this.point < 0 ? last : this.point - 1, ArrowRight: this.point + 1, Home: 0, End: last };
    if (event.key === "Escape") this.leave();
    if (!(event.key in moves)) return;
    event.preventDefault();
    this.point = Math.min(last, Math.max(0, moves[event.key]));
    this.show(this.across(points[this.point]));
  }

  show(at) {  // the point of each line that is nearest to `at`, in the frame
    this.leave();
    const [left, top, , height] = this.frame, mark = make(this.svg, "g", { class: "mark" });
    const far = (value) => Math.abs(this.across(value) - at);
    const found = this.lines.map((line) => {
      const points = line.axes[this.axis];
      return points.reduce((best, value, i) => (far(value) < far(points[best]) ? i : best), 0);
    });
    const places = found.map((i, number) => this.lines[number].axes[this.axis][i]);
    const where = places.reduce((best, value) => (far(value) < far(best) ? value : best));
    make(mark, "path", { d: `M${left + this.across(where)} ${top}v${height}` });
    const texts = found.map((i, number) => {
      const line = this.lines[number], value = (line.smooth.length ? line.smooth : line.values)[i];
      const look = this.paths.find((path) => path.dataset.line === String(number)).classList[1];
      make(mark, "circle", { class: look, cx: left + this.across(places[number]), cy: top + this.down(value), r: 3.5 });
      return format(value, this.unit) + (line.smooth.length ? ` (${format(line.values[i], this.unit)})` : "");
    });
    const unit = { tokens: " tokens", flops: " FLOPs" }[this.axis] ?? "";
    const place = `at ${this.axis === "step" ? "step " : ""}${format(where, this.axis)}${unit}`;
    this.output.textContent = this.names.length ? place : `${texts[0]} ${place}`;
    this.names.forEach((name, i) => { name.textContent = texts[i]; });
  }

  leave() {
    this.svg.querySelector(".mark")?.remove();
    this.output.textContent = this.rest;
    this.names.forEach((name, i) => { name.textContent = this.labels[i]; });
  }
}

const charts = [...document.querySelectorAll("[data-chart]")].map((svg) => new Chart(svg));
const form = document.getElementById("axes");

function choose() {
  axis = form.elements.axis.value;
  log = form.elements.log.checked ? 1 : 0;
  try { sessionStorage.setItem("axis", JSON.stringify([axis, log])); } catch { /* a page that may store nothing */ }
  for (const chart of charts) chart.draw();
}

if (form) {
  form.hidden = false;
  form.addEventListener("change", choose);
  try {  // a page of a running stage loads itself again and again
    const [kept, wasLog] = JSON.parse(sessionStorage.getItem("axis")) ?? [];
    const radio = [...form.elements.axis].find((input) => input.value === kept);
    if (radio) {
      radio.checked = true;
      form.elements.log.checked = Boolean(wasLog);
      choose();
    }
  } catch { /* a page that may store nothing */ }
}
