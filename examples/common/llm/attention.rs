//! Attention of a few new tokens over stored rows, whatever they are stored as.
//!
//! The scores of all tokens are computed first; then the maximum, the sum and the weighted values are taken in the order of the
//! tokens. So the result depends on the rows alone, not on how they are cut into runs: a chunk computes what its tokens compute one
//! by one, and rows in the cache's blocks give what the same rows in a vector give, to the last bit.

use half::slice::HalfFloatSliceExt;
use half::{bf16, f16};
use kv_cache::Scales;

/// Rows of one head of some consecutive tokens: `[tokens, dim]`.
#[derive(Debug, Clone)]
pub enum Rows<'a> {
    /// As they are computed.
    F32(&'a [f32]),
    /// Rounded.
    F16(&'a [f16]),
    /// Rounded.
    Bf16(&'a [bf16]),
    /// Codes, and a scale for each token.
    Int8(&'a [i8], Scales<'a>),
    /// Of a format that is decoded before.
    Decoded(Vec<f32>),
}

/// Keys and values of one head of some consecutive tokens.
#[derive(Debug, Clone)]
pub struct Run<'a> {
    pub tokens: usize,
    pub keys: Rows<'a>,
    pub values: Rows<'a>,
}

/// The shape of the new tokens' queries of one KV head.
#[derive(Debug, Clone, Copy)]
pub struct Shape {
    pub tokens: usize,
    /// Query heads that share the KV head.
    pub group: usize,
    pub dim: usize,
}

/// Causal attention of `queries`, `[tokens, group, dim]`, which belong to the last tokens of `runs`. Writes `[tokens, group, dim]`.
pub fn attend(runs: &[Run<'_>], queries: &[f32], shape: Shape, out: &mut [f32]) {
    // Compiled for several instruction sets, of which this picks the machine's.
    pulp::Arch::new().dispatch(|| attend_plain(runs, queries, shape, out));
}

#[inline(always)]
fn attend_plain(runs: &[Run<'_>], queries: &[f32], shape: Shape, out: &mut [f32]) {
    let Shape { tokens, group, dim } = shape;
    let all = runs.iter().map(|run| run.tokens).sum::<usize>();
    let before = all - tokens;
    let longest = runs.iter().map(|run| run.tokens).max().unwrap_or_default();
    let mut scores = vec![0.0; tokens * group * all];
    let mut rows = vec![0.0; longest * dim];
    let scale = 1.0 / (dim as f32).sqrt();

    let mut first = 0;
    for run in runs {
        let keys = loaded(&run.keys, dim, &mut rows);
        for (at, query) in queries.chunks_exact(dim).enumerate() {
            let seen = (before + at / group + 1).saturating_sub(first).min(run.tokens);
            let scores = &mut scores[at * all + first..][..seen];
            for (score, key) in scores.iter_mut().zip(keys.chunks_exact(dim)) {
                *score = dot(query, key) * scale;
            }
        }
        first += run.tokens;
    }

    for (at, scores) in scores.chunks_exact_mut(all).enumerate() {
        softmax(&mut scores[..before + at / group + 1]);
    }

    out.fill(0.0);
    let mut first = 0;
    for run in runs {
        let values = loaded(&run.values, dim, &mut rows);
        for (at, out) in out.chunks_exact_mut(dim).enumerate() {
            let seen = (before + at / group + 1).saturating_sub(first).min(run.tokens);
            let weights = &scores[at * all + first..][..seen];
            for (weight, value) in weights.iter().zip(values.chunks_exact(dim)) {
                out.iter_mut().zip(value).for_each(|(out, value)| *out += weight * value);
            }
        }
        first += run.tokens;
    }
}

/// The rows as f32: in place, or in `buffer`.
#[inline(always)]
fn loaded<'a>(rows: &'a Rows<'_>, dim: usize, buffer: &'a mut [f32]) -> &'a [f32] {
    match rows {
        Rows::F32(rows) => rows,
        Rows::Decoded(rows) => rows,
        Rows::F16(rows) => {
            rows.convert_to_f32_slice(&mut buffer[..rows.len()]);
            buffer
        }
        Rows::Bf16(rows) => {
            rows.convert_to_f32_slice(&mut buffer[..rows.len()]);
            buffer
        }
        Rows::Int8(codes, scales) => {
            for (token, (row, codes)) in buffer.chunks_exact_mut(dim).zip(codes.chunks_exact(dim)).enumerate()
            {
                let scale = match scales {
                    Scales::F16(scales) => scales[token].to_f32(),
                    Scales::Bf16(scales) => scales[token].to_f32(),
                    Scales::F32(scales) => scales[token],
                };
                row.iter_mut().zip(codes).for_each(|(x, code)| *x = f32::from(*code) * scale);
            }
            buffer
        }
    }
}

#[inline(always)]
fn dot(a: &[f32], b: &[f32]) -> f32 {
    const LANES: usize = 16;
    let mut sums = [0.0f32; LANES];
    let (a, b) = (a.chunks_exact(LANES), b.chunks_exact(LANES));
    let rest = a.remainder().iter().zip(b.remainder()).map(|(a, b)| a * b).sum::<f32>();
    for (a, b) in a.zip(b) {
        for lane in 0..LANES {
            sums[lane] += a[lane] * b[lane];
        }
    }
    let mut width = LANES / 2;
    while width > 0 {
        for lane in 0..width {
            sums[lane] += sums[lane + width];
        }
        width /= 2;
    }
    sums[0] + rest
}

#[inline(always)]
fn softmax(scores: &mut [f32]) {
    let most = scores.iter().fold(f32::NEG_INFINITY, |most, score| most.max(*score));
    let mut sum = 0.0;
    for score in scores.iter_mut() {
        *score = (*score - most).exp();
        sum += *score;
    }
    let share = 1.0 / sum;
    scores.iter_mut().for_each(|score| *score *= share);
}

#[cfg(test)]
mod tests {
    use super::*;

    fn noise(count: usize, seed: u64) -> Vec<f32> {
        let mut state = seed | 1;
        let mut next = || {
            state = state.wrapping_mul(0x5851_F42D_4C95_7F2D).wrapping_add(0x1405_7B7E_F767_814F);
            (state >> 40) as f32 / (1 << 23) as f32 - 1.0
        };
        (0..count).map(|_| next()).collect()
    }

    /// Plain softmax attention in f64.
    fn reference(keys: &[f32], values: &[f32], queries: &[f32], shape: Shape) -> Vec<f64> {
        let Shape { tokens, group, dim } = shape;
        let before = keys.len() / dim - tokens;
        let of_query = |at: usize| {
            let query = &queries[at * dim..][..dim];
            let seen = before + at / group + 1;
            let dot = |token: usize| {
                let key = &keys[token * dim..][..dim];
                query.iter().zip(key).map(|(q, k)| f64::from(*q) * f64::from(*k)).sum::<f64>()
            };
            let weights = (0..seen).map(|token| (dot(token) / (dim as f64).sqrt()).exp()).collect::<Vec<_>>();
            let sum = weights.iter().sum::<f64>();
            (0..dim)
                .map(|d| (0..seen).map(|t| weights[t] / sum * f64::from(values[t * dim + d])).sum::<f64>())
                .collect::<Vec<_>>()
        };
        (0..tokens * group).flat_map(of_query).collect()
    }

    fn runs<'a>(keys: &'a [f32], values: &'a [f32], dim: usize, cuts: &[usize]) -> Vec<Run<'a>> {
        let run = |cut: &[usize]| Run {
            tokens: cut[1] - cut[0],
            keys: Rows::F32(&keys[cut[0] * dim..cut[1] * dim]),
            values: Rows::F32(&values[cut[0] * dim..cut[1] * dim]),
        };
        cuts.windows(2).map(run).collect()
    }

    #[test]
    fn agrees_with_plain_attention_and_does_not_depend_on_the_cuts() {
        for (tokens, dim, all) in [(1, 64, 1), (1, 64, 100), (5, 20, 71), (32, 64, 96)] {
            let shape = Shape { tokens, group: 3, dim };
            let (keys, values) = (noise(all * dim, 1), noise(all * dim, 2));
            let queries = noise(tokens * 3 * dim, 3);
            let attend = |cuts: &[usize]| {
                let mut out = vec![f32::NAN; tokens * 3 * dim];
                super::attend(&runs(&keys, &values, dim, cuts), &queries, shape, &mut out);
                out
            };
            let whole = attend(&[0, all]);
            for (got, expected) in whole.iter().zip(reference(&keys, &values, &queries, shape)) {
                assert!((f64::from(*got) - expected).abs() < 1e-5, "{got} {expected}");
            }
            if all > 70 {
                assert_eq!(attend(&[0, 32, 64, all]), whole);
                assert_eq!(attend(&[0, 1, 7, 7, 70, all]), whole);
            }
        }
    }

    #[test]
    fn a_chunk_is_its_tokens_one_by_one() {
        let (dim, all, tokens) = (64, 50, 18);
        let (keys, values) = (noise(all * dim, 4), noise(all * dim, 5));
        let queries = noise(tokens * 3 * dim, 6);
        let mut together = vec![0.0; queries.len()];
        let shape = Shape { tokens, group: 3, dim };
        attend(&runs(&keys, &values, dim, &[0, 32, all]), &queries, shape, &mut together);
        for token in 0..tokens {
            let seen = all - tokens + token + 1;
            let of_token = token * 3 * dim..(token + 1) * 3 * dim;
            let mut alone = vec![0.0; 3 * dim];
            let shape = Shape { tokens: 1, ..shape };
            attend(&runs(&keys, &values, dim, &[0, seen]), &queries[of_token.clone()], shape, &mut alone);
            assert_eq!(alone, together[of_token], "token {token}");
        }
    }

    #[test]
    fn rounded_and_coded_rows_are_what_they_decode_to() {
        let (dim, all) = (64, 40);
        let (keys, values) = (noise(all * dim, 7), noise(all * dim, 8));
        let queries = noise(3 * dim, 9);
        let shape = Shape { tokens: 1, group: 3, dim };
        let attend = |keys: Rows<'_>, values: Rows<'_>| {
            let mut out = vec![0.0; 3 * dim];
            super::attend(&[Run { tokens: all, keys, values }], &queries, shape, &mut out);
            out
        };
        let half = |rows: &[f32]| rows.iter().map(|x| f16::from_f32(*x)).collect::<Vec<_>>();
        let single = |rows: &[f16]| rows.iter().map(|x| x.to_f32()).collect::<Vec<_>>();
        let (hk, hv) = (half(&keys), half(&values));
        let expected = attend(Rows::F32(&single(&hk)), Rows::F32(&single(&hv)));
        assert_eq!(attend(Rows::F16(&hk), Rows::F16(&hv)), expected);
        assert_eq!(attend(Rows::Decoded(single(&hk)), Rows::Decoded(single(&hv))), expected);

        let codes = (0..all * dim).map(|at| (at % 251) as i8).collect::<Vec<_>>();
        let scales = (0..all).map(|at| f16::from_f32(0.001 + at as f32 / 1000.0)).collect::<Vec<_>>();
        let decoded = codes.iter().enumerate().map(|(at, code)| f32::from(*code) * scales[at / dim].to_f32());
        let decoded = decoded.collect::<Vec<_>>();
        let coded = || Rows::Int8(&codes, Scales::F16(&scales));
        assert_eq!(attend(coded(), coded()), attend(Rows::F32(&decoded), Rows::F32(&decoded)));
    }
}
