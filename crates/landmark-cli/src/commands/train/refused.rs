//! Flags of the reference that are refused, each by its name and with the reason.

use super::flags::{
    DistributedBackend, Flags, LmCache, Model, Opt, OptimizationProcess, PositionalEncoder, Refused, SoftmaxFunc,
};
use anyhow::bail;

const INFERENCE: &str =
    "training reads no cache and the evaluation in it is of single windows; it is a flag of inference";
const XL: &str = "it belongs to --optimization_process transformer_xl";
const ADAMW: &str = "it belongs to --opt adamw";
const BASE: &str = "--model base_rotary has no blocks, and always a plain softmax";
const SAMPLES: &str = "it needs --sample_freq N";
const CMT: &str = "only --model landmark_with_cmt has a context-miss token";

/// Refuses what cannot be done.
pub fn check(flags: &Flags) -> anyhow::Result<()> {
    let Refused {
        distributed_backend,
        enable_rem_score,
        rem_cutoff,
        use_cache,
        mem_cache_freq,
        cache_topk,
        cache_selection_method,
        eval_seq_length,
        eval_sample_size,
        mid_length,
    } = &flags.refused;
    let has_cmt = flags.model == Model::LandmarkWithCmt;
    let jumps = flags.positional_encoder == PositionalEncoder::RotaryMemJump;
    let is_xl = flags.optimization_process == OptimizationProcess::TransformerXl;
    let is_base = flags.model == Model::BaseRotary;
    let no_samples = flags.sample_freq.is_none();
    let refusals = [
        (
            "distributed_backend nccl",
            *distributed_backend != DistributedBackend::None,
            "this build trains on one device",
        ),
        ("beta1", flags.beta1 != 0.9 && flags.opt != Opt::AdamW, ADAMW),
        ("beta2", flags.beta2 != 0.95 && flags.opt != Opt::AdamW, ADAMW),
        ("group_dropout", is_base && flags.group_dropout.is_some_and(|p| p > 0.), BASE),
        ("softmax_func", is_base && flags.softmax_func != SoftmaxFunc::MemOpt, BASE),
        ("total_sequence_length", !is_xl && flags.total_sequence_length.is_some(), XL),
        ("allow_cache_during_training", !is_xl && flags.allow_cache_during_training, XL),
        ("lm_cache mem", is_xl && flags.lm_cache == LmCache::Mem, "transformer_xl trains with --lm_cache kv_train"),
        ("enable_rem_score", *enable_rem_score && !has_cmt, CMT),
        ("under_rem_score_prob", flags.under_rem_score_prob != Some(0.) && !has_cmt, CMT),
        ("rem_cutoff", rem_cutoff.is_some(), "the reference does not train with it; it is a flag of inference"),
        ("pos_jump_on_mem", flags.pos_jump_on_mem.is_some() && !jumps, "it needs --positional_encoder rotary_mem_jump"),
        ("sample_prompt", no_samples && flags.sample_prompt.is_some(), SAMPLES),
        ("sample_tokens", no_samples && flags.sample_tokens != 64, SAMPLES),
        ("sample_temperature", no_samples && flags.sample_temperature != 0.8, SAMPLES),
        ("use_cache", *use_cache, INFERENCE),
        ("lm_cache", !is_xl && flags.lm_cache != LmCache::None, INFERENCE),
        ("mem_cache_size", !is_xl && flags.mem_cache_size.is_some(), INFERENCE),
        ("mem_cache_freq", mem_cache_freq.is_some(), INFERENCE),
        ("cache_topk", *cache_topk != 1, INFERENCE),
        ("cache_selection_method", cache_selection_method != "per_token_and_head", INFERENCE),
        ("eval_seq_length", *eval_seq_length != 512, INFERENCE),
        ("eval_sample_size", eval_sample_size.is_some(), INFERENCE),
        ("mid_length", *mid_length != 250, INFERENCE),
    ];
    let retrieval = flags.exercises.refusals().into_iter().chain(flags.negatives.refusals());
    if let Some((flag, _, reason)) = refusals.into_iter().chain(retrieval).find(|(_, given, _)| *given) {
        bail!("--{flag} is refused: {reason}");
    }
    let missing = [
        ("total_sequence_length N", flags.total_sequence_length.is_none()),
        ("lm_cache kv_train", flags.lm_cache == LmCache::None),
        ("mem_cache_size N", flags.mem_cache_size.is_none()),
        ("allow_cache_during_training", !flags.allow_cache_during_training),
    ];
    match missing.into_iter().find(|(_, missing)| is_xl && *missing) {
        Some((flag, _)) => bail!("--optimization_process transformer_xl needs --{flag}"),
        None => Ok(()),
    }
}
