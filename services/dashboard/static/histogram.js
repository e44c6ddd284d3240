// How the magnitudes of one parameter's gradient are distributed: a row for each power of four, a column for some steps.
import { shade } from "./heatmap.js";
import { get, h, number } from "./util.js";

const COLUMNS = 200, ROW = 9;

export class Histogram {
  constructor(holder, job) {
    this.holder = holder;
    this.job = job;
    this.title = h("h2");
    this.canvas = h("canvas", { role: "img" });
    this.tip = h("div", { class: "tip", hidden: true });
    this.top = h("span"); this.bottom = h("span");
    this.found = null;
    holder.replaceChildren(this.title, h("div", { class: "heat histogram" }, h("div", { class: "ends" }, this.top, this.bottom), this.canvas, this.tip),
      h("p", { class: "muted" }, "Each column is a step; brighter: more of the elements are about so large. Zeros are left out."));
    this.canvas.addEventListener("mousemove", (event) => this.point(event));
    this.canvas.addEventListener("mouseleave", () => { this.tip.hidden = true; });
  }

  async read(name, range) {
    this.found = await get(`/api/jobs/${encodeURIComponent(this.job)}/histograms?name=${encodeURIComponent(name)}&points=${COLUMNS}&${range}`);
    this.title.textContent = `|g| of ${name}, element by element`;
    this.draw();
  }

  draw() {
    const { steps, powers, values } = this.found;
    const rows = values.length, columns = steps.length;
    this.holder.hidden = !columns || !rows;
    if (this.holder.hidden) return;
    this.canvas.width = columns; this.canvas.height = rows;
    this.canvas.style.height = `${Math.max(rows * ROW, 40)}px`;
    const most = Math.max(...values.map((row) => Math.max(...row)));
    const pen = this.canvas.getContext("2d");
    const image = pen.createImageData(columns, rows);
    for (let row = 0; row < rows; row += 1) {
      for (let column = 0; column < columns; column += 1) {
        image.data.set([...shade(values[rows - 1 - row][column] / (most || 1)), 255], 4 * (row * columns + column));
      }
    }
    pen.putImageData(image, 0, 0);
    this.top.textContent = number(10 ** powers[rows], 2); this.bottom.textContent = number(10 ** powers[0], 2);
    this.canvas.setAttribute("aria-label", `Magnitudes from ${this.bottom.textContent} to ${this.top.textContent} over steps ${steps[0]} to ${steps[columns - 1]}`);
  }

  point(event) {
    const { steps, powers, values } = this.found;
    const box = this.canvas.getBoundingClientRect();
    const row = values.length - 1 - Math.floor(((event.clientY - box.top) / box.height) * values.length);
    const column = Math.floor(((event.clientX - box.left) / box.width) * steps.length);
    this.tip.hidden = !values[row] || values[row][column] === undefined;
    if (this.tip.hidden) return;
    this.tip.textContent = `step ${steps[column]} · ${number(10 ** powers[row], 2)} to ${number(10 ** powers[row + 1], 2)} · ${number(100 * values[row][column], 2)} %`;
    const place = event.clientX - box.left + this.canvas.offsetLeft;
    this.tip.style.left = `${Math.min(place + 12, Math.max(0, this.holder.clientWidth - this.tip.offsetWidth - 4))}px`;
    this.tip.style.top = `${event.clientY - box.top + 14}px`;
  }
}
