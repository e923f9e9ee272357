"use strict";
// The singular value decomposition M = U diag(s) V^T by one-sided Jacobi rotations, in double precision.
//
// Every pair of columns is rotated until it is orthogonal; M is then U diag(s), the rotations' product is V.
// Source: Hestenes 1958 (J. SIAM 6, 51-90); Demmel and Veselic 1992 (SIAM J. Matrix Anal. Appl. 13, 1204-1245).

// a matrix of 160 columns needs about ten sweeps; the limit stands for "never"
const SWEEPS = 60;

/**
 * Decompose a matrix.
 * @param {ArrayLike<number>} matrix rows x columns numbers, row by row
 * @param {number} rows
 * @param {number} columns
 * @returns {{s: Float64Array, u: Float64Array[], v: Float64Array[]}} k = min(rows, columns) singular values, falling,
 *     and as many left and right vectors; the left vector of a singular value of zero is zero
 */
function svd(matrix, rows, columns) {
  // the longer side runs along the vectors, so that there are as few of them as can be
  const tall = rows >= columns;
  const length = tall ? rows : columns;
  const count = tall ? columns : rows;
  const left = Array.from({ length: count }, (_, j) =>
    Float64Array.from({ length }, (_, i) => (tall ? matrix[i * columns + j] : matrix[j * columns + i])),
  );
  const right = Array.from({ length: count }, (_, j) => {
    const unit = new Float64Array(count);
    unit[j] = 1;
    return unit;
  });
  const whole = left.reduce((sum, column) => sum + dot(column, column), 0);
  // a column below this squared length is rounding noise of a matrix this large
  const noise = whole * (length * Number.EPSILON) ** 2;
  for (let sweep = 0, rotated = true; rotated && sweep < SWEEPS; sweep++) {
    rotated = false;
    for (let p = 0; p < count - 1; p++) {
      for (let q = p + 1; q < count; q++) {
        rotated = orthogonalise(left[p], left[q], right[p], right[q], noise) || rotated;
      }
    }
  }
  const lengths = left.map((column) => Math.sqrt(dot(column, column)));
  const order = lengths.map((_, j) => j).sort((a, b) => lengths[b] - lengths[a]);
  const s = Float64Array.from(order, (j) => lengths[j]);
  const units = order.map((j) => left[j].map((x) => (lengths[j] > 0 ? x / lengths[j] : 0)));
  const turned = order.map((j) => right[j]);
  return tall ? { s, u: units, v: turned } : { s, u: turned, v: units };
}

/** Rotate columns a and b, and the columns c and d of V with them, so that a and b become orthogonal. */
function orthogonalise(a, b, c, d, noise) {
  const aa = dot(a, a);
  const bb = dot(b, b);
  const ab = dot(a, b);
  if (aa <= noise || bb <= noise || Math.abs(ab) <= a.length * Number.EPSILON * Math.sqrt(aa * bb)) {
    return false;
  }
  const zeta = (bb - aa) / (2 * ab);
  const tangent = (zeta < 0 ? -1 : 1) / (Math.abs(zeta) + Math.hypot(1, zeta));
  const cosine = 1 / Math.hypot(1, tangent);
  rotate(a, b, cosine, cosine * tangent);
  rotate(c, d, cosine, cosine * tangent);
  return true;
}

function rotate(a, b, cosine, sine) {
  for (let i = 0; i < a.length; i++) {
    const x = a[i];
    a[i] = cosine * x - sine * b[i];
    b[i] = sine * x + cosine * b[i];
  }
}

function dot(a, b) {
  let sum = 0;
  for (let i = 0; i < a.length; i++) sum += a[i] * b[i];
  return sum;
}

/** The sum of the first `rank` terms s_i u_i v_i^T, row by row: by Eckart and Young the nearest matrix of that rank. */
function truncate({ s, u, v }, rank) {
  const rows = u[0].length;
  const columns = v[0].length;
  const sum = new Float64Array(rows * columns);
  for (let k = 0; k < rank; k++) {
    for (let i = 0; i < rows; i++) {
      const factor = s[k] * u[k][i];
      for (let j = 0; j < columns; j++) sum[i * columns + j] += factor * v[k][j];
    }
  }
  return sum;
}
