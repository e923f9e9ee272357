"use strict";
// A LoRA adapter B A beside a frozen weight, fitted to a known low-rank update by gradient descent.
//
//     loss = |s B A - T|^2 / 2,     R = s B A - T,     dB = s R A^T,     dA = s B^T R
//
// A starts uniform in +-1/sqrt(d_in) and B at zero (Hu et al. 2021, arXiv 2106.09685, section 4.1). Every number comes
// from one seeded generator, so that equal settings give equal pictures.

// the update's k-th singular value is DECAY^k: a task that needs some directions more than others
const DECAY = 0.8;
// above this relative error the steps are too long, and the numbers would only grow
const DIVERGED = 100;

/** Return a generator of numbers in [0, 1), each a multiple of 2^-32 (mulberry32). */
function generator(seed) {
  let state = seed | 0;
  return () => {
    state = (state + 0x6d2b79f5) | 0;
    let t = Math.imul(state ^ (state >>> 15), 1 | state);
    t = (t + Math.imul(t ^ (t >>> 7), 61 | t)) ^ t;
    return ((t ^ (t >>> 14)) >>> 0) / 2 ** 32;
  };
}

/** `count` numbers, uniform in (-bound, bound). */
function uniform(count, bound, random) {
  return Float64Array.from({ length: count }, () => (2 * random() - 1) * bound);
}

/** `count` orthonormal vectors of this length: Gram and Schmidt's process, twice, on uniform ones. */
function orthonormal(length, count, random) {
  const found = [];
  for (let k = 0; k < count; k++) {
    const vector = uniform(length, 1, random);
    for (let pass = 0; pass < 2; pass++) {
      for (const other of found) {
        const along = dot(vector, other);
        for (let i = 0; i < length; i++) vector[i] -= along * other[i];
      }
    }
    const norm = Math.sqrt(dot(vector, vector));
    found.push(vector.map((x) => x / norm));
  }
  return found;
}

/** What the adapter starts from and is to learn: W0, A, B = 0 and the target T of rank `needed`. */
function start({ rows, columns, rank, needed, seed }) {
  const random = generator(seed);
  const bound = 1 / Math.sqrt(columns);
  const weight = uniform(rows * columns, bound, random);
  const s = Float64Array.from({ length: needed }, (_, k) => DECAY ** k);
  const target = truncate({ s, u: orthonormal(rows, needed, random), v: orthonormal(columns, needed, random) }, needed);
  const a = uniform(rank * columns, bound, random);
  return { rows, columns, rank, weight, target, targetValues: s, a, b: new Float64Array(rows * rank) };
}

/** s B A, row by row. */
function update({ rows, columns, rank, a, b }, scaling) {
  const product = new Float64Array(rows * columns);
  for (let i = 0; i < rows; i++) {
    for (let k = 0; k < rank; k++) addRow(product, i, a, k, scaling * b[i * rank + k], columns);
  }
  return product;
}

/** One step of gradient descent on A and B, in place. */
function step(adapter, scaling, rate) {
  const { rows, columns, rank, target, a, b } = adapter;
  const residual = update(adapter, scaling).map((x, i) => x - target[i]);
  const newA = Float64Array.from(a);
  const newB = Float64Array.from(b);
  for (let i = 0; i < rows; i++) {
    const row = residual.subarray(i * columns, (i + 1) * columns);
    for (let k = 0; k < rank; k++) {
      newB[i * rank + k] -= rate * scaling * dot(row, a.subarray(k * columns, (k + 1) * columns));
      addRow(newA, k, residual, i, -rate * scaling * b[i * rank + k], columns);
    }
  }
  adapter.a = newA;
  adapter.b = newB;
}

/** |s B A - T| / |T|, Frobenius norms. */
function relativeError(adapter, scaling) {
  const difference = update(adapter, scaling).map((x, i) => x - adapter.target[i]);
  return Math.sqrt(dot(difference, difference) / dot(adapter.target, adapter.target));
}

/**
 * Fit an adapter.
 * @returns {{adapter: object, errors: number[]}} the adapter, and the relative error before the first step and after
 *     each; there are fewer than steps + 1 where it diverged
 */
function fit(settings, scaling, rate, steps) {
  const adapter = start(settings);
  const errors = [relativeError(adapter, scaling)];
  while (errors.length <= steps && errors.at(-1) < DIVERGED) {
    step(adapter, scaling, rate);
    errors.push(relativeError(adapter, scaling));
  }
  return { adapter, errors };
}

/** The least relative error that any matrix of this rank can have, by Eckart and Young. */
function leastError(values, rank) {
  const energy = (from) => values.reduce((sum, s, k) => sum + (k >= from ? s * s : 0), 0);
  return Math.sqrt(energy(rank) / energy(0));
}

/** What a rank-r adapter trains, what the whole weight would, and how many times fewer. */
function count(rows, columns, rank) {
  const adapter = rank * (rows + columns);
  return { adapter, whole: rows * columns, ratio: (rows * columns) / adapter };
}

/** Add factor times row `from` of one matrix to row `to` of another. */
function addRow(into, to, matrix, from, factor, columns) {
  for (let j = 0; j < columns; j++) into[to * columns + j] += factor * matrix[from * columns + j];
}
