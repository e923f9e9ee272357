"use strict";
// The LoRA page: counts of a layer, and a drawn adapter of 64 x 64 that adapter.js trains.
(() => {
  const SIDE = 64, SEED = 3;
  const PRESETS = { "64 64": "64 x 64", "4096 4096": "4096 x 4096" };
  for (const name of ["Llama-3-8B", "Llama-2-70B"]) {
    for (const layer of DATA.models.find((m) => m.name === name).linears) PRESETS[`${layer.rows} ${layer.columns}`] ??= `${name} ${layer.name}`;
  }
  PRESETS.own = "sizes of your own";
  for (const [value, text] of Object.entries(PRESETS)) page.find("preset").add(new Option(text, value));
  for (const id of ["rows", "columns"]) page.find(id).addEventListener("input", () => { page.find("preset").value = "own"; });
  page.find("preset").addEventListener("input", () => {
    const [rows, columns] = page.find("preset").value.split(" ");
    if (columns) { page.find("rows").value = rows; page.find("columns").value = columns; }
  });
  const largest = (matrix) => matrix.reduce((most, x) => Math.max(most, Math.abs(x)), 0) || 1;
  const shades = (id, matrix, rows, columns, scale) => page.paint(page.find(id), matrix.map((x) => x / scale), rows, columns, true);

  function show(v) {
    const rows = page.size("rows", 1e5), columns = page.size("columns", 1e5);
    const counted = count(rows.used, columns.used, v.rank);
    const s = v.rule === "r" ? v.alpha / v.rank : v.alpha / Math.sqrt(v.rank);
    // the largest singular value of A at the start, squared; s |B| |A| = 1 where the change is learnt
    const a2 = (1 + Math.sqrt(v.rank / SIDE)) ** 2 / 3;
    // half of 2 / sharpness, beyond which gradient descent diverges
    const rate = v.rate === "stable" ? 1 / (s * s * a2 + 1 / a2) : Number(v.rate);
    const found = fit({ rows: SIDE, columns: SIDE, rank: v.rank, needed: v.needed, seed: SEED }, s, rate, v.steps);
    const { adapter, errors } = found, product = update(adapter, s);
    const values = svd(product, SIDE, SIDE).s;
    window.shown = { product: [...product], values: [...values], target: [...adapter.target], a: [...adapter.a], b: [...adapter.b], scaling: s, errors };
    page.say({
      trained: page.whole(counted.adapter),
      dense: page.whole(counted.whole),
      ratio: `${counted.ratio >= 100 ? counted.ratio.toFixed(0) : counted.ratio.toFixed(2)}x`,
      scaling: s.toPrecision(4),
      error: page.percent(errors.at(-1)),
      least: page.percent(leastError(adapter.targetValues, v.rank)),
      used: rate.toPrecision(3),
      note: [
        rows.said, columns.said,
        counted.ratio <= 1 ? "At this rank the adapter has as many numbers as the weight itself, or more." : "",
        errors.length <= v.steps ? `The steps were too long: training diverged after ${errors.length - 1}.` : "",
      ].filter(Boolean).join(" "),
    });
    const scale = largest(adapter.target);
    shades("frozen", adapter.weight, SIDE, SIDE, largest(adapter.weight));
    page.find("b").style.width = page.percent(v.rank / SIDE);
    shades("b", adapter.b, SIDE, v.rank, largest(adapter.b));
    shades("a", adapter.a, v.rank, SIDE, largest(adapter.a));
    shades("product", product, SIDE, SIDE, scale);
    shades("wanted", adapter.target, SIDE, SIDE, scale);
    spectrum(values, adapter.targetValues, v.rank);
    return `${page.whole(counted.adapter)} numbers trained instead of ${page.whole(counted.whole)}; ${page.percent(errors.at(-1))} of the wanted change is missed.`;
  }

  function spectrum(values, wanted, rank) {
    const svg = page.find("spectrum"), most = Math.max(values[0], wanted[0], 1), shownCount = 40;
    svg.replaceChildren();
    const x = (i) => 30 + (580 * i) / shownCount, y = (value) => 180 - (160 * value) / most;
    page.draw(svg, "line", { x1: 30, x2: 610, y1: 180, y2: 180, class: "axis" });
    for (let i = 0; i < shownCount; i++) {
      page.draw(svg, "rect", { x: x(i) + 2, y: y(values[i]), width: 10, height: 180 - y(values[i]), fill: i < rank ? "var(--blue)" : "var(--grey)" });
      const goal = wanted[i] ?? 0;
      if (goal) page.draw(svg, "line", { x1: x(i), x2: x(i) + 14, y1: y(goal), y2: y(goal), stroke: "var(--vermilion)", "stroke-width": 2 });
    }
    page.draw(svg, "line", { x1: x(rank), x2: x(rank), y1: 10, y2: 185, stroke: "var(--soft)", "stroke-dasharray": "3 4" });
    page.draw(svg, "text", { x: Math.min(x(rank) + 5, 560), y: 20, class: "soft" }, `rank ${rank}`);
    page.draw(svg, "text", { x: 320, y: 210, "text-anchor": "middle", class: "soft" }, "singular values: bars of s B A, lines of the wanted change");
  }

  page.start(show);
})();
