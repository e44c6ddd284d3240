// One view of the whole network: a row for each parameter, a column for some steps, the color one of its signals.
import { color, get, h, number } from "./util.js";

const MOST_DECADES = 6;
const COLUMNS = 300, LEAST_ROW = 7, MOST_HEIGHT = 620;
// Dark blue to yellow, even in lightness (after viridis: van der Walt and Smith, 2015).
const STOPS = [[68, 1, 84], [59, 82, 139], [33, 145, 140], [94, 201, 98], [253, 231, 37]];

export function shade(share) {
  const place = Math.min(Math.max(share, 0), 1) * (STOPS.length - 1);
  const index = Math.min(Math.floor(place), STOPS.length - 2);
  return STOPS[index].map((from, i) => Math.round(from + (STOPS[index + 1][i] - from) * (place - index)));
}

export const SIGNALS = {
  gradient_norm: "‖g‖", update_ratio: "‖Δw‖ / ‖w‖", mean_abs: "mean |g|", max_abs: "max |g|", zeros: "share of g = 0",
  update_norm: "‖Δw‖", parameter_norm: "‖w‖",
};
// Of activation functions, which are the rows then.
export const FUNCTION_SIGNALS = { activation_rms: "RMS of activations", activation_share: "share saturated or off" };
export const TITLES = { ...SIGNALS, ...FUNCTION_SIGNALS };

export class HeatMap {
  // onLayer: called with the name of a parameter that was chosen.
  constructor(holder, job, onLayer) {
    this.holder = holder;
    this.job = job;
    this.onLayer = onLayer;
    this.canvas = h("canvas", { tabindex: 0, role: "img", "aria-label": "A signal of each parameter over the steps; arrow keys choose one, Enter opens it" });
    this.tip = h("div", { class: "tip", hidden: true });
    this.scale = h("canvas", { width: 160, height: 10, "aria-hidden": "true" });
    this.low = h("span"); this.high = h("span");
    this.note = h("p", { class: "muted" });
    holder.replaceChildren(h("div", { class: "heat" }, this.canvas, this.tip), h("div", { class: "scale" }, this.low, this.scale, this.high), this.note);
    this.found = null;
    this.signal = "gradient_norm";
    this.chosen = 0;
    this.canvas.addEventListener("mousemove", (event) => this.point(event));
    this.canvas.addEventListener("mouseleave", () => { this.tip.hidden = true; });
    this.canvas.addEventListener("click", (event) => { const at = this.at(event); if (at) this.onLayer(this.found.names[at.row]); });
    this.canvas.addEventListener("keydown", (event) => this.key(event));
    this.observer = new ResizeObserver(() => this.draw());
    this.observer.observe(holder);
  }

  async read(first = 0, last = null) {
    const range = last === null ? `first=${first}` : `first=${first}&last=${last}`;
    this.found = await get(`/api/jobs/${encodeURIComponent(this.job)}/layers?signal=${this.signal}&points=${COLUMNS}&${range}`);
    this.draw();
  }

  draw() {
    const found = this.found;
    if (!found) return;
    const rows = found.names.length, columns = found.steps.length;
    if (!columns) { this.note.textContent = "Nothing of this is kept of parameters, or nothing yet (telemetry.parameter_norms, telemetry.signals_every)."; this.canvas.hidden = true; return; }
    this.canvas.hidden = false;
    const width = this.holder.clientWidth, height = Math.min(MOST_HEIGHT, Math.max(rows * LEAST_ROW, Math.min(rows * 16, 300), 40));
    this.canvas.width = columns; this.canvas.height = rows;
    this.canvas.style.height = `${height}px`;
    this.canvas.style.width = `${width}px`;
    this.canvas.style.imageRendering = "pixelated";
    const numbers = found.values.flat().filter((value) => value !== null);
    const high = Math.max(...reduce(numbers, Math.max));
    const low = Math.max(Math.min(...reduce(numbers, Math.min)), high - MOST_DECADES); // what is smaller is as dark
    const pen = this.canvas.getContext("2d");
    const image = pen.createImageData(columns, rows);
    const nothing = toRgb(color("--line"));
    for (let row = 0; row < rows; row += 1) {
      for (let column = 0; column < columns; column += 1) {
        const value = found.values[row][column];
        const rgb = value === null ? nothing : shade((value - low) / (high - low || 1));
        image.data.set([...rgb, 255], 4 * (row * columns + column));
      }
    }
    pen.putImageData(image, 0, 0);
    this.low.textContent = `≤ ${number(10 ** low, 2)}`; this.high.textContent = number(10 ** high, 2);
    const brush = this.scale.getContext("2d");
    for (let x = 0; x < 160; x += 1) { brush.fillStyle = `rgb(${shade(x / 159).join()})`; brush.fillRect(x, 0, 1, 10); }
    const count = found.sizes.reduce((sum, size) => sum + size, 0);
    const shared = count > rows ? `, ${Math.ceil(count / rows)} to a row, whose largest counts` : "";
    this.note.textContent = `${count} ${this.signal in FUNCTION_SIGNALS ? "activation function" : "parameter"}${count === 1 ? "" : "s"}, from the input (top) to the output${shared}. Choose a row to see its curve; grey is zero or not finite.`;
  }

  title(row) {
    const { names, sizes } = this.found;
    return sizes[row] > 1 ? `${names[row]} and ${sizes[row] - 1} more` : names[row];
  }

  at(event) {
    if (!this.found || !this.found.steps.length) return null;
    const box = this.canvas.getBoundingClientRect();
    const row = Math.floor(((event.clientY - box.top) / box.height) * this.found.names.length);
    const column = Math.floor(((event.clientX - box.left) / box.width) * this.found.steps.length);
    if (row < 0 || column < 0 || row >= this.found.names.length || column >= this.found.steps.length) return null;
    return { row, column, box };
  }

  point(event) {
    const at = this.at(event);
    if (!at) { this.tip.hidden = true; return; }
    this.show(at.row, at.column, event.clientX - at.box.left, event.clientY - at.box.top);
  }

  show(row, column, x, y) {
    const value = this.found.values[row][column];
    this.tip.hidden = false;
    this.tip.textContent = `${this.title(row)} · step ${this.found.steps[column]} · ${TITLES[this.signal]} ${value === null ? "0 or not finite" : number(10 ** value, 3)}`;
    this.tip.style.left = `${Math.min(x + 12, Math.max(0, this.holder.clientWidth - this.tip.offsetWidth - 4))}px`;
    this.tip.style.top = `${y + 14}px`;
  }

  key(event) {
    if (!this.found || !this.found.names.length) return;
    const last = this.found.names.length - 1;
    if (event.key === "ArrowDown") this.chosen = Math.min(last, this.chosen + 1);
    else if (event.key === "ArrowUp") this.chosen = Math.max(0, this.chosen - 1);
    else if (event.key === "Enter") { this.onLayer(this.found.names[this.chosen]); return; }
    else return;
    event.preventDefault();
    const box = this.canvas.getBoundingClientRect();
    this.show(this.chosen, this.found.steps.length - 1, box.width / 2, ((this.chosen + 0.5) / (last + 1)) * box.height);
  }

  destroy() { this.observer.disconnect(); }
}

// Spreading a very long list into Math.min would overflow the stack.
function reduce(numbers, best) {
  const found = [];
  for (let start = 0; start < numbers.length; start += 10000) found.push(best(...numbers.slice(start, start + 10000)));
  return found.length ? found : [0];
}

function toRgb(hex) {
  const value = parseInt(hex.slice(1), 16);
  return [value >> 16, (value >> 8) & 255, value & 255];
}
