//! Choosing blocks through lists: with all lists it is what exact scoring chooses; with some of them, the best of what is in these.

use candle_core::{DType, Device, Tensor};
use landmark_attention::retrieval::{Blocks, Kept, Lists, Selection, SlotQueries, select, select_in_lists};
use proptest::prelude::*;
use proptest::test_runner::{Config, RngAlgorithm, TestRng, TestRunner};

const D: usize = 6;

#[test]
fn with_all_lists_the_choice_is_exact() {
    let config = Config { cases: 80, failure_persistence: None, ..Config::default() };
    let mut runner = TestRunner::new_with_rng(config, TestRng::deterministic_rng(RngAlgorithm::ChaCha));
    let case = (1usize..3, 1usize..3, 1usize..4, 1usize..300, 8usize..60, 1usize..6, 1usize..7, any::<bool>());
    runner
        .run(&case, |(kv_heads, group, kinds, time, len, k, lists, all_new)| {
            let heads = kv_heads * group;
            let newest = if all_new { k } else { 0 };
            let queries = Tensor::randn(0f32, 1., (k + 1, 1, heads, time, D), &Device::Cpu).unwrap();
            // Some landmarks are equal: ties go to the older.
            let different = Tensor::randn(0f32, 1., (1, kv_heads, len.div_ceil(kinds), D), &Device::Cpu).unwrap();
            let repeated: Vec<Tensor> = (0..kinds).map(|_| different.clone()).collect();
            let landmarks = Tensor::cat(&repeated, 2).unwrap().narrow(2, 0, len).unwrap().contiguous().unwrap();
            let keys = Tensor::zeros((1, kv_heads, len, 2, D), DType::F32, &Device::Cpu).unwrap();
            let kept = Kept::Ring { keys: &keys, values: &keys };
            let blocks = Blocks { kept, landmarks: &landmarks, first: 0, len, lengths: None };
            let queries = SlotQueries { queries: &queries, newest, scale: 0.4 };
            let centroids: Vec<f32> = (0..lists * D).map(|i| (i % 5) as f32 - 2.).collect();
            let members: Vec<Vec<u32>> =
                (0..lists).map(|list| (list as u32..len as u32).step_by(lists).collect()).collect();
            let of_heads = vec![Lists { centroids: &centroids, members: &members }; kv_heads];
            let chosen = |x: &Tensor| x.flatten_all().unwrap().to_vec1::<u32>().unwrap();
            let exact = chosen(&select(queries, blocks, k, Selection::PerTokenAndHead).unwrap());
            let all = select_in_lists(queries, blocks, k, &of_heads, lists).unwrap();
            prop_assert_eq!(all.dims(), [1, heads, time, k]);
            prop_assert_eq!(chosen(&all), exact);
            // Of one list: blocks of it, of the newest, and the oldest where there are not enough.
            let few = chosen(&select_in_lists(queries, blocks, k, &of_heads, 1).unwrap());
            for row in few.chunks(k) {
                prop_assert!(row.is_sorted_by(|a, b| a < b) && row.iter().all(|&block| (block as usize) < len));
            }
            Ok(())
        })
        .unwrap();
}

#[test]
fn lists_that_do_not_fit_are_refused() {
    let queries = Tensor::zeros((3, 1, 2, 4, D), DType::F32, &Device::Cpu).unwrap();
    let landmarks = Tensor::zeros((1, 2, 9, D), DType::F32, &Device::Cpu).unwrap();
    let keys = Tensor::zeros((1, 2, 9, 2, D), DType::F32, &Device::Cpu).unwrap();
    let kept = Kept::Ring { keys: &keys, values: &keys };
    let blocks = Blocks { kept, landmarks: &landmarks, first: 0, len: 9, lengths: None };
    let queries = SlotQueries { queries: &queries, newest: 2, scale: 1. };
    let (centroids, members) = ([0f32; D], [vec![0u32, 8]]);
    let lists = Lists { centroids: &centroids, members: &members };
    let error =
        |lists: &[Lists], k, probes| select_in_lists(queries, blocks, k, lists, probes).unwrap_err().to_string();
    assert!(error(&[lists], 2, 1).contains("lists"));
    assert!(error(&[Lists { centroids: &centroids[1..], ..lists }; 2], 2, 1).contains("a centroid for each list"));
    assert!(error(&[Lists { members: &[vec![9]], ..lists }; 2], 2, 1).contains("lists"));
    assert!(error(&[lists; 2], 0, 1).contains("at least 1") && error(&[lists; 2], 2, 0).contains("at least 1"));
    select_in_lists(queries, blocks, 2, &[lists; 2], 1).unwrap();
}
