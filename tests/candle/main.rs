//! Tensors of candle to and from the cache, on the CPU device; with the feature `candle-cuda` and a GPU also there.

#[cfg(feature = "candle-cuda")]
mod gpu;

use candle_core::{DType, Device, Tensor};
use kv_cache::half::{bf16, f16};
use kv_cache::{
    BatchCacheOperations, Cache, Devices, Element, ElementType, Error, Format, Geometry, OpenOptions,
    Outcome, Plane, Sequence,
};

const LAYERS: usize = 3;
const HEADS: usize = 2;
const DIM: usize = 8;

async fn cache(element: ElementType, format: Format, devices: Devices) -> Cache {
    Cache::builder(Geometry::new(LAYERS as u32, HEADS as u32, DIM as u32, element).block_tokens(32))
        .devices(devices)
        .memory_bytes_per_device(4 << 20)
        .sealed_format(format)
        .build()
        .await
        .expect("a small cache")
}

async fn open(cache: &Cache) -> Sequence {
    cache.open("tenant", OpenOptions::default()).await.expect("room")
}

fn tokens(count: usize) -> Vec<u32> {
    (0..count as u32).collect()
}

/// `[layers, tokens, heads, dim]`, exact in every element type.
fn whole(count: usize, first: f32, dtype: DType, device: &Device) -> Tensor {
    let elements = LAYERS * count * HEADS * DIM;
    let values = (0..elements).map(|at| first + (at % 199) as f32).collect::<Vec<_>>();
    let tensor = Tensor::from_vec(values, (LAYERS, count, HEADS, DIM), &Device::Cpu).unwrap();
    tensor.to_dtype(dtype).unwrap().to_device(device).unwrap()
}

fn numbers(tensor: &Tensor) -> Vec<f32> {
    tensor.to_dtype(DType::F32).unwrap().flatten_all().unwrap().to_vec1().unwrap()
}

async fn check_layers(sequence: &Sequence, keys: &Tensor, values: &Tensor, device: &Device) {
    let count = keys.dim(1).unwrap() as u32;
    for layer in 0..LAYERS {
        let (k, v) = sequence.read_tensors(layer as u32, 0..count, device).await.unwrap();
        assert_eq!(k.dims(), [count as usize, HEADS, DIM]);
        assert_eq!(k.dtype(), keys.dtype());
        assert_eq!(numbers(&k), numbers(&keys.get(layer).unwrap()), "keys of layer {layer}");
        assert_eq!(numbers(&v), numbers(&values.get(layer).unwrap()), "values of layer {layer}");
    }
}

#[tokio::test]
async fn what_is_appended_is_read_in_every_element_type() {
    for (element, dtype) in
        [(ElementType::F16, DType::F16), (ElementType::Bf16, DType::BF16), (ElementType::F32, DType::F32)]
    {
        let cache = cache(element, Format::Raw, Devices::cpu(1)).await;
        let sequence = open(&cache).await;
        let (keys, values) = (whole(40, 0., dtype, &Device::Cpu), whole(40, 7., dtype, &Device::Cpu));
        assert_eq!(sequence.append_tensors(&tokens(40), &keys, &values).await, Ok(40));
        check_layers(&sequence, &keys, &values, &Device::Cpu).await;
    }
}

#[tokio::test]
async fn slices_and_transposed_tensors_are_taken_as_they_are_seen() {
    let cache = cache(ElementType::F32, Format::Raw, Devices::cpu(1)).await;
    let sequence = open(&cache).await;
    let wide = whole(12, 3., DType::F32, &Device::Cpu);
    // As attention has it, and back: not contiguous.
    let turned = wide.transpose(1, 2).unwrap().contiguous().unwrap().transpose(1, 2).unwrap();
    let (keys, values) = (turned.narrow(1, 2, 5).unwrap(), wide.narrow(1, 6, 5).unwrap());
    assert!(!keys.is_contiguous());
    assert_eq!(sequence.append_tensors(&tokens(5), &keys, &values).await, Ok(5));
    check_layers(&sequence, &keys, &values, &Device::Cpu).await;
}

#[tokio::test]
async fn a_step_is_one_operation_of_rows_and_layers_can_be_staged() {
    let cache = cache(ElementType::F16, Format::Int8, Devices::cpu(1)).await;
    let (a, b) = (open(&cache).await, open(&cache).await);
    let (keys, values) = (whole(2, 0., DType::F16, &Device::Cpu), whole(2, 9., DType::F16, &Device::Cpu));
    let batch = BatchCacheOperations::new().append_each_tensors(&[&a, &b], &[5, 6], &keys, &values);
    let results = cache.submit(batch).await.unwrap();
    assert!(results.iter().all(|result| matches!(result, Ok(Outcome::Appended { committed: 1 }))));
    for (row, sequence) in [&a, &b].into_iter().enumerate() {
        let (k, v) = (keys.narrow(1, row, 1).unwrap(), values.narrow(1, row, 1).unwrap());
        check_layers(sequence, &k, &v, &Device::Cpu).await;
    }
    for layer in 0..LAYERS {
        let of_layer = |tensor: &Tensor| tensor.get(layer).unwrap();
        let batch = BatchCacheOperations::new().stage_each_tensors(
            &[&a, &b],
            layer as u32,
            &of_layer(&keys),
            &of_layer(&values),
        );
        let results = cache.submit(batch).await.unwrap();
        assert!(results.iter().all(|result| matches!(result, Ok(Outcome::Staged { staged: 2 }))));
    }
    assert_eq!(a.commit(&[8]).await, Ok(2));
    let (k, v) = (keys.get(0).unwrap(), values.get(0).unwrap());
    assert_eq!(b.stage_tensors(0, &k, &v).await, Ok(4));
}

#[tokio::test]
async fn what_does_not_fit_is_an_error_that_tells_both_shapes_and_changes_nothing() {
    let cache = cache(ElementType::F16, Format::Raw, Devices::cpu(1)).await;
    let sequence = open(&cache).await;
    let good = whole(4, 0., DType::F16, &Device::Cpu);
    // [layers, heads, tokens, dim]: as many bytes, another meaning.
    let turned = good.transpose(1, 2).unwrap();
    let error = sequence.append_tensors(&tokens(4), &good, &turned).await.unwrap_err();
    let (given, expected) = ([LAYERS, HEADS, 4, DIM], [LAYERS, 4, HEADS, DIM]);
    assert_eq!(
        error,
        Error::Dimensions { plane: Plane::Value, given: given.into(), expected: expected.into() }
    );
    assert!(error.to_string().contains("[3, 2, 4, 8]"), "{error}");
    let flat = good.flatten_all().unwrap();
    let error = sequence.append_tensors(&tokens(4), &flat, &good).await.unwrap_err();
    assert!(matches!(error, Error::Dimensions { plane: Plane::Key, .. }), "{error}");

    let single = good.to_dtype(DType::F32).unwrap();
    let error = sequence.append_tensors(&tokens(4), &single, &single).await.unwrap_err();
    assert_eq!(error, Error::ElementType { given: ElementType::F32, expected: ElementType::F16 });
    let double = good.to_dtype(DType::F64).unwrap();
    let error = sequence.append_tensors(&tokens(4), &double, &double).await.unwrap_err();
    assert!(matches!(error, Error::Unsupported { .. }), "{error}");

    let not_finite = (&good * f64::INFINITY).unwrap();
    assert_eq!(sequence.append_tensors(&tokens(4), &not_finite, &good).await, Err(Error::NotFinite));
    // A row each of a step that does not fit.
    let batch =
        BatchCacheOperations::new().append_each_tensors(&[&sequence, &sequence], &[1, 2], &good, &good);
    let results = cache.submit(batch).await.unwrap();
    assert_eq!(results.len(), 2);
    assert!(results.iter().all(|result| matches!(result, Err(Error::Dimensions { .. }))));
    let beyond = sequence.read_tensors(0, 0..1, &Device::Cpu).await;
    assert!(matches!(beyond, Err(Error::TokenRange { .. })), "{beyond:?}");
    assert_eq!(sequence.len(), 0);
}

fn column<T: candle_core::WithDType>(tensor: &Tensor) -> Vec<T> {
    tensor.flatten_all().unwrap().to_vec1().unwrap()
}

#[tokio::test]
async fn tables_and_slot_mappings_name_the_rows_of_the_blocks() {
    let cache = cache(ElementType::F16, Format::Int8, Devices::cpu(1)).await;
    let (long, short, none) = (open(&cache).await, open(&cache).await, open(&cache).await);
    let append = async |sequence: &Sequence, count| {
        let tensor = whole(count, 0., DType::F16, &Device::Cpu);
        sequence.append_tensors(&tokens(count), &tensor, &tensor).await.unwrap();
    };
    append(&long, 70).await;
    append(&short, 3).await;
    while long.info().sealed_blocks < 2 {
        tokio::task::yield_now().await;
    }
    let tables = cache.table_tensors(&[&long, &short, &none], 1, &Device::Cpu).unwrap();
    assert_eq!(tables.keys.dims(), [3, 3]);
    assert_eq!(column::<u32>(&tables.lengths), [70, 3, 0]);
    assert_eq!(column::<u32>(&tables.dropped), [0; 6]);
    assert_eq!(column::<u8>(&tables.formats), [1, 1, 0, 0, 0, 0, 0, 0, 0]);
    let keys = column::<i64>(&tables.keys);
    let host = |row: usize| tables.host.sequences[row].blocks.iter().map(|block| block.address as i64);
    assert_eq!(keys[..3], host(0).collect::<Vec<_>>());
    assert_eq!(keys[3..], [host(1).next().unwrap(), 0, 0, 0, 0, 0]);
    let scales = column::<i64>(&tables.scales);
    assert!(scales[..2].iter().zip(&keys).all(|(scale, key)| scale > key));
    assert!(scales[2..].iter().all(|scale| *scale == 0));

    let slots = column::<i64>(&tables.slot_mapping);
    assert_eq!(slots.len(), 73);
    // Codes of 8 bytes a row in sealed blocks, 16 bytes of f16 in the open one.
    assert_eq!(slots[33], keys[1] + DIM as i64);
    assert_eq!(slots[69], keys[2] + 5 * 2 * DIM as i64);
    assert_eq!(slots[70..], [keys[3], keys[3] + 16, keys[3] + 32]);

    let nothing = cache.table_tensors(&[], 1, &Device::Cpu).unwrap();
    assert_eq!(nothing.slot_mapping.elem_count(), 0);
    assert!(matches!(cache.table_tensors(&[&long], 9, &Device::Cpu), Err(Error::Layer { .. })));
}

#[test]
fn element_types_are_those_of_half() {
    // candle and the cache must agree on one crate for 16-bit floats, or slices could not pass between them.
    fn same<T: Element + candle_core::WithDType>() -> DType {
        T::DTYPE
    }
    assert_eq!([same::<f16>(), same::<bf16>(), same::<f32>()], [DType::F16, DType::BF16, DType::F32]);
}
