//! `int4` and `int2`: a least element and a step for each group. The definition; see the [module documentation](super).

use kv_cache_actors::format::{GROUP, RowFormat};
use kv_cache_actors::geometry::Plane;

use super::rotated::{get, put};
use super::scalar::{finite, read, write};
use super::{ElementType, SCALE_FLOOR_F16, SCALE_FLOOR_F32};

/// The largest code.
pub(super) const fn most(bits: usize) -> f32 {
    if bits == 4 { 15.0 } else { 3.0 }
}

/// The least step, which keeps a constant group from dividing by zero.
pub(super) fn floor(element: ElementType) -> f32 {
    match element {
        ElementType::F16 => SCALE_FLOOR_F16.to_f32(),
        ElementType::Bf16 | ElementType::F32 => SCALE_FLOOR_F32,
    }
}

/// The elements of group `g` of rows that share their scales, as (row, column).
fn members(rows: RowFormat, g: usize) -> impl Iterator<Item = (usize, usize)> + Clone {
    let (rows, columns) = match rows.plane {
        Plane::Key => (0..GROUP, g..g + 1),
        Plane::Value => (0..1, g * GROUP..rows.dim.min((g + 1) * GROUP)),
    };
    rows.flat_map(move |row| columns.clone().map(move |column| (row, column)))
}

pub(super) fn encode(rows: RowFormat, src: &[u8], codes: &mut [u8], scales: &mut [u8]) -> bool {
    let (element, dim, bits) = (rows.element, rows.dim, rows.format.code_bits(rows.element));
    let (row_bytes, at_once) = (rows.row_bytes(), rows.scale_rows());
    let sets =
        src.chunks_exact(at_once * dim * element.bytes()).zip(codes.chunks_exact_mut(at_once * row_bytes));
    let mut all = true;
    for ((src, codes), scales) in sets.zip(scales.chunks_exact_mut(rows.scale_bytes())) {
        codes.fill(0);
        let (leasts, steps) = scales.split_at_mut(scales.len() / 2);
        let stored = leasts.chunks_exact_mut(element.bytes()).zip(steps.chunks_exact_mut(element.bytes()));
        for (g, (least, step)) in stored.enumerate() {
            let at = |(row, column)| read(element, src, row * dim + column);
            let values = members(rows, g).map(at);
            if !values.clone().all(f32::is_finite) {
                all = false;
                write(element, 0.0, least);
                write(element, floor(element), step);
                continue;
            }
            let (low, high) = values.fold((f32::MAX, f32::MIN), |(low, high), x| (low.min(x), high.max(x)));
            // One zero, whichever of the two the least element was.
            let low = low + 0.0;
            write(element, low, least);
            // Halves: what a group spans may be too much for a number.
            let half = |x: f32| 0.5f32.mul_add(x, -0.5 * low);
            write(element, (half(high) / (0.5 * most(bits))).max(floor(element)), step);
            let inverse = 1.0 / (0.5 * read(element, step, 0));
            for (row, column) in members(rows, g) {
                let code = (half(at((row, column))) * inverse).min(most(bits)).round_ties_even();
                put(&mut codes[row * row_bytes..], bits, column, code as u8);
            }
        }
    }
    all
}

pub(super) fn decode(
    rows: RowFormat,
    skip: usize,
    codes: &[u8],
    scales: &[u8],
    dst: &mut [u8],
    dst_stride: usize,
) {
    let (element, bits, groups) = (rows.element, rows.format.code_bits(rows.element), rows.groups());
    for (at, codes) in codes.chunks_exact(rows.row_bytes()).enumerate() {
        let scales = &scales[(skip + at) / rows.scale_rows() * rows.scale_bytes()..];
        let out = &mut dst[at * dst_stride..][..rows.dim * element.bytes()];
        for (i, out) in out.chunks_exact_mut(element.bytes()).enumerate() {
            let group = match rows.plane {
                Plane::Key => i,
                Plane::Value => i / GROUP,
            };
            let (least, step) = (read(element, scales, group), read(element, scales, groups + group));
            write(element, finite(element, f32::from(get(codes, bits, i)).mul_add(step, least)), out);
        }
    }
}

#[cfg(test)]
mod tests {
    use kv_cache_actors::format::Format;

    use super::*;

    fn rows(format: Format, plane: Plane, dim: usize) -> RowFormat {
        RowFormat { format, element: ElementType::F32, plane, dim }
    }

    /// Worked out by hand: groups of 32 neighbours, the last shorter.
    #[test]
    fn values_have_a_least_element_and_a_step_for_neighbours() {
        let rows = rows(Format::Int4, Plane::Value, 34);
        // From -8 to 7 in steps of one, twice; then 5 and 20.
        let row: Vec<f32> = (0..32).map(|i| (i % 16) as f32 - 8.0).chain([5.0, 20.0]).collect();
        let (mut codes, mut scales) = (vec![0xEE; 17], vec![0xEE; 16]);
        assert!(encode(rows, bytemuck::cast_slice(&row), &mut codes, &mut scales));
        let stored: Vec<f32> = scales.chunks_exact(4).map(bytemuck::pod_read_unaligned).collect();
        assert_eq!(stored, [-8.0, 5.0, 1.0, 1.0]);
        let pairs: Vec<u8> =
            (0..16).map(|i| (2 * i % 16) | (((2 * i + 1) % 16) << 4)).chain([0xF0]).collect();
        assert_eq!(codes, pairs);
        let mut back = vec![0.0f32; 34];
        decode(rows, 0, &codes, &scales, bytemuck::cast_slice_mut(&mut back), 136);
        assert_eq!(back, row);
    }

    /// A channel that is constant is exact, whatever the others do, and rows in the middle decode by themselves.
    #[test]
    fn keys_have_them_for_a_channel_of_32_tokens() {
        let rows = rows(Format::Int2, Plane::Key, 3);
        let key = |token: usize| [1000.0, (token % 4) as f32, -(token as f32)];
        let all: Vec<f32> = (0..64).flat_map(key).collect();
        let (mut codes, mut scales) = (vec![0; 64], vec![0; 2 * 24]);
        assert!(encode(rows, bytemuck::cast_slice(&all), &mut codes, &mut scales));
        let stored: Vec<f32> = scales.chunks_exact(4).map(bytemuck::pod_read_unaligned).collect();
        assert_eq!(stored[..3], [1000.0, 0.0, -31.0]);
        assert_eq!(stored[4..6], [1.0, 31.0 / 3.0]);
        assert_eq!(stored[6..9], [1000.0, 0.0, -63.0]);
        let mut back = vec![0.0f32; 40 * 3];
        // Tokens 20 to 59: 12 of the first group and 28 of the second.
        decode(rows, 20, &codes[20..60], &scales, bytemuck::cast_slice_mut(&mut back), 12);
        for (token, back) in (20..60).zip(back.chunks_exact(3)) {
            assert_eq!(back[..2], key(token)[..2]);
            assert!((back[2] - key(token)[2]).abs() <= 31.0 / 6.0 + 1e-4, "{token}: {back:?}");
        }
    }

    #[test]
    fn the_least_zero_has_no_sign() {
        for row in [[-0.0f32, 0.0], [0.0, -0.0]] {
            let rows = rows(Format::Int4, Plane::Value, 2);
            let (mut codes, mut scales) = ([0xEE; 1], [0xEE; 8]);
            assert!(encode(rows, bytemuck::cast_slice(&row), &mut codes, &mut scales));
            assert_eq!((codes, &scales[..4]), ([0], &[0; 4][..]));
        }
    }
}
