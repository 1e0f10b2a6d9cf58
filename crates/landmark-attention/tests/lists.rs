//! Choosing blocks through lists: with all lists it is what exact scoring chooses, but for scores as near as rounding; with some of them, the best of what is in
//! these.

use candle_core::{Device, Tensor};
use landmark_attention::retrieval::{Keys, List, Lists, RoundedKeys, SlotQueries, select_in_lists};
use proptest::prelude::*;
use proptest::test_runner::{Config, RngAlgorithm, TestRng, TestRunner};

const D: usize = 6;

/// Keys `[heads, blocks, D]`.
struct Plain<'a> {
    keys: &'a [f32],
    blocks: usize,
}

impl Plain<'_> {
    fn row(&self, head: usize, block: usize) -> &[f32] {
        &self.keys[(head * self.blocks + block) * D..][..D]
    }
}

impl Keys for Plain<'_> {
    fn key(&self, head: usize, block: usize, into: &mut [f32]) {
        into.copy_from_slice(self.row(head, block));
    }
}

fn numbers(x: &Tensor) -> Vec<f32> {
    x.flatten_all().unwrap().to_vec1().unwrap()
}

/// Lists of one head's blocks, `step` of them that take turns, and their centroids.
fn lists(keys: &Plain, head: usize, step: usize) -> (RoundedKeys, Vec<List>) {
    let mut centroids = RoundedKeys::new(D);
    let list = |first: usize| {
        let mut list = List { blocks: Vec::new(), keys: RoundedKeys::new(D) };
        for block in (first..keys.blocks).step_by(step) {
            list.blocks.push(block as u32);
            list.keys.push(keys.row(head, block), &[0.5; D]);
        }
        centroids.push(&[first as f32; D], &[0.5; D]);
        list
    };
    let lists = (0..step).map(list).collect();
    (centroids, lists)
}

#[test]
fn with_all_lists_the_choice_is_the_best() {
    let config = Config { cases: 80, failure_persistence: None, ..Config::default() };
    let mut runner = TestRunner::new_with_rng(config, TestRng::deterministic_rng(RngAlgorithm::ChaCha));
    let case = (1usize..3, 1usize..3, 1usize..4, 1usize..300, 8usize..60, 1usize..6, 1usize..7, any::<bool>());
    runner
        .run(&case, |(kv_heads, group, kinds, time, len, k, step, all_new)| {
            let heads = kv_heads * group;
            let newest = if all_new { k } else { 0 };
            let queries = Tensor::randn(0f32, 1., (k + 1, 1, heads, time, D), &Device::Cpu).unwrap();
            // Some landmarks are equal: ties go to the older.
            let different = Tensor::randn(0f32, 1., (1, kv_heads, len.div_ceil(kinds), D), &Device::Cpu).unwrap();
            let repeated: Vec<Tensor> = (0..kinds).map(|_| different.clone()).collect();
            let keys = numbers(&Tensor::cat(&repeated, 2).unwrap().narrow(2, 0, len).unwrap());
            let keys = Plain { keys: &keys, blocks: len };
            let rows = numbers(&queries);
            let queries = SlotQueries { queries: &queries, newest, scale: 0.4 };
            let owned: Vec<_> = (0..kv_heads).map(|head| lists(&keys, head, step)).collect();
            let lists: Vec<Lists> =
                owned.iter().map(|(centroids, lists)| Lists { origin: &[0.5; D], centroids, lists }).collect();
            let chosen = select_in_lists(queries, len, &keys, k, &lists, step).unwrap();
            prop_assert_eq!(chosen.dims(), [1, heads, time, k]);
            let chosen = chosen.flatten_all().unwrap().to_vec1::<u32>().unwrap();
            for (i, chosen) in chosen.chunks(k).enumerate() {
                prop_assert!(chosen.is_sorted_by(|a, b| a < b));
                let (head, t) = (i / time, i % time);
                let score = |block: usize| -> f32 {
                    let slot = if block < len - newest { 0 } else { block + 1 - (len - newest) };
                    let query = &rows[((slot * heads + head) * time + t) * D..][..D];
                    query.iter().zip(keys.row(head / group, block)).map(|(q, k)| q * k).sum()
                };
                let scores: Vec<f32> = (0..len).map(score).collect();
                let mut best = scores.clone();
                best.sort_by(|a, b| b.total_cmp(a));
                for &block in chosen {
                    let off = best[k - 1] - scores[block as usize];
                    prop_assert!(off < 0.15, "{} is {} under the best", block, off);
                    let older =
                        (0..block as usize).filter(|&other| other < len - newest && (block as usize) < len - newest);
                    for other in older.filter(|&other| scores[other] == scores[block as usize]) {
                        prop_assert!(chosen.contains(&(other as u32)), "{} and not the older {}", block, other);
                    }
                }
            }
            // Of one list: blocks of it, of the newest, and the oldest where there are not enough.
            let few = select_in_lists(queries, len, &keys, k, &lists, 1).unwrap();
            for row in few.flatten_all().unwrap().to_vec1::<u32>().unwrap().chunks(k) {
                prop_assert!(row.is_sorted_by(|a, b| a < b) && row.iter().all(|&block| (block as usize) < len));
            }
            Ok(())
        })
        .unwrap();
}

#[test]
fn lists_that_do_not_fit_are_refused() {
    let queries = Tensor::zeros((3, 1, 2, 4, D), candle_core::DType::F32, &Device::Cpu).unwrap();
    let keys = Plain { keys: &[0.; 2 * 9 * D], blocks: 9 };
    let queries = SlotQueries { queries: &queries, newest: 2, scale: 1. };
    let (centroids, of_head) = lists(&keys, 0, 1);
    let whole = Lists { origin: &[0.; D], centroids: &centroids, lists: &of_head };
    let error = |len, lists: &[Lists], k, probes| {
        select_in_lists(queries, len, &keys, k, lists, probes).unwrap_err().to_string()
    };
    assert!(error(9, &[whole; 3], 2, 1).contains("lists") && error(9, &[], 2, 1).contains("lists"));
    let none = RoundedKeys::new(D);
    assert!(error(9, &[Lists { centroids: &none, ..whole }; 2], 2, 1).contains("a centroid"));
    assert!(error(9, &[Lists { origin: &[0.], ..whole }; 2], 2, 1).contains("lists"));
    // Blocks that are not there, and blocks without a key, are not found.
    let short = [List { blocks: vec![0, 80], keys: of_head[0].keys.clone() }];
    select_in_lists(queries, 8, &keys, 2, &[Lists { lists: &short, ..whole }; 2], 1).unwrap();
    assert!(error(9, &[whole; 2], 0, 1).contains("at least 1") && error(9, &[whole; 2], 2, 0).contains("at least 1"));
    let negative = SlotQueries { scale: -1., ..queries };
    assert!(select_in_lists(negative, 9, &keys, 2, &[whole; 2], 1).unwrap_err().to_string().contains("scale"));
    select_in_lists(queries, 9, &keys, 2, &[whole; 2], 1).unwrap();
}
