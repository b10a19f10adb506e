//! The same with tensors in a GPU's memory. Needs candle built with CUDA (`candle-cuda`) and, to do anything, a GPU.

use candle_core::{DType, Device, Tensor};
use kv_cache::{
    BatchCacheOperations, BlockEntry, Cache, Devices, ElementType, Error, Format, Outcome, Sequence,
};

use super::{LAYERS, check_layers, column, numbers, open, tokens, whole};

async fn cache(element: ElementType, format: Format) -> Cache {
    super::cache(element, format, Devices::Auto).await
}

/// candle's two kinds of devices: a stream per thread, and a stream of the device's own.
fn devices() -> Vec<(&'static str, Device)> {
    match Devices::gpus_found() {
        Ok(gpus) if gpus > 0 => vec![
            ("a stream per thread", Device::new_cuda(0).unwrap()),
            ("a stream of its own", Device::new_cuda_with_stream(0).unwrap()),
        ],
        found => {
            println!("skipped: no GPU here ({found:?})");
            Vec::new()
        }
    }
}

/// `tensor` by way of work that keeps the stream busy for a while after the calls have returned.
fn late(tensor: &Tensor) -> Tensor {
    let square = Tensor::ones((2048, 2048), DType::F32, tensor.device()).unwrap();
    let mut work = square.clone();
    for _ in 0..20 {
        work = (work.matmul(&square).unwrap() * (1. / 2048.)).unwrap();
    }
    let one = work.narrow(0, 0, 1).unwrap().narrow(1, 0, 1).unwrap().reshape(()).unwrap();
    tensor.to_dtype(DType::F32).unwrap().broadcast_mul(&one).unwrap().to_dtype(tensor.dtype()).unwrap()
}

#[tokio::test]
async fn tensors_that_are_still_computed_are_appended_where_they_lie() {
    for (kind, device) in devices() {
        for (element, dtype) in
            [(ElementType::F16, DType::F16), (ElementType::Bf16, DType::BF16), (ElementType::F32, DType::F32)]
        {
            println!("{kind}, {dtype:?}");
            let cache = cache(element, Format::Raw).await;
            let sequence = open(&cache).await;
            let (keys, values) = (whole(40, 0., dtype, &device), whole(40, 7., dtype, &device));
            assert_eq!(sequence.append_tensors(&tokens(40), &late(&keys), &late(&values)).await, Ok(40));
            check_layers(&sequence, &keys, &values, &device).await;
            check_layers(&sequence, &keys, &values, &Device::Cpu).await;
            // A slice that attention has turned around.
            let turned = keys.transpose(1, 2).unwrap().contiguous().unwrap().transpose(1, 2).unwrap();
            let (more, rest) = (turned.narrow(1, 30, 3).unwrap(), values.narrow(1, 5, 3).unwrap());
            assert_eq!(sequence.append_tensors(&tokens(3), &more, &rest).await, Ok(43));
            let (k, _) = sequence.read_tensors(2, 40..43, &device).await.unwrap();
            assert_eq!(numbers(&k), numbers(&more.get(2).unwrap()));
        }
    }
}

#[tokio::test]
async fn a_step_is_enqueued_and_its_tensors_dropped_before_it_is_done() {
    for (kind, device) in devices() {
        println!("{kind}");
        let cache = cache(ElementType::F16, Format::Int8).await;
        let mut sequences = Vec::new();
        for _ in 0..16 {
            sequences.push(open(&cache).await);
        }
        let all = sequences.iter().collect::<Vec<_>>();
        let mut steps = Vec::new();
        for step in 0..100u32 {
            let keys = late(&whole(16, step as f32, DType::F16, &device));
            let values = (&keys + 1.).unwrap();
            let batch = BatchCacheOperations::new().append_each_tensors(&all, &[step; 16], &keys, &values);
            let enqueued = cache.enqueue(batch).await.unwrap();
            enqueued.before_tensors_of(&device).unwrap();
            steps.push(enqueued);
            // Whatever takes their place must not be what was stored.
            drop((keys, values));
            let _ = Tensor::full(f32::NAN, (LAYERS * 16 * 16,), &device).unwrap();
        }
        for step in steps {
            let results = step.done().await.unwrap();
            assert!(
                results.iter().all(|result| matches!(result, Ok(Outcome::Appended { .. }))),
                "{results:?}"
            );
        }
        // The open block is exact.
        for (row, sequence) in sequences.iter().enumerate() {
            let (k, v) = sequence.read_tensors(1, 96..100, &device).await.unwrap();
            for step in 96..100usize {
                let keys = whole(16, step as f32, DType::F16, &Device::Cpu);
                let expected = numbers(&keys.get(1).unwrap().get(row).unwrap());
                assert_eq!(numbers(&k.get(step - 96).unwrap()), expected, "step {step}");
                let plus_one = expected.iter().map(|key| key + 1.).collect::<Vec<_>>();
                assert_eq!(numbers(&v.get(step - 96).unwrap()), plus_one, "step {step}");
            }
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn many_threads_append_and_read_their_own() {
    for (kind, device) in devices() {
        println!("{kind}");
        let cache = cache(ElementType::F32, Format::Raw).await;
        let tasks = (0..16).map(|task| {
            let (cache, device) = (cache.clone(), device.clone());
            tokio::spawn(async move {
                let sequence: Sequence = open(&cache).await;
                for round in 0..40u32 {
                    // Computed and given away without an await in between, so by one thread.
                    let append = {
                        let first = (task * 100 + round) as f32;
                        let keys = whole(2, first, DType::F32, &device);
                        let batch = BatchCacheOperations::new().append_tensors(
                            &sequence,
                            &[round, task],
                            &keys,
                            &keys,
                        );
                        drop(keys);
                        cache.submit(batch)
                    };
                    let results = append.await.unwrap();
                    assert!(matches!(results[..], [Ok(Outcome::Appended { .. })]), "{results:?}");
                    let (read, _) =
                        sequence.read_tensors(2, 2 * round..2 * round + 2, &device).await.unwrap();
                    let expected = whole(2, (task * 100 + round) as f32, DType::F32, &Device::Cpu);
                    assert_eq!(numbers(&read), numbers(&expected.get(2).unwrap()), "{task} {round}");
                }
            })
        });
        for task in tasks.collect::<Vec<_>>() {
            task.await.unwrap();
        }
        assert_eq!(cache.stats().jobs_in_flight, 0);
    }
}

#[tokio::test]
async fn what_cannot_be_on_this_gpu_is_refused_and_reads_find_their_way() {
    for (kind, device) in devices() {
        println!("{kind}");
        let on_host = super::cache(ElementType::F32, Format::Raw, Devices::cpu(1)).await;
        let sequence = open(&on_host).await;
        let (there, here) = (whole(3, 0., DType::F32, &device), whole(3, 0., DType::F32, &Device::Cpu));
        let refused = sequence.append_tensors(&tokens(3), &there, &there).await;
        assert!(matches!(refused, Err(Error::Unsupported { .. })), "{refused:?}");
        let mixed = sequence.append_tensors(&tokens(3), &there, &here).await;
        assert!(matches!(mixed, Err(Error::Unsupported { .. })), "{mixed:?}");
        assert_eq!(sequence.append_tensors(&tokens(3), &here, &here).await, Ok(3));
        check_layers(&sequence, &here, &here, &device).await;

        let cache = cache(ElementType::F32, Format::Raw).await;
        let sequence = open(&cache).await;
        assert_eq!(sequence.append_tensors(&tokens(3), &here, &here).await, Ok(3));
        check_layers(&sequence, &here, &here, &device).await;
        let not_finite = (&there / 0.).unwrap();
        let refused = sequence.append_tensors(&tokens(3), &not_finite, &there).await;
        assert_eq!(refused, Err(Error::NotFinite));
        let beyond = sequence.read_tensors(0, 0..u32::MAX, &device).await;
        assert!(beyond.is_err(), "{beyond:?}");
        assert_eq!(sequence.len(), 3);
    }
}

#[tokio::test]
async fn tables_hold_device_addresses() {
    for (kind, device) in devices() {
        println!("{kind}");
        let cache = cache(ElementType::F16, Format::Raw).await;
        let sequence = open(&cache).await;
        let keys = whole(40, 0., DType::F16, &device);
        sequence.append_tensors(&tokens(40), &keys, &keys).await.unwrap();
        let tables = cache.table_tensors(&[&sequence], 1, &device).unwrap();
        let on_device = cache.device_block_table(&[&sequence], 1).unwrap();
        let address = |block: &BlockEntry| block.address as i64;
        let expected = on_device.host().sequences[0].blocks.iter().map(address).collect::<Vec<_>>();
        assert_eq!(column::<i64>(&tables.keys), expected);
        assert_eq!(column::<i64>(&tables.slot_mapping)[39], expected[1] + 7 * 16);
    }
}
