"use strict";
// Block-wise quantisation to sixteen levels, as quant/blockwise.py does it, on weights drawn from a density.
const nf4 = (() => {
  const COUNT = 16384, EVERY = 1024, SEED = 1;

  /** A generator of numbers in [0, 1) (mulberry32). */
  function generator(seed) {
    let state = seed | 0;
    return () => {
      state = (state + 0x6d2b79f5) | 0;
      let t = Math.imul(state ^ (state >>> 15), 1 | state);
      t = (t + Math.imul(t ^ (t >>> 7), 61 | t)) ^ t;
      return ((t ^ (t >>> 14)) >>> 0) / 2 ** 32;
    };
  }

  /** Weights in float32 whose density is linear between heights at evenly spaced places of [-1, 1]. */
  function sample(heights, outlier) {
    const random = generator(SEED), pieces = heights.length - 1, width = 2 / pieces;
    const mass = heights.slice(1).map((h, i) => (h + heights[i]) / 2 || 1e-9);
    const total = mass.reduce((sum, x) => sum + x, 0);
    const values = Float32Array.from({ length: COUNT }, () => {
      let left = random() * total, piece = 0;
      while (piece < pieces - 1 && left > mass[piece]) left -= mass[piece++];
      const a = heights[piece], slope = heights[piece + 1] - a, share = Math.min(1, left / mass[piece]) * (a + heights[piece + 1]) / 2;
      // the place t in the piece where a t + slope t^2 / 2 = share
      const t = Math.abs(slope) < 1e-12 ? share / (a || 1) : (Math.sqrt(Math.max(0, a * a + 2 * slope * share)) - a) / slope;
      return -1 + width * (piece + Math.min(1, Math.max(0, t)));
    });
    if (outlier) {
      const largest = values.reduce((most, x) => Math.max(most, Math.abs(x)), 0);
      for (let i = EVERY / 2; i < COUNT; i += EVERY) values[i] = outlier * largest;
    }
    return values;
  }

  /** The place of the nearest level in the book's order; a tie goes to the lower one. */
  function nearest(book, scaled) {
    const x = book.signed ? Math.abs(scaled) : scaled;
    let rank = 0;
    while (rank < book.midpoints.length && book.midpoints[rank] < x) rank++;
    return rank;
  }

  /** Quantise blocks; returns each weight's code and value, the shares of the levels, and the relative error. */
  function quantise(values, book, block) {
    const codes = new Uint8Array(values.length), decoded = new Float32Array(values.length), absmax = [];
    let noise = 0, signal = 0;
    for (let start = 0; start < values.length; start += block) {
      const part = values.subarray(start, start + block);
      const largest = part.reduce((most, x) => Math.max(most, Math.abs(x)), 0);
      absmax.push(largest);
      part.forEach((w, i) => {
        const scaled = Math.fround(w / (largest || 1)), rank = nearest(book, scaled), negative = book.signed && scaled < 0;
        const level = Math.fround(negative ? -book.levels[rank] : book.levels[rank]);
        codes[start + i] = book.codes[rank] + (negative ? 8 : 0);
        decoded[start + i] = Math.fround(level * largest);
        noise += (decoded[start + i] - w) ** 2;
        signal += w * w;
      });
    }
    const shares = new Array(16).fill(0);
    for (const code of codes) shares[code] += 1 / codes.length;
    return { codes, decoded, absmax, shares, error: Math.sqrt(noise / signal) };
  }

  /** Bits a weight: four, and a scale's share in fp32, or in 8 bits with scales and a mean of their own. */
  function bits(count, block, nested) {
    const blocks = Math.ceil(count / block);
    return 4 + (nested ? 8 * blocks + 32 * (Math.ceil(blocks / 256) + 1) : 32 * blocks) / count;
  }

  return { COUNT, sample, quantise, bits };
})();

(() => {
  const PLACES = 17, TOP = 150, LEFT = 20, WIDE = 600, LEAST = 0.001;
  const STEPS = { ArrowUp: 0.05, ArrowRight: 0.05, ArrowDown: -0.05, ArrowLeft: -0.05, PageUp: 0.2, PageDown: -0.2 };
  const x = (i) => LEFT + (WIDE * i) / (PLACES - 1), y = (height) => TOP - 130 * height;
  const at = (i) => -1 + (2 * i) / (PLACES - 1);
  const SHAPES = {
    // four standard deviations: cut earlier, the largest weights of a block would be too common
    normal: (u) => Math.exp(-((u * 4) ** 2) / 2),
    laplace: (u) => Math.exp(-Math.abs(u) * 5),
    uniform: () => 0.7,
    humps: (u) => Math.exp(-(((Math.abs(u) - 0.55) * 6) ** 2) / 2),
  };
  const own = page.find("density");
  let heights = [];

  function preset(shape) {
    return Array.from({ length: PLACES }, (_, i) => Math.round(1000 * SHAPES[shape](at(i))) / 1000);
  }

  function move(i, height) {
    heights[i] = Math.round(1000 * Math.min(1, Math.max(0, height))) / 1000;
    // weights have to lie somewhere
    if (!heights.some((h) => h > 0)) heights[i] = LEAST;
    own.value = heights.join(" ");
    page.find("shape").value = "own";
    own.dispatchEvent(new Event("input"));
  }

  /** Handles are made once, so that the one being moved keeps the focus. */
  const svg = page.find("curve");
  page.draw(svg, "line", { x1: LEFT, x2: LEFT + WIDE, y1: TOP, y2: TOP, class: "axis" });
  const area = page.draw(svg, "polygon", { fill: "var(--sky)", opacity: 0.5 });
  const handles = Array.from({ length: PLACES }, (_, i) => {
    const handle = page.draw(svg, "circle", { cx: x(i), r: 8, fill: "var(--blue)", tabindex: 0, role: "slider", "aria-valuemin": 0, "aria-valuemax": 1, "aria-orientation": "vertical", "aria-label": `density at ${at(i).toFixed(2)}` });
    handle.addEventListener("keydown", (event) => {
      const to = { Home: 0, End: 1 }[event.key] ?? heights[i] + (STEPS[event.key] ?? NaN);
      if (Number.isNaN(to)) return;
      event.preventDefault();
      move(i, to);
    });
    // a finger needs more than the dot: its whole column drags it
    const column = page.draw(svg, "rect", { x: x(i) - WIDE / (PLACES - 1) / 2, y: 0, width: WIDE / (PLACES - 1), height: 170, fill: "transparent", class: "column", style: "cursor: ns-resize; touch-action: none" });
    const drag = (event) => {
      const box = svg.getBoundingClientRect();
      move(i, (TOP - ((event.clientY - box.top) * 170) / box.height) / 130);
    };
    column.addEventListener("pointerdown", (event) => { event.preventDefault(); column.setPointerCapture(event.pointerId); handle.focus(); drag(event); });
    column.addEventListener("pointermove", (event) => { if (column.hasPointerCapture(event.pointerId)) drag(event); });
    return handle;
  });

  function show(v) {
    const given = own.value.split(" ").map(Number);
    const sound = given.length === PLACES && given.every((h) => h >= 0 && h <= 1) && given.some((h) => h > 0);
    heights = v.shape === "own" && sound ? given : preset(v.shape === "own" ? "normal" : v.shape);
    area.setAttribute("points", [[LEFT, TOP], ...heights.map((h, i) => [x(i), y(h)]), [LEFT + WIDE, TOP]].map((p) => p.join()).join(" "));
    handles.forEach((handle, i) => {
      handle.setAttribute("cy", y(heights[i]));
      handle.setAttribute("aria-valuenow", heights[i]);
    });
    const block = 2 ** v.block, book = DATA.codebooks[v.book], values = nf4.sample(heights, v.outlier);
    const found = nf4.quantise(values, book, block);
    window.shown = { values: [...values], ...found };
    levels(book, found);
    first(values, found);
    const used = found.shares.filter((_, code) => !(book.signed && code === 8 && found.shares[8] === 0));
    const error = page.percent(found.error, 3), bits = nf4.bits(values.length, block, v.nested).toFixed(3);
    page.say({
      error,
      snr: `${(-20 * Math.log10(found.error)).toFixed(2)} dB`,
      bits,
      shares: `${page.percent(Math.min(...used), 1)}, ${page.percent(Math.max(...used), 1)}`,
    });
    return `Error ${error} at ${bits} bits a weight.`;
  }

  function levels(book, found) {
    const all = book.codes.flatMap((code, rank) => (book.signed ? [[code, book.levels[rank]], [code + 8, -book.levels[rank]]] : [[code, book.levels[rank]]]));
    const chart = page.find("buckets"), most = Math.max(...found.shares);
    chart.replaceChildren();
    page.draw(chart, "line", { x1: LEFT, x2: LEFT + WIDE, y1: 160, y2: 160, class: "axis" });
    for (const [code, level] of all) {
      const place = LEFT + (WIDE * (level + 1)) / 2, height = (140 * found.shares[code]) / most;
      const bar = page.draw(chart, "rect", { x: place - 7, y: 160 - height, width: 14, height, rx: 2, fill: level === 0 ? "var(--vermilion)" : "var(--blue)" });
      page.draw(bar, "title", {}, `level ${level.toFixed(4)}, code ${code}: ${page.percent(found.shares[code])}`);
      page.draw(chart, "line", { x1: place, x2: place, y1: 160, y2: 168, stroke: "var(--soft)" });
    }
    for (const tick of [-1, -0.5, 0, 0.5, 1]) page.draw(chart, "text", { x: LEFT + (WIDE * (tick + 1)) / 2, y: 186, "text-anchor": "middle", class: "soft" }, tick);
    page.draw(chart, "text", { x: 320, y: 205, "text-anchor": "middle", class: "soft" }, "level; the height is the share of the weights on it");
  }

  function first(values, found) {
    const rows = [["weight", values], ["code", found.codes], ["decoded", found.decoded]];
    page.find("first").replaceChildren(...rows.map(([name, list]) => {
      const line = document.createElement("tr");
      line.append(Object.assign(document.createElement("th"), { textContent: name }));
      for (const value of list.subarray(0, 16)) line.append(Object.assign(document.createElement("td"), { textContent: name === "code" ? value : value.toFixed(3) }));
      return line;
    }));
  }

  page.start(show, (v) => ({ block: 2 ** v.block }));
})();
