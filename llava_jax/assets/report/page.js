"use strict";
// Charts of the report: lines in SVG, drawn again whenever a control, the zoom or the width changes.
(() => {
  const { runs, charts } = JSON.parse(document.getElementById("data").textContent);
  const NS = "http://www.w3.org/2000/svg", DASHES = ["", "7 4", "2 3", "9 3 2 3", "14 4"];
  const $ = id => document.getElementById(id), hidden = new Set();
  let zoom = null; // [from, to] along x, in all charts

  const make = (name, attributes = {}, parent = null, text = null) => {
    const node = document.createElementNS(NS, name);
    for (const [key, value] of Object.entries(attributes)) node.setAttribute(key, value);
    if (text !== null) node.textContent = text;
    if (parent) parent.append(node);
    return node;
  };
  const element = (name, className, parent, text = "") => {
    const node = document.createElement(name);
    if (className) node.className = className;
    node.textContent = text;
    parent.append(node);
    return node;
  };

  // 12,345 and 0.0123 and 2.1e-5: four digits that matter.
  const number = v => {
    const size = Math.abs(v);
    if (v === 0) return "0";
    if (size >= 1e5 && size < 1e15) return new Intl.NumberFormat("en", { notation: "compact", maximumSignificantDigits: 4 }).format(v);
    if (size >= 1000) return Math.round(v).toLocaleString("en");
    return size < 1e-3 || size >= 1e15 ? v.toExponential(2).replace("e+", "e").replace(/\.?0+e/, "e") : String(+v.toPrecision(4));
  };
  const ticks = (low, high, count) => {
    const raw = (high - low) / count, power = 10 ** Math.floor(Math.log10(raw));
    const step = power * [1, 2, 5, 10].find(m => m * power >= raw), found = [];
    for (let v = Math.ceil(low / step - 1e-9) * step; v <= high + step * 1e-9; v += step) found.push(+v.toPrecision(12));
    return found;
  };
  const logTicks = (low, high) => {
    const found = [];
    for (let p = Math.floor(Math.log10(low)); p <= Math.ceil(Math.log10(high)); p++)
      for (const m of high / low < 50 ? [1, 2, 3, 5, 7] : [1]) found.push(m * 10 ** p);
    const inside = found.filter(v => v >= low * .999 && v <= high * 1.001);
    return inside.length > 1 ? inside : ticks(low, high, 4);
  };
  // The mean around each value; at the beginning, where a loss falls fast, of as many before as after it.
  const smooth = (y, reach) => {
    const total = [0];
    for (const v of y) total.push(total[total.length - 1] + v);
    return y.map((_, i) => {
      const r = Math.min(reach, i), end = Math.min(i + r + 1, y.length);
      return (total[end] - total[i - r]) / (end - i + r);
    });
  };

  // All but the rarest hundredth on either side, so that a spike does not flatten a curve.
  const middle = values => {
    const sorted = [...values].sort((a, b) => a - b), cut = Math.floor(sorted.length / 100);
    return sorted.length ? [sorted[cut], sorted[sorted.length - 1 - cut]] : [];
  };

  const linesOf = chart => {
    const found = [];
    runs.forEach((run, r) => {
      if (hidden.has(r)) return;
      chart.keys.forEach((key, k) => {
        const series = run.series[key];
        if (!series) return;
        const x = $("over").value === "hours" ? series.h : series.x;
        const points = x.map((v, i) => [v, series.y[i]]).filter(p => p[1] !== null && p[0] !== null);
        if (!points.length) return;
        const words = [runs.length > 1 ? run.name : "", chart.keys.length > 1 ? chart.names[k] : ""].filter(Boolean).join(", ");
        const reach = chart.smooth ? Math.round(points.length * $("smooth").value / 400) : 0;
        found.push({ x: points.map(p => p[0]), raw: points.map(p => p[1]), y: smooth(points.map(p => p[1]), reach),
          reach, words, dots: chart.dots, color: runs.length > 1 ? run.color : PALETTE[k % PALETTE.length],
          dash: runs.length > 1 ? DASHES[k % DASHES.length] : "" });
      });
    });
    return found;
  };
  const PALETTE = ["#2f6fde", "#d9542b", "#2b9a66", "#9a4fd0", "#c08a00", "#0b98a8", "#d03f7f", "#7a7a80"];

  const draw = (card, chart) => {
    const lines = linesOf(chart), svg = card.querySelector("svg.plot"), key = card.querySelector(".key");
    const width = Math.max(card.clientWidth - 30, 120), height = chart.big ? 300 : 190;
    const left = 52, right = 20, top = 8, bottom = 22;
    svg.setAttribute("viewBox", `0 0 ${width} ${height}`);
    svg.setAttribute("height", height);
    svg.replaceChildren();
    key.replaceChildren();
    if (lines.length > 1 || lines.some(l => l.words)) for (const line of lines) {
      const entry = element("span", "", key), mark = make("svg", { viewBox: "0 0 22 8" }, entry);
      make("line", { x1: 0, x2: 22, y1: 4, y2: 4, stroke: line.color, "stroke-width": 2.5, "stroke-dasharray": line.dash }, mark);
      entry.append(line.words || chart.title);
    }
    const inside = v => !zoom || (v >= zoom[0] && v <= zoom[1]);
    const xs = lines.flatMap(l => l.x), shownY = lines.flatMap(l => [...l.y.filter((_, i) => inside(l.x[i])), ...middle(l.raw.filter((_, i) => inside(l.x[i])))]);
    if (!shownY.length) { make("text", { x: left, y: 40 }, svg, "nothing here"); return; }
    let [x0, x1] = zoom || [xs.reduce((a, b) => Math.min(a, b)), xs.reduce((a, b) => Math.max(a, b))];
    if (x0 === x1) [x0, x1] = [x0 - 1, x1 + 1];
    const positive = shownY.filter(v => v > 0), log = $("log").checked && positive.length > 0;
    let low = (log ? positive : shownY).reduce((a, b) => Math.min(a, b)), high = shownY.reduce((a, b) => Math.max(a, b));
    if (!log && chart.zero) low = Math.min(low, 0);
    if (low === high) [low, high] = log ? [low / 2, high * 2] : [low - (Math.abs(low) || 1) / 10, high + (Math.abs(high) || 1) / 10];
    const pad = log ? 1.04 : (high - low) * .05;
    if (log) { low /= pad; high *= pad; } else { if (!(chart.zero && low === 0)) low -= pad; high += pad; }
    const f = log ? Math.log : v => v;
    const X = v => left + (v - x0) / (x1 - x0) * (width - left - right);
    const Y = v => top + (1 - (f(v) - f(low)) / (f(high) - f(low))) * (height - top - bottom);
    for (const v of log ? logTicks(low, high) : ticks(low, high, height / 45)) {
      make("line", { class: "grid", x1: left, x2: width - right, y1: Y(v), y2: Y(v) }, svg);
      make("text", { x: left - 7, y: Y(v) + 4, "text-anchor": "end" }, svg, number(v));
    }
    for (const v of ticks(x0, x1, width / 95))
      make("text", { x: X(v), y: height - 5, "text-anchor": "middle" }, svg, number(v));
    const clip = `clip${chart.id}`, area = make("clipPath", { id: clip }, svg);
    make("rect", { x: left - 1, y: top - 4, width: width - left - right + 5, height: height - bottom - top + 8 }, area);
    const group = make("g", { "clip-path": `url(#${clip})`, fill: "none" }, svg);
    const path = (x, y) => {
      let d = "", pen = "M";
      for (let i = 0; i < x.length; i++) {
        if (log && y[i] <= 0) { pen = "M"; continue; }
        d += `${pen}${X(x[i]).toFixed(1)} ${Y(y[i]).toFixed(1)}`;
        pen = "L";
      }
      return d;
    };
    for (const line of lines) {
      if (line.reach) make("path", { d: path(line.x, line.raw), stroke: line.color, "stroke-opacity": .25, "stroke-width": 1 }, group);
      make("path", { d: path(line.x, line.y), stroke: line.color, "stroke-width": 1.8, "stroke-linejoin": "round", "stroke-dasharray": line.dash }, group);
      if (line.dots || line.x.length === 1) line.x.forEach((v, i) => inside(v) && (!log || line.y[i] > 0) &&
        make("circle", { cx: X(v), cy: Y(line.y[i]), r: 2.6, fill: line.color }, group));
    }
    pointer(card, svg, lines, { X, x0, x1, left, right, width, height, bottom, top });
  };

  // What is under the pointer, and zooming by dragging.
  const pointer = (card, svg, lines, at) => {
    const value = e => {
      const box = svg.getBoundingClientRect(), x = (e.clientX - box.left) * at.width / box.width;
      return at.x0 + Math.min(Math.max((x - at.left) / (at.width - at.left - at.right), 0), 1) * (at.x1 - at.x0);
    };
    let from = null;
    const clear = () => { card.querySelectorAll(".tip, .at, .band").forEach(n => n.remove()); };
    svg.onpointerdown = e => { if (e.button === 0 && e.pointerType !== "touch") { from = value(e); svg.setPointerCapture(e.pointerId); } };
    svg.onpointermove = e => {
      clear();
      const here = value(e);
      if (from !== null) {
        const [a, b] = [at.X(Math.min(from, here)), at.X(Math.max(from, here))];
        make("rect", { class: "band", x: a, y: at.top, width: b - a, height: at.height - at.top - at.bottom }, svg);
        return;
      }
      const near = lines.map(l => l.x.reduce((best, v, i) => Math.abs(v - here) < Math.abs(l.x[best] - here) ? i : best, 0));
      if (!lines.length) return;
      const x = lines[0].x[near[0]];
      make("line", { class: "at", x1: at.X(x), x2: at.X(x), y1: at.top, y2: at.height - at.bottom }, svg);
      const tip = element("div", "tip", card);
      element("div", "soft", tip, ($("over").value === "hours" ? "hour " : "step ") + number(x));
      lines.forEach((l, i) => {
        const row = element("div", "", tip), dot = element("i", "dot", row);
        dot.style.background = l.color;
        row.append(l.words ? `${l.words} ` : "");
        element("b", "", row, number(l.raw[near[i]]));
      });
      const box = card.getBoundingClientRect(), side = e.clientX - box.left;
      tip.style.top = "44px";
      tip.style.left = side > box.width / 2 ? "" : `${side + 14}px`;
      tip.style.right = side > box.width / 2 ? `${box.width - side + 14}px` : "";
    };
    svg.onpointerup = e => {
      const to = value(e);
      if (from !== null && Math.abs(to - from) > (at.x1 - at.x0) / 60) { zoom = [Math.min(from, to), Math.max(from, to)]; all(); }
      from = null;
    };
    svg.onpointerleave = () => { if (from === null) clear(); };
    svg.ondblclick = () => { zoom = null; all(); };
  };

  const cards = charts.map(chart => {
    const card = element("section", chart.big ? "chart big" : "chart", $("charts"));
    element("h3", "", card, chart.title);
    element("div", "key", card);
    make("svg", { class: "plot", role: "img", "aria-label": chart.title }, card);
    return [card, chart];
  });
  const all = () => cards.forEach(([card, chart]) => draw(card, chart));
  if (runs.length > 1) runs.forEach((run, r) => {
    const button = element("button", "", $("legend"));
    button.type = "button";
    button.setAttribute("aria-pressed", "true");
    element("i", "dot", button).style.background = run.color;
    button.append(run.name);
    button.onclick = () => {
      hidden.has(r) ? hidden.delete(r) : hidden.add(r);
      button.setAttribute("aria-pressed", String(!hidden.has(r)));
      all();
    };
  });
  $("smooth").oninput = $("log").onchange = all;
  $("over").onchange = () => { zoom = null; all(); };
  document.querySelector(".tools").onsubmit = () => false;
  let width = 0;
  const fit = () => { if ($("charts").clientWidth !== width) { width = $("charts").clientWidth; all(); } };
  addEventListener("resize", () => requestAnimationFrame(fit));
  fit();
  addEventListener("beforeprint", all);
})();
