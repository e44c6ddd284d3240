// Line charts over steps. All charts of a page share one cursor and one zoom.
import uPlot from "./vendor/uPlot.esm.js";
import { color, get, number } from "./util.js";

const SYNC = "steps";
const POINTS = 700, MOST_POINTS = 2400;

function smooth(values, weight) {
  if (!weight) return values;
  let mean = null, norm = 0;
  return values.map((value) => {
    if (value === null || value === undefined) return value;
    mean = weight * (mean ?? 0) + (1 - weight) * value;
    norm = weight * norm + (1 - weight);
    return mean / norm;
  });
}

function positive(values) {
  return values.map((value) => (value > 0 ? value : null));
}

// What is drawn of a job: at first a coarse reading of all its steps, then what comes, until it is read anew.
export class Series {
  constructor(job, names) {
    this.job = job;
    this.names = names;
    this.first = 0;
    this.last = null;
    this.clear();
  }

  clear() {
    this.steps = [];
    this.values = Object.fromEntries(this.names.map((name) => [name, { min: [], max: [], mean: [] }]));
  }

  async read() {
    const range = this.last === null ? `first=${this.first}` : `first=${this.first}&last=${this.last}`;
    const names = encodeURIComponent(this.names.join(","));
    const found = await get(`/api/jobs/${encodeURIComponent(this.job)}/series?names=${names}&points=${POINTS}&${range}`);
    this.steps = found.steps;
    this.values = found.series;
  }

  // Returns whether there are so many points now that the whole should be read anew.
  add(records) {
    for (const record of records) {
      if (this.last !== null || (this.steps.length && record.step <= this.steps[this.steps.length - 1])) continue;
      this.steps.push(record.step);
      for (const name of this.names) {
        const value = record[name] ?? null;
        for (const kind of ["min", "max", "mean"]) this.values[name][kind].push(value);
      }
    }
    return this.steps.length > MOST_POINTS;
  }
}

export class Chart {
  // lines: [[name of a series, label, index of a color]]; others: Series of other jobs, drawn dashed.
  constructor(holder, lines, options, onZoom) {
    this.holder = holder;
    this.lines = lines;
    this.options = options;
    this.onZoom = onZoom;
    this.plot = null;
    this.observer = new ResizeObserver(() => this.resize());
    this.observer.observe(holder);
  }

  resize() {
    if (this.plot) this.plot.setSize({ width: this.holder.clientWidth, height: this.height() });
  }

  height() { return this.options.height || 230; }

  data(series, others) {
    const { log, smoothing } = this.options.settings;
    const columns = [];
    const take = (from, name, kind) => {
      const values = from.values[name]?.[kind] ?? [];
      const plain = kind === "mean" ? smooth(values, smoothing) : values;
      return log && !this.options.linear ? positive(plain) : plain;
    };
    const tables = [[series.steps]];
    for (const [name] of this.lines) {
      tables[0].push(take(series, name, "mean"));
      if (!smoothing) tables[0].push(take(series, name, "min"), take(series, name, "max"));
    }
    for (const other of others) tables.push([other.steps, ...this.lines.map(([name]) => take(other, name, "mean"))]);
    columns.push(...(tables.length > 1 ? uPlot.join(tables) : tables[0]));
    return columns;
  }

  draw(series, others = []) {
    const data = this.data(series, others);
    const key = JSON.stringify([others.map((o) => o.job), this.options.settings, document.documentElement.dataset.theme]);
    if (this.plot && key === this.key) { this.plot.setData(data); return; }
    this.key = key;
    if (this.plot) this.plot.destroy();
    this.holder.replaceChildren();
    this.plot = new uPlot(this.build(others), data, this.holder);
  }

  build(others) {
    const { log, smoothing } = this.options.settings;
    const series = [{ label: "step" }];
    const bands = [];
    for (const [, label, index] of this.lines) {
      const stroke = color(`--series-${index}`);
      series.push({ label, stroke, width: 1.6, value: (_, value) => number(value), spanGaps: false, points: { size: 5 } });
      if (!smoothing) {
        const at = series.length;
        const edge = { stroke: "transparent", width: 0, points: { show: false }, legend: { show: false }, class: "edge" };
        series.push({ ...edge, label: `${label} (least)` }, { ...edge, label: `${label} (largest)` });
        bands.push({ series: [at + 1, at], fill: `${stroke}33` });
      }
    }
    others.forEach((other, position) => {
      for (const [, label] of this.lines) {
        const stroke = color(`--series-${2 + (position % 4)}`);
        series.push({ label: `${other.job}: ${label}`, stroke, width: 1.4, dash: [6, 4], value: (_, value) => number(value) });
      }
    });
    const axis = { stroke: color("--muted"), grid: { stroke: color("--line"), width: 1 }, ticks: { stroke: color("--line"), width: 1 }, font: "12px system-ui" };
    return {
      width: this.holder.clientWidth || 400,
      height: this.height(),
      scales: { x: { time: false }, y: { distr: log && !this.options.linear ? 3 : 1 } },
      cursor: { sync: { key: SYNC }, drag: { x: true, y: false } },
      legend: { live: true },
      axes: [axis, { ...axis, size: 62, values: (_, ticks) => ticks.map((tick) => (tick === null ? "" : number(tick, 3))) }],
      series,
      bands,
      hooks: {
        setSelect: [(plot) => {
          if (plot.select.width < 4) return;
          const first = Math.floor(plot.posToVal(plot.select.left, "x"));
          const last = Math.ceil(plot.posToVal(plot.select.left + plot.select.width, "x"));
          plot.setSelect({ left: 0, width: 0, top: 0, height: 0 }, false);
          this.onZoom(Math.max(0, first), last);
        }],
        ready: [(plot) => {
          plot.root.querySelectorAll(".u-series").forEach((entry) => {
            if (/\((least|largest)\)$/.test(entry.querySelector(".u-label").textContent)) entry.style.display = "none";
          });
        }],
      },
    };
  }

  destroy() {
    this.observer.disconnect();
    if (this.plot) this.plot.destroy();
  }
}
