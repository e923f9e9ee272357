"use strict";
// A picture, its singular values, and what a rank keeps: lora_core/reference/picture.py and low_rank.py.
const lowRank = (() => {
  const SIZE = 64, LARGEST = 160;

  /** The cross, the ring and the gradients, greys rounded to float32 as the library's are. */
  function picture(size) {
    const grey = new Float64Array(size * size);
    for (let i = 0; i < size; i++) {
      for (let j = 0; j < size; j++) {
        const u = (i + 0.5) / size, v = (j + 0.5) / size;
        let value = 0.1 + 0.4 * v + 0.2 * u;
        const radius = Math.sqrt((u - 0.5) * (u - 0.5) + (v - 0.5) * (v - 0.5));
        if (Math.abs(radius - 0.33) < 0.04) value = 0.9;
        if (Math.abs(u - 0.5) < 0.035 || Math.abs(v - 0.5) < 0.035) value = 1;
        grey[i * size + j] = Math.fround(value);
      }
    }
    return { grey, rows: size, columns: size };
  }

  /** Greys of 0 to 1 of an image, scaled to LARGEST pixels a side at most. */
  function greyOf(image) {
    const scale = Math.min(1, LARGEST / Math.max(image.width, image.height));
    const columns = Math.max(1, Math.round(image.width * scale)), rows = Math.max(1, Math.round(image.height * scale));
    const canvas = Object.assign(document.createElement("canvas"), { width: columns, height: rows });
    const context = canvas.getContext("2d", { willReadFrequently: true });
    context.fillStyle = "white";
    context.fillRect(0, 0, columns, rows);
    context.drawImage(image, 0, 0, columns, rows);
    const { data } = context.getImageData(0, 0, columns, rows);
    // luma of ITU-R BT.709
    const grey = Float64Array.from({ length: rows * columns }, (_, i) => (0.2126 * data[4 * i] + 0.7152 * data[4 * i + 1] + 0.0722 * data[4 * i + 2]) / 255);
    return { grey, rows, columns };
  }

  /** What a rank keeps: numbers stored, share of the energy, relative error, peak signal to noise in dB. */
  function kept(s, rank, rows, columns) {
    const squares = (from, to) => s.slice(from, to).reduce((sum, x) => sum + x * x, 0);
    const all = squares(0), rest = squares(rank);
    return {
      stored: rank * (rows + columns + 1),
      energy: all ? squares(0, rank) / all : 1,
      error: all ? Math.sqrt(rest / all) : 0,
      psnr: rest ? 10 * Math.log10((rows * columns) / rest) : Infinity,
    };
  }

  return { SIZE, picture, greyOf, kept };
})();

(() => {
  const MOST_BYTES = 40e6;
  let now = null;

  function take(image) {
    now = { ...image, parts: svd(image.grey, image.rows, image.columns) };
    const rank = page.find("rank");
    rank.max = Math.min(image.rows, image.columns);
    if (Number(rank.value) > Number(rank.max)) rank.value = rank.max;
    page.paint(page.find("original"), image.grey, image.rows, image.columns);
  }

  function show(v) {
    const { grey, rows, columns, parts } = now, rank = Math.min(v.rank, parts.s.length);
    const rebuilt = truncate(parts, rank), found = lowRank.kept(parts.s, rank, rows, columns);
    page.paint(page.find("rebuilt"), rebuilt, rows, columns);
    page.paint(page.find("missed"), rebuilt.map((x, i) => 2 * (x - grey[i])), rows, columns, true);
    window.shown = { s: [...parts.s], rows, columns };
    page.say({
      stored: page.whole(found.stored),
      whole: page.whole(rows * columns),
      energy: page.percent(found.energy, 3),
      error: page.percent(found.error, 3),
      psnr: Number.isFinite(found.psnr) && found.psnr < 200 ? `${found.psnr.toFixed(2)} dB` : "exact",
    });
    spectrum(parts.s, rank, rows, columns);
    return `Rank ${rank}: ${page.whole(found.stored)} numbers, ${page.percent(found.error, 3)} missed.`;
  }

  function spectrum(s, rank, rows, columns) {
    const svg = page.find("spectrum"), floor = -6;
    svg.replaceChildren();
    const x = (i) => 40 + (570 * i) / s.length, y = (value) => 20 + (170 * Math.max(floor, Math.log10(value / (s[0] || 1)))) / floor;
    page.draw(svg, "line", { x1: 40, x2: 610, y1: 190, y2: 190, class: "axis" });
    s.forEach((value, i) => page.draw(svg, "circle", { cx: x(i + 0.5), cy: y(value), r: 3, fill: i < rank ? "var(--blue)" : "var(--grey)" }));
    const held = Array.from({ length: s.length + 1 }, (_, i) => `${x(i)},${190 - 170 * lowRank.kept(s, i, rows, columns).energy}`);
    page.draw(svg, "polyline", { points: held.join(" "), fill: "none", stroke: "var(--vermilion)", "stroke-width": 2 });
    page.draw(svg, "line", { x1: x(rank), x2: x(rank), y1: 15, y2: 190, stroke: "var(--soft)", "stroke-dasharray": "3 4" });
    for (const share of [0, 0.25, 0.5, 0.75, 1]) page.draw(svg, "text", { x: x(share * s.length), y: 208, "text-anchor": "middle", class: "soft" }, Math.round(share * s.length));
    page.draw(svg, "text", { x: 320, y: 230, "text-anchor": "middle", class: "soft" }, "rank; dots: singular values, six powers of ten; line: energy from 0 to 1");
  }

  async function open(file) {
    const message = page.find("message");
    message.textContent = "";
    if (!file) return;
    if (!file.type.startsWith("image/")) {
      message.textContent = `${file.name} is no image: choose a PNG, JPEG or WebP. The last picture stays.`;
    } else if (file.size > MOST_BYTES) {
      message.textContent = `${file.name} has ${page.whole(file.size / 1e6)} MB: at most ${MOST_BYTES / 1e6} can be opened. The last picture stays.`;
    } else {
      try {
        take(lowRank.greyOf(await createImageBitmap(file)));
        refresh();
      } catch {
        message.textContent = `${file.name} cannot be read as an image: is it whole? The last picture stays.`;
      }
    }
  }

  take(lowRank.picture(lowRank.SIZE));
  const refresh = page.start(show, (v) => ({ rank: `${v.rank} of ${now.parts.s.length}` }));
  page.find("file").addEventListener("change", (event) => open(event.target.files[0]));
  page.find("again").addEventListener("click", () => { page.find("file").value = ""; page.find("message").textContent = ""; take(lowRank.picture(lowRank.SIZE)); refresh(); });
  for (const name of ["dragover", "drop"]) addEventListener(name, (event) => event.preventDefault());
  addEventListener("drop", (event) => open(event.dataTransfer.files[0]));
})();
