//! Bytes that were made elsewhere: `tests/data/known_answers.py` has the formats from their written definition in f64, and no code of these.

use std::collections::BTreeMap;

use kv_cache_actors::format::{Format, RowFormat};
use kv_cache_actors::geometry::Plane;

use super::{ElementType, Kernels};

/// A line of the file.
struct Known {
    of: RowFormat,
    kind: &'static str,
    elements: Vec<u8>,
    codes: Vec<u8>,
    scales: Vec<u8>,
    /// None where f64 cannot tell the last bit of an f32.
    decoded: Option<Vec<u8>>,
}

fn bytes(hex: &str) -> Vec<u8> {
    let digits = hex.as_bytes().chunks_exact(2).map(|pair| std::str::from_utf8(pair).unwrap());
    digits.map(|pair| u8::from_str_radix(pair, 16).unwrap()).collect()
}

fn all() -> impl Iterator<Item = Known> {
    let lines = include_str!("../../../../tests/data/known_answers.txt").lines();
    lines.filter(|line| !line.starts_with('#')).map(|line| {
        let columns: Vec<&str> = line.split(' ').collect();
        let &[format, plane, element, dim, kind, elements, codes, scales, decoded] = &columns[..] else {
            panic!("{line}");
        };
        let of = RowFormat {
            format: format.parse().unwrap(),
            plane: if plane == "key" { Plane::Key } else { Plane::Value },
            element: match element {
                "f16" => ElementType::F16,
                "bf16" => ElementType::Bf16,
                _ => ElementType::F32,
            },
            dim: dim.parse().unwrap(),
        };
        let [elements, codes, scales] = [elements, codes, scales].map(bytes);
        Known { of, kind, elements, codes, scales, decoded: (decoded != "-").then(|| bytes(decoded)) }
    })
}

#[test]
fn every_set_gives_the_known_answers() {
    let mut told: BTreeMap<(String, &str, &str), usize> = BTreeMap::new();
    for Known { of, kind, elements, codes, scales, decoded } in all() {
        let row_bytes = of.dim * of.element.bytes();
        for kernels in Kernels::candidates() {
            let what = format!("{}: {of:?}, {kind}", kernels.name());
            let (mut got_codes, mut got_scales) = (vec![0xEE; codes.len()], vec![0xEE; scales.len()]);
            assert!(kernels.encode(of, &elements, &mut got_codes, &mut got_scales), "{what}");
            assert_eq!((&got_codes, &got_scales), (&codes, &scales), "{what}");
            if let Some(decoded) = &decoded {
                let mut got = vec![0xEE; elements.len()];
                kernels.decode(of, 0, &codes, &scales, &mut got, row_bytes);
                assert_eq!(&got, decoded, "{what}");
            }
        }
        let plane = if of.plane == Plane::Key { "key" } else { "value" };
        let element = if of.element == ElementType::F32 { "f32" } else { "16 bits" };
        *told.entry((of.format.to_string(), plane, element)).or_default() += 1;
    }
    let formats = Format::ALL.into_iter().filter(|format| *format != Format::Raw);
    for (format, element) in formats.flat_map(|format| [(format, "f32"), (format, "16 bits")]) {
        for plane in if format.is_grouped() { &["key", "value"][..] } else { &["value"] } {
            let count = told.get(&(format.to_string(), plane, element)).copied().unwrap_or_default();
            assert!(count >= 7, "{count} answers for {format}, {plane}, {element}");
        }
    }
}
