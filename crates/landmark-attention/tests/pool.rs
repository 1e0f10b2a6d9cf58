//! Attention to blocks in the frames of a pool is, bit for bit, attention to the same blocks in a ring: on the CPU, and in a build for GPUs on a machine
//! that has one on the GPU.

#[path = "support/numbers.rs"]
mod numbers;

use candle_core::{DType, Device, Tensor};
use landmark_attention::retrieval::{Blocks, Kept, Pool, SlotQueries, attend};
use numbers::Numbers;

impl Numbers {
    fn tensor(&mut self, shape: &[usize], dtype: DType, device: &Device) -> Tensor {
        let numbers: Vec<f32> =
            (0..shape.iter().product()).map(|_| (self.next() >> 40) as f32 / (1 << 23) as f32 - 1.).collect();
        Tensor::from_vec(numbers, shape, &Device::Cpu).unwrap().to_dtype(dtype).unwrap().to_device(device).unwrap()
    }
}

fn f64s(x: &Tensor) -> Vec<u64> {
    let x = x.to_device(&Device::Cpu).unwrap().to_dtype(DType::F64).unwrap().flatten_all().unwrap();
    x.to_vec1::<f64>().unwrap().into_iter().map(f64::to_bits).collect()
}

/// A tensor's elements as they are in memory.
fn bytes(x: &Tensor) -> Vec<u8> {
    let x = x.to_device(&Device::Cpu).unwrap().flatten_all().unwrap();
    match x.dtype() {
        DType::F64 => x.to_vec1::<f64>().unwrap().into_iter().flat_map(f64::to_ne_bytes).collect(),
        DType::F32 => x.to_vec1::<f32>().unwrap().into_iter().flat_map(f32::to_ne_bytes).collect(),
        DType::BF16 => x.to_vec1::<half::bf16>().unwrap().into_iter().flat_map(half::bf16::to_ne_bytes).collect(),
        _ => x.to_vec1::<half::f16>().unwrap().into_iter().flat_map(half::f16::to_ne_bytes).collect(),
    }
}

fn runs() -> Vec<(Device, Vec<DType>)> {
    let cpu = (Device::Cpu, vec![DType::F32, DType::F64]);
    let gpu = if cfg!(feature = "cuda") { Device::new_cuda(0).ok() } else { None };
    if cfg!(feature = "cuda") && gpu.is_none() {
        eprintln!("skipped: no GPU here");
    }
    [cpu].into_iter().chain(gpu.map(|gpu| (gpu, vec![DType::F32, DType::BF16, DType::F16]))).collect()
}

#[test]
fn a_pool_reads_as_a_ring() {
    for (device, dtypes) in runs() {
        let mut numbers = Numbers(21);
        for case in 0..60 {
            let dtype = dtypes[case % dtypes.len()];
            let (batch, kv_heads, group, time) =
                (numbers.of(&[1, 2]), numbers.of(&[1, 2, 3]), numbers.of(&[1, 2, 3]), numbers.of(&[1, 2, 5, 20]));
            let (block, d, k) =
                (numbers.of(&[2, 5, 8, 51, 65, 100]), numbers.of(&[8, 16, 33, 64, 128]), numbers.of(&[1, 2, 4, 9]));
            let (heads, len) = (kv_heads * group, k + numbers.below(12));
            let (capacity, newest) = (len + numbers.below(4), numbers.of(&[0, k]));
            let mut tensor = |dims: &[usize]| numbers.tensor(dims, dtype, &device);
            let queries = tensor(&[k + 1, batch, heads, time, d]);
            let keys = tensor(&[batch, kv_heads, capacity, block, d]);
            let values = tensor(&[batch, kv_heads, capacity, block, d]);
            let landmarks = keys.narrow(3, block - 1, 1).unwrap().squeeze(3).unwrap().contiguous().unwrap();
            let lengths: Vec<u32> = (0..len).map(|_| 1 + numbers.below(block - 1) as u32).collect();
            let lengths = numbers.of(&[None, Some(&lengths[..])]);
            let first = numbers.below(capacity);
            let chosen: Vec<u32> = (0..batch * heads * time * k).map(|_| numbers.below(len) as u32).collect();

            // Every block of every head in a frame of its own, in any order; one frame more than are needed, the first one.
            let units = batch * kv_heads * len;
            let mut order: Vec<u32> = (1..=units as u32).collect();
            (1..units).for_each(|i| order.swap(i, numbers.below(i + 1)));
            let mut pool = Pool::new(units + 1, block, d, dtype, &device).unwrap();
            assert_eq!(pool.bytes(), (units + 1) * pool.frame_bytes());
            let unit = |unit: usize| {
                let (head, i) = (unit / len, unit % len);
                let part = |x: &Tensor| {
                    let of_head = x.flatten(0, 1).unwrap().get(head).unwrap();
                    bytes(&of_head.get((first + i) % capacity).unwrap())
                };
                [part(&keys), part(&values)].concat()
            };
            // Others are there first, and are replaced.
            pool.fill(&order, |_, bytes| bytes.fill(1)).unwrap();
            let mut written = 0;
            pool.fill(&order, |range, bytes| {
                assert_eq!(range.start, written);
                written = range.end;
                let each = bytes.len() / range.len();
                range.zip(bytes.chunks_exact_mut(each)).for_each(|(i, bytes)| bytes.copy_from_slice(&unit(i)));
            })
            .unwrap();
            assert_eq!(written, units);
            let frames: Vec<u32> = chosen
                .iter()
                .enumerate()
                .map(|(i, &chosen)| {
                    let bh = i / (time * k);
                    order[(bh / heads * kv_heads + bh % heads / group) * len + chosen as usize]
                })
                .collect();

            let queries = SlotQueries { queries: &queries, newest, scale: 0.3 };
            let chosen = Tensor::from_vec(chosen, (batch, heads, time, k), &device).unwrap();
            let read = |kept| {
                let blocks = Blocks { kept, landmarks: Some(&landmarks), first, len, lengths };
                let read = attend(queries, blocks, &chosen).unwrap();
                [read.out, read.lse, read.scores].map(|x| f64s(&x))
            };
            let expected = read(Kept::Ring { keys: &keys, values: &values });
            let got = read(Kept::Pool { pool: &pool, frames: &frames });
            assert!(got == expected, "case {case}: {batch} x {heads} x {time} x {d}, block {block}, k {k}, {dtype:?}");
        }
    }
}

/// What goes into frames waits in memory until a GPU that has much else to do takes it, however many fills there are until then.
#[test]
fn frames_get_what_was_written_for_them_by_a_busy_device() {
    const FRAMES: usize = 12;
    let (block, d) = (64, 128);
    for (device, _) in runs() {
        let zeros = |dims: &[usize]| Tensor::zeros(dims, DType::F32, &device).unwrap();
        let (queries, landmarks) = (zeros(&[2, 1, 1, FRAMES, d]), zeros(&[1, 1, FRAMES, d]));
        let chosen: Vec<u32> = (0..FRAMES as u32).collect();
        let mut pool = Pool::new(FRAMES, block, d, DType::F32, &device).unwrap();
        let busy = zeros(if device.is_cuda() { &[8192, 8192] } else { &[8, 8] });
        for round in 0..3 {
            let mut written = Vec::new();
            (0..10).for_each(|_| drop(busy.matmul(&busy).unwrap()));
            for frame in 0..FRAMES {
                let number = (100 * round + frame) as f32;
                pool.fill(&[frame as u32], |_, bytes| {
                    bytes.chunks_exact_mut(4).for_each(|bytes| bytes.copy_from_slice(&number.to_ne_bytes()));
                })
                .unwrap();
                written.push(number);
            }
            // Each token reads one block, all of whose values are the same.
            let blocks = Blocks {
                kept: Kept::Pool { pool: &pool, frames: &chosen },
                landmarks: Some(&landmarks),
                first: 0,
                len: FRAMES,
                lengths: None,
            };
            let queries = SlotQueries { queries: &queries, newest: 0, scale: 1. };
            let chosen = Tensor::from_vec(chosen.clone(), (1, 1, FRAMES, 1), &device).unwrap();
            let read = attend(queries, blocks, &chosen).unwrap().out;
            let read = read.narrow(3, 0, 1).unwrap().flatten_all().unwrap().to_vec1::<f32>().unwrap();
            let read: Vec<f32> = read.into_iter().map(f32::round).collect();
            assert_eq!(read, written, "round {round}");
        }
    }
}

#[test]
fn frames_that_are_not_there_are_refused() {
    let mut pool = Pool::new(3, 4, 8, DType::F32, &Device::Cpu).unwrap();
    let error = pool.fill(&[0, 3], |_, _| panic!("nothing is written")).unwrap_err().to_string();
    assert!(error.contains("3 of 3"), "{error}");
    assert!(Pool::new(0, 4, 8, DType::F32, &Device::Cpu).is_err());
    let zeros = |dims: &[usize]| Tensor::zeros(dims, DType::F32, &Device::Cpu).unwrap();
    let (q, landmarks) = (zeros(&[2, 1, 1, 1, 8]), zeros(&[1, 1, 5, 8]));
    let queries = SlotQueries { queries: &q, newest: 0, scale: 1. };
    let chosen = Tensor::new(&[[[[1u32, 4]]]], &Device::Cpu).unwrap();
    for frames in [&[0u32, 3][..], &[0], &[]] {
        let kept = Kept::Pool { pool: &pool, frames };
        let blocks = Blocks { kept, landmarks: Some(&landmarks), first: 0, len: 5, lengths: None };
        let error = attend(queries, blocks, &chosen).unwrap_err().to_string();
        assert!(error.contains("a frame of the pool for each chosen block"), "{error}");
    }
    let other = Pool::new(3, 4, 6, DType::F32, &Device::Cpu).unwrap();
    let kept = Kept::Pool { pool: &other, frames: &[0, 1] };
    let blocks = Blocks { kept, landmarks: Some(&landmarks), first: 0, len: 5, lengths: None };
    assert!(attend(queries, blocks, &chosen).unwrap_err().to_string().contains("[frames, block, 8]"));
}
